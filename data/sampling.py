"""Which images a step sees, and with which random draws: pure functions of the seed.

The order of an epoch depends only on (seed, epoch), the augmentation of a sample only on (seed,
epoch, index, repeat) and the recipe, and the mixing of a micro-batch and the network's own draws
only on (seed, step, micro-batch). So any number of workers gives the same images, a run resumes at
any step without replaying data, and another number of processes shares the same micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from common.errors import UserError

# The last number of a key keeps uses apart whose other numbers can be equal: (seed, epoch, index)
# and (seed, step, micro-batch). It must not be 0, as trailing zeros do not change the seed.
MIXING, NETWORK, FIRST_REPEAT = 1, 2, 3


def key_seed(*key: int) -> int:
    """Derive a 64-bit seed from integers. Keys that differ only in trailing zeros may coincide."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator by `key` for the block, and restore its state afterwards.

    torchvision's v2 transforms draw from the global generator and accept no other. Only the CPU's
    is seeded: torch.manual_seed would also reseed every GPU, for each sample.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seed_network(seed: int, step: int, micro: int) -> None:
    """Seed what a network itself draws (stochastic depth), on every device."""
    torch.manual_seed(key_seed(seed, step, micro, NETWORK))


class StepSampler:
    """The micro-batches of one rank, as lists of (epoch, index).

    A global step consists of `micro_batches` micro-batches of `micro_batch` images, cut one after
    another from the epoch's order. Images that do not fill a step at the end of an epoch are left
    out of that epoch. Rank r of W takes micro-batches r, r + W, r + 2W, … of each step. A set that
    is smaller than a step is trained in steps of smaller micro-batches.

    Repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335): with `repeats` above 1 an epoch
    keeps its number of samples but draws only images / repeats images, each `repeats` times with
    different augmentation, as (epoch, index, repeat). The repeats of an image are spread over
    different micro-batches of a step where there are enough of them, and are never neighbours in
    one, so that MixUp does not mix an image with itself. With 2 repeats and steps of 4 images the
    order a, b, … becomes the step a0 b0 a1 b1.

    `micro_batch` and `micro_batches` belong to the run; `rank` and `world_size` to the processes
    that train it at the moment. `world_size` must divide `micro_batches`.
    """

    def __init__(
        self,
        num_images: int,
        *,
        seed: int,
        micro_batch: int,
        micro_batches: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
    ):
        if micro_batches % world_size:
            raise ValueError(
                f"{micro_batches} micro-batches per step do not divide by {world_size}"
            )
        if num_images < micro_batches:
            raise ValueError(f"{num_images} images cannot fill {micro_batches} micro-batches")
        self.num_images, self.seed, self.rank, self.world_size = num_images, seed, rank, world_size
        self.micro_batch = min(micro_batch, num_images // micro_batches)
        self.micro_batches, self.repeats = micro_batches, repeats
        self.global_batch = self.micro_batch * micro_batches
        self.steps_per_epoch = num_images // self.global_batch

    def batches(self, first: int, last: int) -> Iterator[list[tuple[int, ...]]]:
        """Yield this rank's micro-batches of the global steps from `first` to before `last`."""
        order_epoch, order = -1, np.empty(0, np.int64)
        for step in range(first, last):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.order(epoch)
            keys = self.keys_of_step(order, step_in_epoch)
            for micro in np.split(keys, self.micro_batches)[self.rank :: self.world_size]:
                yield [(epoch, *key) for key in micro.tolist()]

    def keys_of_step(self, order: np.ndarray, step_in_epoch: int) -> np.ndarray:
        """The samples of one global step: (index) or (index, repeat) in each row."""
        samples = step_in_epoch * self.global_batch + np.arange(self.global_batch)
        if self.repeats == 1:
            return order[samples][:, None]
        # Sample n of the epoch is repeat n % repeats of image n // repeats. All first repeats come
        # first, then all second ones, and so on: that keeps those of an image apart.
        repeat = samples % self.repeats
        keys = np.stack([order[samples // self.repeats], repeat], axis=1)
        return keys[np.argsort(repeat, kind="stable")]

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of all image indices that `epoch` (counted from 0) uses."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_images)


def check_batch_norm(sampler: StepSampler, batch_size: int, crop_size: int) -> None:
    """Raise UserError where BatchNorm of the last stage would see a single value per channel.

    crop_size: side of the smallest training crops, in pixels.
    """
    if sampler.micro_batch > 1 or crop_size > 32:
        return
    if batch_size == 1:
        raise UserError(
            "BatchNorm needs more than one value per channel: use --batch_size 2 or more"
        )
    raise UserError(
        f"the training set has {sampler.num_images} images, one per process, and BatchNorm needs "
        f"more than one value per channel, which crops of {crop_size} px do not give: add images, "
        "or use a larger --img_size"
    )
