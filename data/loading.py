"""DataLoaders over the two datasets: this rank's steps of training, its share of evaluation."""

from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader

from data.images import EvalSet, Sample, TrainSet, collate
from data.sampling import StepSampler


def train_steps(
    dataset: TrainSet,
    sampler: StepSampler,
    *,
    first: int,
    last: int,
    workers: int,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
) -> Iterator[list[Sample]]:
    """This rank's micro-batches of each global step from `first` to before `last`.

    One iterator for the whole run: the workers go on loading while a validation takes place.
    """
    sampler.first_step, sampler.last_step = first, last
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
    )
    share = [iter(loader)] * (sampler.micro_batches // sampler.world)
    return map(list, zip(*share, strict=True))  # the one iterator, taken by so many at a time


def eval_batches(
    dataset: EvalSet,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world: int = 1,
    worker_init: Callable[[int], None] | None = None,
) -> tuple[DataLoader, int]:
    """Every world-th batch of a fixed cut into batches, and the most batches any rank has.

    No image is seen twice and none left out. The cut does not depend on the number of ranks, so
    that each image is scored in the same batch, with the same rounding, on any number of them.
    """
    n, share = len(dataset), []
    cut = [range(first, min(first + batch_size, n)) for first in range(0, n, batch_size)]
    loader = DataLoader(
        dataset,
        batch_sampler=share,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=worker_init,
    )
    # The workers are forked now, with nothing to load yet: later, each page of the activations
    # that this process has by then would be copied once more, when it is next written to.
    iter(loader)
    share += cut[rank::world]
    return loader, -(-len(cut) // world)
