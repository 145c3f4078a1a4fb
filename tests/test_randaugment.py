"""data/randaugment.py: torchvision's RandAugment to the bit, applied to whole batches."""

import pytest
import torch
from torchvision.transforms import v2

from data import randaugment
from data.randaugment import OPS, RandAugment
from data.sampling import seeded

MOVES, LEVELS = "ShearX ShearY TranslateX TranslateY Rotate", "Brightness Color Contrast Sharpness"
SIGNED = {*MOVES.split(), *LEVELS.split()}


def images(count, height=20, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(1, 9), (2, 9), (3, 15)])
def test_every_image_of_a_batch_gets_the_pixels_that_torchvision_gives_it_alone(num_ops, magnitude):
    batch = images(160)
    kept = batch.clone()
    theirs, draws = [], []
    for i, image in enumerate(batch):
        with seeded(i):
            theirs.append(v2.RandAugment(num_ops, magnitude)(image))
        with seeded(i):
            draws.append(RandAugment.draw(num_ops))
    draws = torch.stack(draws)
    ours = RandAugment(magnitude=magnitude)(batch, draws)
    assert draws.shape == (160, num_ops, 2) and draws.dtype == torch.int64
    assert torch.equal(ours, torch.stack(theirs))
    assert torch.equal(batch, kept)
    drawn = {(OPS[op], sign) for op, sign in draws.flatten(0, 1).tolist()}
    assert drawn == {(op, s) for op in OPS for s in ((0, 1) if op in SIGNED else (0,))}


def test_drawing_advances_the_generator_as_torchvision_does():
    for i in range(30):
        with seeded(i):
            v2.RandAugment(2)(images(1)[0])
            after_theirs = torch.rand(())
        with seeded(i):
            RandAugment.draw(2)
            assert torch.equal(torch.rand(()), after_theirs)


def test_operations_are_equally_likely_and_half_of_the_signed_ones_are_negated():
    with seeded(0):
        draws = torch.cat([RandAugment.draw(2) for _ in range(3500)])
    n = len(draws)
    ops = torch.bincount(draws[:, 0], minlength=14)
    sigma = (n * 1 / 14 * 13 / 14) ** 0.5
    assert len(ops) == 14 == len(OPS)
    assert (ops - n / 14).abs().max() < 4 * sigma
    for op, name in enumerate(OPS):
        signs = draws[draws[:, 0] == op, 1].double()
        if name in SIGNED:
            assert abs(signs.mean() - 0.5) < 4 * 0.5 / len(signs) ** 0.5
        else:
            assert not signs.any()


@pytest.mark.parametrize("shape", [(1, 9), (2, 2), (3, 3), (320, 300)])
def test_any_image_size_gets_torchvisions_pixels(shape):
    batch = images(46, *shape)
    draws = torch.tensor([[choice] for choice in every_choice()] * 2)
    ours = RandAugment(magnitude=9)(batch, draws)
    for image, changed, draw in zip(batch, ours, draws, strict=True):
        assert torch.equal(changed, torchvisions(image, *draw[0].tolist()))


@pytest.mark.parametrize("fill", [0, 77, 255])
def test_images_of_one_color_get_torchvisions_pixels(fill):
    image = torch.full((3, 12, 12), fill, dtype=torch.uint8)
    image[1] = 200
    draws = torch.tensor([[choice] for choice in every_choice()])
    ours = RandAugment(magnitude=9)(image.expand(len(draws), -1, -1, -1), draws)
    for changed, draw in zip(ours, draws, strict=True):
        assert torch.equal(changed, torchvisions(image, *draw[0].tolist()))


def test_the_number_of_images_handled_at_once_does_not_change_the_pixels(monkeypatch):
    batch = images(50)
    with seeded(1):
        draws = torch.stack([RandAugment.draw(2) for _ in batch])
    whole = RandAugment(magnitude=9)(batch, draws)
    for pixels in (1, 7 * 20 * 24):
        monkeypatch.setattr(randaugment, "PIXELS_AT_ONCE_ON_CPU", pixels)
        assert torch.equal(RandAugment(magnitude=9)(batch, draws), whole)


def every_choice():
    """Each operation, and its negation where it has a sign: 23 of them."""
    return [(i, n) for i, op in enumerate(OPS) for n in ((0, 1) if op in SIGNED else (0,))]


def torchvisions(image, op, negated):
    """What torchvision's RandAugment with magnitude 9 does when it draws this operation."""
    for seed in range(1000):
        with seeded(seed):
            if RandAugment.draw(1).tolist() == [[op, negated]]:
                break
    with seeded(seed):
        return v2.RandAugment(1, 9)(image)
