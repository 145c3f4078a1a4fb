"""Loaders: this rank's micro-batches of each training step, and its share of an evaluation."""

import itertools
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import UserError
from common.processes import ignore_stop_signals, usable_cpus
from data.images import EvalSet, Sample, TrainSet, collate
from data.sampling import StepSampler
from data.transforms import normalise

SHARED_MEMORY = Path("/dev/shm")  # through which Linux passes batches between processes
FILES_PER_WORKER = 32  # open files: pipes, and one per tensor on its way


class TrainLoader:
    """Batches of augmented images for training, the same for any number of workers."""

    def __init__(self, dataset: TrainSet, sampler: StepSampler, *, workers: int):
        self.dataset, self.sampler = dataset, sampler
        self.steps_per_epoch = sampler.steps_per_epoch
        self.workers = min(workers, usable_cpus())

    def file_name(self, index: int) -> str:
        return self.dataset.source.file_name(index)

    def steps(self, first: int, last: int) -> Iterator[list[Sample]]:
        """Yield this rank's micro-batches of each global step from `first` to before `last`.

        Use one iterator for the whole run: its workers keep loading during a validation.
        """
        check_worker_limits(self.workers)
        batches = iter(
            DataLoader(
                self.dataset,
                batch_sampler=self.sampler.batches(first, last),
                num_workers=self.workers,
                collate_fn=collate,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_stop_signals,
            )
        )
        micro_batches_per_rank = self.sampler.micro_batches // self.sampler.world_size
        while step := list(itertools.islice(batches, micro_batches_per_rank)):
            yield step


class EvalLoader:
    """This rank's batches of an evaluation set; all ranks together see every image once.

    The set is cut into batches before they are dealt to the ranks. An image is thus in the same
    batch, with the same rounding, on any number of ranks. Ranks may have different numbers of
    batches, and no image is repeated to even them out.
    """

    def __init__(
        self, dataset: EvalSet, *, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
    ):
        self.dataset = dataset
        workers = min(workers, usable_cpus())
        check_worker_limits(workers)
        to_load: list[range] = []  # filled below, after the workers have started
        self.loader = DataLoader(
            dataset,
            batch_sampler=to_load,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=ignore_stop_signals,
        )
        # Start the workers now, while this process is small and there is nothing to load yet.
        # Forked later, they would cost a copy of every page of activations that training touches.
        iter(self.loader)
        cut = [
            range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)
        ]
        to_load += cut[rank::world_size]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.loader)

    def file_name(self, index: int) -> str:
        return self.dataset.source.file_name(index)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images on any device to the network's input, see data.transforms.normalise."""
        return normalise(images)


def check_worker_limits(workers: int) -> None:
    """Raise UserError where the machine's limits are too low for this many loader workers."""
    if workers == 0:
        return
    # Open files: raise the soft limit as far as it is needed and allowed.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 64 + FILES_PER_WORKER * workers
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"{workers} loader workers need about {needed} open files and the limit is {hard}: "
                f"raise it with ulimit -n {needed}, or use fewer --workers (0 needs none)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    # Shared memory: a worker that runs out of it is killed without a word.
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < workers * 2**20:
            raise UserError(
                f"{SHARED_MEMORY} has {free / 2**20:.1f} MB free, too little for {workers} loader "
                "workers: start the container with a larger --shm-size (or --ipc=host), or use "
                "--workers 0"
            )
