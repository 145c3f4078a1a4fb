"""data/sampling.py: orders and draws are functions of the seed, whoever carries the run."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.sampling import StepSampler, check_batch_norm, key_seed, seeded


def batches(sampler, first=0, last=None):
    return list(sampler.batches(first, sampler.steps_per_epoch if last is None else last))


def global_steps(world, *, images=23, micro_batches=4, steps=10):
    """The micro-batches of each global step, put together from those of all ranks."""
    ranks = []
    for rank in range(world):
        sampler = StepSampler(
            images, seed=5, micro_batch=2, micro_batches=micro_batches, rank=rank, world_size=world
        )
        share = micro_batches // world
        mine = batches(sampler, 0, steps)
        ranks.append([mine[i : i + share] for i in range(0, len(mine), share)])
    return [
        [ranks[micro % world][step][micro // world] for micro in range(micro_batches)]
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("images", "micro", "micros", "expected"),
    [
        # micro-batch, global batch and steps per epoch, worked out by hand
        (10, 4, 1, (4, 4, 2)),
        (10, 4, 2, (4, 8, 1)),
        (8, 4, 2, (4, 8, 1)),
        (7, 4, 2, (3, 6, 1)),  # smaller than a step: one step of smaller micro-batches
        (3, 256, 1, (3, 3, 1)),
        (5, 2, 4, (1, 4, 1)),
        (1, 32, 1, (1, 1, 1)),
        (1_281_167, 256, 4, (256, 1024, 1251)),
    ],
)
def test_sizes(images, micro, micros, expected):
    sampler = StepSampler(images, seed=0, micro_batch=micro, micro_batches=micros)
    assert (sampler.micro_batch, sampler.global_batch, sampler.steps_per_epoch) == expected
    if images < 100:
        drawn = batches(sampler)
        assert len(drawn) == expected[2] * micros
        assert {len(batch) for batch in drawn} == {expected[0]}


def test_each_epoch_is_a_permutation_of_its_own():
    sampler = StepSampler(12, seed=3, micro_batch=4, micro_batches=1)
    drawn = batches(sampler, 0, 9)
    epochs = [sum(drawn[first : first + 3], []) for first in (0, 3, 6)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(12))
    orders = [[index for _, index in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = StepSampler(12, seed=4, micro_batch=4, micro_batches=1)
    assert sampler.order(0).tolist() != other.order(0).tolist()


def test_images_that_do_not_fill_a_step_differ_from_epoch_to_epoch():
    sampler = StepSampler(5, seed=0, micro_batch=4, micro_batches=1)
    left = [set(range(5)) - {i for _, i in batch} for batch in batches(sampler, 0, 40)]
    assert all(len(rest) == 1 for rest in left) and set.union(*left) == set(range(5))


def test_a_global_step_is_the_same_on_1_2_and_4_ranks():
    alone = global_steps(1)
    assert len({index for micro in alone[0] for _, index in micro}) == 8
    assert global_steps(2) == alone
    assert global_steps(4) == alone


@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_at_any_step_it_continues_with_the_tail(rank):
    def make():
        return StepSampler(11, seed=1, micro_batch=1, micro_batches=4, rank=rank, world_size=2)

    whole = batches(make(), 0, 7)
    assert len(whole) == 14
    for step in range(8):
        assert batches(make(), step, 7) == whole[2 * step :]


def test_counts_that_do_not_divide_or_fill_are_refused():
    with pytest.raises(ValueError, match="4 micro-batches per step do not divide by 3"):
        StepSampler(100, seed=0, micro_batch=2, micro_batches=4, rank=0, world_size=3)
    with pytest.raises(ValueError, match="3 images cannot fill 4"):
        StepSampler(3, seed=0, micro_batch=2, micro_batches=4)


def test_seeds_of_different_keys_differ():
    keys = [(a, b, c, d) for a in range(3) for b in range(8) for c in range(8) for d in (0, 1)]
    assert len({key_seed(*key) for key in keys}) == len(keys)
    assert key_seed(1, 2, 3) == key_seed(1, 2, 3)
    assert max(key_seed(i) for i in range(50)) > 2**32  # all 64 bits are used


def test_seeded_gives_the_same_draws_and_leaves_the_generator_as_it_was():
    torch.manual_seed(7)
    expected = [torch.rand(3) for _ in range(2)]
    torch.manual_seed(7)
    first = torch.rand(3)
    with seeded(1, 2, 3):
        inside = torch.rand(3)
    with pytest.raises(KeyError), seeded(1, 2, 3):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(3), expected[1])
    with seeded(1, 2, 4):
        assert not torch.equal(torch.rand(3), inside)


def test_the_order_leaves_numpys_global_generator_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    StepSampler(9, seed=0, micro_batch=3, micro_batches=1).order(0)
    assert np.array_equal(np.random.get_state()[1], before)


def test_repeats_fill_an_epoch_with_a_third_of_its_images():
    sampler = StepSampler(24, seed=5, micro_batch=4, micro_batches=3, repeats=3)
    order, micros = sampler.order(0), batches(sampler)
    assert len(micros) == 6
    drawn = sorted(key for micro in micros for key in micro)
    assert drawn == sorted(
        (0, index, repeat) for index in order[:8].tolist() for repeat in range(3)
    )
    assert micros[1] == [(0, index, 1) for index in order[:4].tolist()]
    for micro in micros:  # an image's repeats are in micro-batches of their own
        assert len({index for _, index, _ in micro}) == 4


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_repeats_are_not_side_by_side_and_are_shared_alike(micro_batches):
    def keys(rank=0, world=1):
        return batches(
            StepSampler(
                200,
                seed=1,
                micro_batch=64 // micro_batches,
                repeats=3,
                rank=rank,
                micro_batches=micro_batches,
                world_size=world,
            )
        )

    alone = keys()
    for micro in alone:  # mixing takes the neighbour, and the last one's is the first
        assert all(a[1] != b[1] for a, b in zip(micro, micro[1:] + micro[:1], strict=True))
    if micro_batches > 1:
        assert alone[::2] == keys(0, 2) and alone[1::2] == keys(1, 2)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "img_size", "advice"),
    [
        (8, 1, 32, "use --batch_size 2 or more"),
        (1, 8, 32, "has 1 images, .* crops of 32 px .*: add images, or use a larger --img_size"),
        (8, 2, 32, None),
        (8, 1, 33, None),
        (1, 8, 64, None),
    ],
)
def test_batch_norm_of_one_value_is_refused_with_advice_that_helps(
    num_images, batch_size, img_size, advice
):
    sampler = StepSampler(num_images, seed=0, micro_batch=batch_size, micro_batches=1)
    if advice is None:
        return check_batch_norm(sampler, batch_size, img_size)
    with pytest.raises(UserError, match=advice):
        check_batch_norm(sampler, batch_size, img_size)
