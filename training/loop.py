"""The training loop that both scripts share: steps, epochs, checkpoints and stops."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass

from tqdm import tqdm

from common.errors import Diverged, Preempted, UserError
from common.files import write_atomic
from training.checkpoint import (
    BEST,
    LATEST,
    Checkpointer,
    TrainState,
    copy_to_host,
    find_nonfinite,
    recover_best,
)
from training.engine import EvalMetrics, Evaluator, Trainer
from training.monitoring import (
    UnreadableImages,
    max_unreadable,
    report_gradient_spike,
    report_rising_loss,
    summarise_gradients,
)
from training.preemption import StopRequest
from training.run_dir import RunDir

READ_SECONDS = {"cpu": 1.0, "cuda": 10.0}  # between readings of the loss: each waits for the GPU
SAVE_BEFORE_VALIDATION = 60.0  # seconds since the last save: a stop may come in a long validation


@dataclass
class TrainLoop:
    """Trains from any state to the last epoch; `fit` runs on all ranks alike."""

    trainer: Trainer
    loader: object  # data.loading.TrainLoader
    evaluator: Evaluator
    _: KW_ONLY
    lr_schedule: Callable[[int], float]  # global step -> learning rate
    epochs: int
    run_dir: RunDir
    stop: StopRequest
    resume_command: str
    loggers: Iterable[Callable[[list[dict]], None]] = ()  # called with the history after each epoch
    extra_columns: Callable[[], dict] = dict  # for the log, read at the end of each epoch
    save_seconds: float = 900.0
    validate_every: int = 1  # epochs from one validation to the next; the last always has one
    # Refuse to resume a run whose best.pt is missing, instead of letting a later epoch be the best.
    needs_best: bool = False

    def __post_init__(self):
        self.context = self.trainer.context
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.checkpointer = Checkpointer(self.run_dir.path)
        self.saved_at = time.monotonic()
        self.unreadable = UnreadableImages(self.loader.file_name, self.run_dir)
        self.diverged = False

    def fit(self, state: TrainState) -> None:
        """Train until `epochs` epochs are finished. Raises Preempted, Diverged or UserError."""
        # The state, and the checkpoints of it on disk.
        self.start(state)
        if state.step:  # a new branch, or a run that lost its latest.pt, gets it now
            self.ensure_saved(state)
        if self.context.is_main:
            self.restore_best(state)
            self.run_dir.write_status("running")

        # A run that is finished, but not validated.
        if state.epoch >= self.epochs and "val_top1" not in state.history[-1]:
            self.complete_last_epoch(state)

        # The epochs.
        self.log_history(state)
        steps = self.loader.steps(state.step, self.epochs * self.steps_per_epoch)
        while state.epoch < self.epochs:
            self.train_epoch(state, steps)
            self.end_epoch(state, self.validate(state) if self.is_validated(state) else None)
        self.finish(state)

    def start(self, state: TrainState) -> None:
        """Restore this rank's loss sums, and the files that rank 0 has named as unreadable."""
        self.trainer.set_loss(*state.loss_sum_of(self.context.rank, self.context.world_size))
        if self.context.is_main:
            self.unreadable.files = set(state.unreadable)

    def restore_best(self, state: TrainState) -> None:
        """Check that best.pt belongs to the best epoch; if not, let a later epoch be the best.

        Raises UserError instead if `needs_best`.
        """
        if recover_best(self.run_dir.path, state):
            return
        best = self.run_dir.path / BEST
        problem = f"{best} is missing, damaged or not of epoch {state.best_epoch}, the best one"
        if self.needs_best:
            raise UserError(f"{problem}: start again with --overwrite")
        if state.epoch < self.epochs:
            print(f"warning: {problem}: that will be the best of the next epochs")
            state.best_epoch = 0

    def log_history(self, state: TrainState) -> None:
        """Write the state's history as log.jsonl and to the loggers, on rank 0."""
        if self.context.is_main:
            self.run_dir.write_log(state.history)
            for log in self.loggers:
                log(state.history)

    # ------------------------------------------------------------------ an epoch

    def train_epoch(self, state: TrainState, steps: Iterator[list]) -> None:
        """Train the rest of the epoch in progress."""
        seconds_before, started = state.seconds, time.monotonic()
        next_reading = started + READ_SECONDS[self.context.device.type]
        with self.open_progress_bar(state) as bar:
            while self.step_in_epoch(state) < self.steps_per_epoch:
                # This rank's micro-batches of the step.
                asked = time.monotonic()
                batches = next(steps)
                state.data_wait += time.monotonic() - asked
                self.unreadable.collect(batches, state.epoch + 1)

                # All ranks together: stop? diverged? save?
                self.check_in(state)

                # The step itself.
                self.trainer.step(batches, step=state.step, lr=self.lr_schedule(state.step))
                state.step += 1
                state.seconds = seconds_before + time.monotonic() - started

                # The progress line.
                bar.update()
                if time.monotonic() > next_reading:
                    self.read_progress(state, bar)
                    next_reading = time.monotonic() + READ_SECONDS[self.context.device.type]
            self.read_progress(state, bar)
        self.check_in(state, SAVE_BEFORE_VALIDATION if self.is_validated(state) else math.inf)

    def is_validated(self, state: TrainState) -> bool:
        """Whether the epoch in progress ends with a validation."""
        epoch = state.epoch + 1
        return epoch % self.validate_every == 0 or epoch == self.epochs

    def validate(self, state: TrainState) -> EvalMetrics:
        """Exact counts over all ranks.

        Raises UserError where an image cannot be decoded, Diverged where the loss is not finite.
        """
        metrics = self.evaluator.run(self.trainer.model)
        if metrics.unreadable:
            self.save(state)
            self.ensure_saved(state)
            raise UserError(
                f"{len(metrics.unreadable)} validation images cannot be decoded, and an "
                "evaluation uses every image: restore the files and run the same command again: "
                + ", ".join(metrics.unreadable)
            )
        if metrics.has_diverged(self.trainer.precision):
            self.raise_diverged(state, "the validation loss is not finite")
        if not math.isfinite(metrics.loss_sum) and self.context.is_main:
            print(f"warning: fp16 overflowed on {metrics.overflowed} validation images")
        return metrics

    def complete_last_epoch(self, state: TrainState) -> None:
        """Validate the last epoch now: a resume with fewer --epochs can end where none was due."""
        state.history[-1].update(self.validate(state).as_row("val"))
        self.save(state, best=state.update_best())
        if self.context.is_main:
            print(describe_row(state.history[-1]))

    def end_epoch(self, state: TrainState, metrics: EvalMetrics | None) -> None:
        """Turn the epoch's sums into a row of the log, save, and report what is unusual.

        The row: train_loss, the mean; val_loss, the mean, val_top1 and val_top5, percent;
        images_per_s, of training; data_wait, its share of the training time; seconds, of training
        and validation; grad_norm and grad_norm_max, the median and the maximum before clipping.
        """
        # The row.
        state.grad_norms += self.trainer.read_grad_norms()
        loss_sum, num_images = self.context.sum(list(self.trainer.read_loss()))
        row = {
            "epoch": state.epoch + 1,
            "lr": self.trainer.lr,
            "train_loss": loss_sum / num_images,
            **(metrics.as_row("val") if metrics else {}),
            "images_per_s": round(num_images / state.seconds, 1),
            "data_wait": round(state.data_wait / state.seconds, 4),
            "seconds": round(state.seconds + (metrics.seconds if metrics else 0), 2),
            **summarise_gradients(state.grad_norms),
            **self.extra_columns(),
        }
        if self.context.is_main:
            report_gradient_spike(state.grad_norms, row, self.steps_per_epoch, self.run_dir)
            report_rising_loss(state, row, self.run_dir)

        # The next epoch starts from zero.
        is_best = state.end_epoch(row)
        self.trainer.set_loss(0.0, 0)
        self.unreadable.files.clear()
        self.save(state, best=is_best)

        # The log.
        self.log_history(state)
        if self.context.is_main:
            print(describe_row(row))

    def finish(self, state: TrainState) -> None:
        """Make sure that the last checkpoints are on disk."""
        self.ensure_saved(state)
        best, latest = self.run_dir.path / BEST, self.run_dir.path / LATEST
        if self.context.is_main and not best.exists():
            print(f"warning: {best} is missing: the last epoch takes its place")
            write_atomic(best, latest.read_bytes())
            state.best_epoch = state.epoch

    # ------------------------------------------------------------------ what is reported

    def open_progress_bar(self, state: TrainState) -> tqdm:
        return tqdm(
            total=self.steps_per_epoch,
            initial=self.step_in_epoch(state),
            unit="step",
            desc=f"epoch {state.epoch + 1}/{self.epochs}",
            leave=False,
            disable=None if self.context.is_main else True,
        )

    def read_progress(self, state: TrainState, bar: tqdm) -> None:
        """Show the running loss. Apart from saves, only this waits for the device."""
        loss_sum, num_images = self.trainer.read_loss()
        state.grad_norms += self.trainer.read_grad_norms()
        self.diverged |= self.trainer.has_diverged(loss_sum)
        rate = num_images * self.context.world_size / max(1e-9, state.seconds)
        bar.set_postfix_str(
            f"loss {loss_sum / max(1, num_images):.3f}, "
            f"lr {self.trainer.lr:.4g}, {rate:.0f} images/s"
        )

    # ------------------------------------------------------------------ saves and stops

    def check_in(self, state: TrainState, save_after: float = math.inf) -> None:
        """Let all ranks know of a stop request, a diverged loss, unreadable images or a due save.

        They then act on it together. A save is due after save_seconds, or after `save_after`
        seconds if that is less.
        """
        seconds = min(self.save_seconds, save_after)
        is_due = self.context.is_main and time.monotonic() - self.saved_at > seconds
        files, lost = self.unreadable.files, self.unreadable.lost
        stop, diverged, is_due, unreadable, any_lost = self.context.sum(
            [self.stop.requested, self.diverged, is_due, len(files), lost is not None]
        )
        if diverged:
            self.raise_diverged(state, "the loss is not finite")
        if any_lost:
            self.save(state)
            self.ensure_saved(state)
            name = next(filter(None, self.context.gather(lost)))
            raise UserError(
                f"{name} cannot be decoded, nor can any other image of its class: restore the "
                "files and run the same command again"
            )
        if unreadable > max_unreadable(state.num_images):
            self.stop_if_too_many_unreadable(state)
        if stop:
            self.save_and_exit(state)
        if is_due:
            self.save(state)

    def save(self, state: TrainState, *, best: bool = False) -> None:
        """Save a checkpoint of this moment, on all ranks together."""
        # What each rank knows.
        state.loss_sums = self.context.gather(list(self.trainer.read_loss()))
        state.grad_norms += self.trainer.read_grad_norms()
        state.unreadable = self.gather_unreadable()

        # Rank 0 copies the tensors, checks them, and starts writing.
        bad, error = None, None
        if self.context.is_main:
            tensors = copy_to_host(self.trainer.state_dict())
            bad = find_nonfinite({name: tensors[name] for name in ("model", "optimizer")})
            try:
                if bad is None:
                    warning = self.checkpointer.save(state.to_dict(tensors), best=best)
                    if warning:
                        print(warning)
            except UserError as failure:
                error = failure

        # The others learn how it went.
        is_bad, is_failed = self.context.max([bad is not None, error is not None])
        if is_bad:
            self.raise_diverged(state, f"{bad or 'a tensor'} is not finite")
        if is_failed:
            raise error or UserError(f"rank 0 could not write to {self.run_dir.path}")
        self.saved_at = time.monotonic()

    def save_and_exit(self, state: TrainState) -> None:
        self.save(state)
        self.ensure_saved(state)
        message = f"preempted, {self.position(state)}, resume with: {self.resume_command}"
        if self.context.is_main:
            self.run_dir.write_status(
                "preempted",
                epoch=state.epoch + 1,
                step=self.step_in_epoch(state),
                message=message,
                resume=self.resume_command,
            )
        self.context.barrier()  # torchrun ends the others as soon as one rank leaves
        raise Preempted(message)

    def raise_diverged(self, state: TrainState, what: str) -> None:
        self.join_save()
        position, lr = self.position(state), self.trainer.lr
        message = f"{what} at {position}, learning rate {lr:.4g}: use a smaller --lr"
        latest = self.run_dir.path / LATEST
        if latest.exists():
            message += f" ({latest} predates this)"
        raise Diverged(message)

    def gather_unreadable(self) -> list[str]:
        """The files that any rank could not decode in this epoch, each once."""
        return sorted(set().union(*self.context.gather(self.unreadable.files)))

    def stop_if_too_many_unreadable(self, state: TrainState) -> None:
        names = self.gather_unreadable()  # two ranks may have met the same file
        if len(names) <= max_unreadable(state.num_images):
            return
        self.unreadable.files.clear()  # once they are restored, the resumed run counts from zero
        self.save(state)
        self.ensure_saved(state)
        raise UserError(
            f"{len(names)} training images cannot be decoded, too many to replace: restore the "
            f"files and run the same command again: {', '.join(names)}"
        )

    def ensure_saved(self, state: TrainState) -> None:
        """Wait until the state is on disk; a write that failed is tried once more, on all ranks."""
        is_unsaved = False
        if self.context.is_main:  # latest.pt is missing where a finished run got a new folder
            is_unsaved = self.join_save() or not (self.run_dir.path / LATEST).exists()
        if not self.context.max([is_unsaved])[0]:
            return
        self.save(state)
        error = None
        try:
            self.checkpointer.join(required=True)
        except UserError as failure:
            error = failure
        if self.context.max([error is not None])[0]:
            raise error or UserError(f"rank 0 could not write to {self.run_dir.path}")

    def join_save(self) -> bool:
        """Wait for the checkpoint being written; True, and a warning, if it failed."""
        warning = self.checkpointer.join()
        if warning:
            print(warning)
        return warning is not None

    def step_in_epoch(self, state: TrainState) -> int:
        return state.step - state.epoch * self.steps_per_epoch

    def position(self, state: TrainState) -> str:
        if self.step_in_epoch(state) == 0 and state.epoch:
            return f"the end of epoch {state.epoch}"
        return f"epoch {state.epoch + 1} step {self.step_in_epoch(state)}"


def describe_row(row: dict) -> str:
    """The line of a finished epoch."""
    gradient = ""
    if "grad_norm" in row:
        gradient = f"grad norm {row['grad_norm']:.3g} (max {row['grad_norm_max']:.3g}), "
    validation = ""
    if "val_top1" in row:
        validation = (
            f"val_acc {row['val_top1']:.1f}, top-5 {row['val_top5']:.1f}, "
            f"val_loss {row['val_loss']:.3f}, "
        )
    return (
        f"Epoch {row['epoch']}: {validation}train_loss {row['train_loss']:.3f}, {gradient}"
        f"lr {row['lr']:.4g}, {row['images_per_s']:.0f} images/s, "
        f"{100 * row['data_wait']:.0f} % of the time waiting for data, {row['seconds']:.0f} s"
    )
