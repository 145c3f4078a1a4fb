"""data/transforms.py: crops, normalisation, MixUp and CutMix, with torchvision's values."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data import transforms
from data.randaugment import OPS, RandAugment
from data.sampling import seeded
from data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    EvalTransform,
    TrainTransform,
    cut_mix,
    mix_up,
    normalise,
)


def images(count, height=20, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_normalise_equals_torchvisions_within_rounding():
    batch = images(4)
    theirs = v2.functional.normalize(
        v2.functional.to_dtype(batch, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD
    )
    ours = normalise(batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    black_and_white = normalise(
        torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    )
    expected = torch.tensor([[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]])  # by hand
    torch.testing.assert_close(black_and_white[:, :, 0, 0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (128, 146), (64, 73), (32, 37)])
@pytest.mark.parametrize("shape", [(90, 60), (300, 500)])
def test_evaluation_resizes_the_shorter_side_in_proportion_and_crops_the_centre(
    size, resized, shape
):
    image = images(1, *shape)[0]
    plain = v2.Compose(
        [v2.Resize(resized, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    )
    ours = EvalTransform(size)(image)
    assert ours.shape == (3, size, size) and ours.dtype == torch.uint8
    assert torch.equal(ours, plain(image))


@pytest.mark.parametrize("shape", [(3, 10, 320), (3, 320, 10), (3, 10, 400), (3, 410, 10)])
def test_of_long_images_only_the_centre_is_resized_to_the_same_pixels(shape):
    image = torch.randint(256, shape, dtype=torch.uint8)
    whole = v2.functional.resize(image, [32], v2.InterpolationMode.BICUBIC, antialias=True)
    expected = v2.functional.center_crop(whole, [28, 28])
    assert torch.equal(EvalTransform(28)(image), expected)


def test_a_file_of_one_by_thousands_of_pixels_takes_little_memory(monkeypatch):
    sizes, resize = [], transforms.F.resize_image

    def measure(image, *args, **kwargs):
        sizes.append(resize(image, *args, **kwargs))
        return sizes[-1]

    monkeypatch.setattr(transforms.F, "resize_image", measure)
    for shape in ((3, 1, 2000), (3, 2000, 1)):  # whole, 393 MB each
        image = torch.full(shape, 7, dtype=torch.uint8)
        assert (EvalTransform(224)(image) == 7).all()
        assert TrainTransform(224)(image)[0].shape == (3, 224, 224)
    assert max(image.numel() for image in sizes) < 10_000_000


def test_training_crops_and_flips_as_the_plain_recipe_does():
    image = images(1, 60, 90)[0]
    plain = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.2, 1), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9),
        ]
    )
    for i in range(20):
        with seeded(i):
            expected = plain(image)
        with seeded(i):
            crop, draws = TrainTransform(32, scale=(0.2, 1.0))(image)
        assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8
        assert torch.equal(RandAugment(magnitude=9)(crop[None], draws[None])[0], expected)


@pytest.mark.parametrize("seed", range(8))
def test_mixup_and_cutmix_have_torchvisions_values_and_stay_channels_last(seed):
    labels = torch.tensor([0, 3, 3, 1, 2])
    targets = torch.nn.functional.one_hot(labels, 4)
    for theirs, ours in (
        (v2.MixUp(alpha=0.4, num_classes=4), mix_up),
        (v2.CutMix(alpha=1.0, num_classes=4), cut_mix),
    ):
        batch = normalise(images(5, seed=seed))
        with seeded(seed):
            expected = theirs(batch.clone(), labels)
        with seeded(seed):
            mixed = ours(batch, targets, **theirs.make_params([batch]))
        assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1], expected[1])
        assert mixed[0].is_contiguous(memory_format=torch.channels_last)


def grey_levels(values):
    """Constant images, whose pixels show how they were mixed."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)


def mixed(step, micro=0, *, seed=0, mixup=1.0):
    """A black and a white image, mixed without RandAugment: pixels from 0 to 1, and targets."""
    augment = Augment(2, seed=seed, magnitude=9, mixup=mixup, cutmix=1.0)
    inputs, targets = augment(
        grey_levels([0, 255]),
        torch.tensor([0, 1]),
        torch.zeros(2, 2, 2, dtype=torch.int64),
        step=step,
        micro=micro,
    )
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    return inputs * std + mean, targets


def test_targets_equal_the_shares_of_the_pixels_in_mixup_and_cutmix():
    cut = 0
    for step in range(200):
        pixels, targets = mixed(step)
        assert targets.shape == (2, 2)
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        # The share of white is the target of the white class, with MixUp and with CutMix.
        torch.testing.assert_close(pixels.mean((1, 2, 3)), targets[:, 1], rtol=0, atol=1e-5)
        pure = torch.minimum(pixels, 1 - pixels).abs().max() < 1e-5
        cut += bool(pure)
    assert 70 < cut < 130  # half of 200 within 4 sigma


def test_mixing_keeps_the_sum_of_all_targets():
    augment = Augment(5, seed=0, magnitude=9, mixup=0.2, cutmix=1.0)
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 4, 0])
    for step in range(20):
        inputs, targets = augment(
            images(8), labels, torch.zeros(8, 2, 2, dtype=torch.int64), step=step, micro=1
        )
        assert inputs.shape == (8, 3, 20, 24) and inputs.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        torch.testing.assert_close(targets.sum(0), torch.bincount(labels).float())


def test_mixing_depends_only_on_seed_step_and_micro_batch():
    before = torch.get_rng_state()
    pixels, targets = mixed(3, 1)
    torch.manual_seed(99)
    again, targets_again = mixed(3, 1)
    assert torch.equal(again, pixels) and torch.equal(targets_again, targets)
    for other in (mixed(4, 1), mixed(3, 2), mixed(3, 1, seed=1)):
        assert not torch.equal(other[1], targets)
    torch.set_rng_state(before)
    mixed(3, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_smaller_alpha_mixes_less():
    def least_share(alpha):
        shares = [mixed(step, mixup=alpha)[1].min().item() for step in range(120)]
        return np.mean(shares)

    assert least_share(0.05) < least_share(1.0) - 0.03


def test_randaugment_is_applied_before_mixing():
    augment = Augment(2, seed=0, magnitude=9, mixup=1.0, cutmix=1.0)
    batch, labels = images(2), torch.tensor([0, 1])
    op = OPS.index("Equalize")
    draws = torch.tensor([[[op, 0]], [[op, 0]]])
    equalised = torch.stack([v2.functional.equalize(image) for image in batch])
    none = torch.zeros(2, 1, 2, dtype=torch.int64)
    ours, _ = augment(batch, labels, draws, step=0, micro=0)
    expected, _ = augment(equalised, labels, none, step=0, micro=0)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, augment(batch, labels, none, step=0, micro=0)[0])
