"""Which images a step sees, and with which random draws: pure functions of the seed.

Nothing here depends on a worker's history. The order of an epoch is a function of (seed, epoch),
a sample's augmentation one of (seed, epoch, index, repeat), and a micro-batch's mixing and the
network's own draws are ones of (seed, step, micro-batch). So any number of workers gives the same
images, a run resumes at any step without replaying data, and another number of processes shares
out the same micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Sampler


def key_seed(*key: int) -> int:
    """A 64-bit seed from whole numbers; different keys give independent seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run a block under torch's CPU generator seeded by `key`, and restore its state after.

    torchvision's v2 transforms draw from the global generator and take no other. Only the CPU's is
    touched: torch.manual_seed would also reseed every GPU, at each sample.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seed_network(*key: int) -> None:
    """Seed what a network draws by itself, on every device, and leave it so."""
    torch.manual_seed(key_seed(*key))


class StepSampler(Sampler[list[tuple[int, ...]]]):
    """The micro-batches of one rank, from one global step to another, as lists of (epoch, index).

    A global step is `micro_batches` micro-batches of `micro_batch` images, cut one after another
    from the epoch's order; what does not fill a step at an epoch's end is left out of that epoch.
    Rank r of W takes micro-batches r, r + W, r + 2W, … of each step. A set that is smaller than a
    step is trained as one step of smaller micro-batches.

    With `repeats` above 1 an epoch has as many samples, of the first images of its order alone:
    (epoch, index, repeat), each so many times with other draws. An image's repeats share a step (at
    its ends, two), as far apart in it as can be: in micro-batches of their own where there are
    so many, and else not side by side, where an image would be mixed with itself.

    `micro_batch` and `micro_batches` belong to the run, `rank` and `world` to the processes that
    happen to carry it: W must divide `micro_batches`.
    """

    def __init__(
        self,
        images: int,
        *,
        seed: int,
        micro_batch: int,
        micro_batches: int,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ):
        if micro_batches % world:
            raise ValueError(f"{micro_batches} micro-batches a step cannot be shared by {world}")
        if images < micro_batches:
            raise ValueError(f"{images} images cannot fill {micro_batches} micro-batches")
        self.images, self.seed, self.rank, self.world = images, seed, rank, world
        self.micro_batch = min(micro_batch, images // micro_batches)
        self.micro_batches, self.repeats = micro_batches, repeats
        self.global_batch = self.micro_batch * micro_batches
        self.steps_per_epoch = images // self.global_batch
        self.first_step, self.last_step = 0, self.steps_per_epoch

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * (self.micro_batches // self.world)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        order_epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.order(epoch)
            first = step_in_epoch * self.global_batch
            places, repeat = np.divmod(np.arange(first, first + self.global_batch), self.repeats)
            keys = [order[places]] + [repeat] * (self.repeats > 1)
            batch = np.stack(keys, 1)[np.argsort(repeat, kind="stable")]
            for micro in np.split(batch, self.micro_batches)[self.rank :: self.world]:
                yield [(epoch, *key) for key in micro.tolist()]

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of all image indices that `epoch` (from 0) walks through."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.images)
