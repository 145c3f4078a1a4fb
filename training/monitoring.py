"""Problems that are reported but do not stop a run: gradient spikes, a rising loss, bad files."""

import statistics
from math import isfinite

from common.errors import REPLACED, UNREADABLE
from training.checkpoint import BEST, TrainState
from training.run_dir import RunDir

GRADIENT_SPIKE = 20  # times the epoch's median gradient norm
LOSS_HAD_FALLEN = 0.8  # of the first epoch's loss: only a run that was below it can have broken
MAX_UNREADABLE, MAX_UNREADABLE_SHARE = 10, 0.001  # training images per epoch


def summarise_gradients(norms: list[float]) -> dict[str, float]:
    """Median and maximum of an epoch's gradient norms, as columns of the log.

    Steps that fp16 skipped have infinite norms and do not count.
    """
    finite = [norm for norm in norms if isfinite(norm)]
    if not finite:
        return {}
    return {"grad_norm": statistics.median(finite), "grad_norm_max": max(finite)}


def report_gradient_spike(norms: list[float], row: dict, steps: int, run_dir: RunDir) -> None:
    """Warn where the largest gradient norm of an epoch of `steps` steps stands out."""
    median, largest = row.get("grad_norm", 0.0), row.get("grad_norm_max", 0.0)
    if median == 0 or largest <= GRADIENT_SPIKE * median:
        return
    step = steps - len(norms) + norms.index(largest) + 1  # older checkpoints lack the first steps
    print(
        f"warning: epoch {row['epoch']} step {step}: gradient norm {largest:.4g}, "
        f"{largest / median:.0f} times the epoch's median {median:.4g}"
    )
    run_dir.log_event(
        "gradient_spike", epoch=row["epoch"], step=step, grad_norm=largest, median=median
    )


def report_rising_loss(state: TrainState, row: dict, run_dir: RunDir) -> None:
    """Warn when the training loss rises above the first epoch's after it had fallen well below.

    `row` is the epoch that has just ended; state.history does not have it yet.
    """
    losses = [old["train_loss"] for old in state.history]
    if not losses or min(losses) >= LOSS_HAD_FALLEN * losses[0]:
        return
    if not losses[-1] <= losses[0] < row["train_loss"]:
        return
    best, advice = None, ""
    if state.best_epoch:
        best = str(run_dir.path / BEST)
        advice = f". The last good checkpoint is {best} of epoch {state.best_epoch}"
    print(
        f"warning: the training loss of epoch {row['epoch']}, {row['train_loss']:.3f}, is above "
        f"that of the first epoch, {losses[0]:.3f}, although it had been {min(losses):.3f}: the "
        f"run may have broken{advice}; training continues"
    )
    run_dir.log_event(
        "training_loss_rose",
        epoch=row["epoch"],
        train_loss=row["train_loss"],
        first_loss=losses[0],
        lowest_loss=min(losses),
        checkpoint=best,
        checkpoint_epoch=state.best_epoch,
    )


class UnreadableImages:
    """The training files of one epoch that this rank could not decode, each counted once."""

    def __init__(self, file_name, run_dir: RunDir):
        self.file_name, self.run_dir = file_name, run_dir
        self.files: set[str] = set()
        self.warned: set[str] = set()  # by this process, in any epoch
        self.lost: str | None = None  # a file in whose place there is none

    def collect(self, batches: list, epoch: int) -> None:
        """Note the files that the loader replaced, and one for which it found no replacement."""
        for batch in batches:
            if not batch.broken.any():
                continue
            for index in batch.index[batch.broken == REPLACED].tolist():
                self._report(self.file_name(index), epoch)
            for index in batch.index[batch.broken == UNREADABLE].tolist():
                self.lost = self.file_name(index)

    def _report(self, name: str, epoch: int) -> None:
        if name in self.files:  # a recipe with repeats draws an image several times
            return
        self.files.add(name)
        self.run_dir.log_event("unreadable_image", file=name, epoch=epoch)
        if name not in self.warned:
            self.warned.add(name)
            print(f"warning: {name} cannot be decoded: another image of its class takes its place")


def max_unreadable(num_images: int) -> float:
    """How many files of a training set may be replaced in an epoch before the run stops."""
    return max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * num_images)
