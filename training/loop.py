"""A run from its first step, or from any other, to its last: steps, epochs, saves and stops."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from common.errors import Diverged, Preempted, UserError
from training.checkpoint import ALLOWED_FAILURES, LATEST, Checkpoints, first_nonfinite
from training.engine import Score, Trainer
from training.preemption import StopRequest
from training.run_dir import Folder

SHOW_SECONDS = 1.0  # how often the loss is read back, which waits for the device
ALLOWED_BROKEN, ALLOWED_BROKEN_SHARE = 10, 0.001  # unreadable training images, of an epoch


@dataclass
class Progress:
    """How far a run is. The epoch in progress is the one after the finished rows."""

    step: int = 0  # global, over the whole run
    rows: list[dict] = field(default_factory=list)  # finished epochs, as log.jsonl has them
    sums: list[list[float]] = field(default_factory=list)  # by rank: this epoch's loss, images
    clock: list[float] = field(default_factory=lambda: [0.0, 0.0])  # its seconds; those waiting
    broken: list[str] = field(default_factory=list)  # its unreadable images, of all ranks

    @property
    def best(self) -> dict | None:
        """The row of the best validation accuracy, the first one of equals."""
        return max(self.rows, key=lambda row: row["val_top1"], default=None)


def restore(trainer: Trainer, state: dict) -> Progress:
    """Put a checkpoint's tensors into `trainer`. UserError where they do not fit its network."""
    try:
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        return Progress(
            state["step"], state["rows"], state["sums"], state["clock"], state.get("broken", [])
        )  # which the first checkpoints do not hold
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit this run: {error}") from error


@dataclass
class Run:
    """Everything a run is made of; `fit` carries it through, on all ranks alike."""

    trainer: Trainer
    progress: Progress
    folder: Folder
    stop: StopRequest
    steps_from: Callable[[int], Iterator]  # from a step on: this rank's micro-batches of each
    validate: Callable[[Callable[[], None]], Score]  # calls what it is given between batches
    lr_of: Callable[[int], float]
    epochs: int
    steps_per_epoch: int
    frozen: dict  # what a checkpoint holds besides: config, classes, number of images
    name_of: Callable[[int], str]  # the file of a training image
    resume_with: str  # the command that continues this run
    extra_row: Callable[[], dict] = dict  # more columns for the log
    follow: Callable[[list[dict]], None] = lambda rows: None  # is shown the log as it grows
    save_seconds: float = 900.0

    def __post_init__(self):
        self.world = self.trainer.world
        self.checkpoints = Checkpoints(self.folder.path)
        self.saved_at = time.monotonic()
        self.broken: list[str] = []  # unreadable images that this rank met in this epoch
        self.warned: set[str] = set()  # those that were named, once in this process
        self.diverged = False

    @property
    def epoch(self) -> int:
        """The epoch in progress, from 1."""
        return len(self.progress.rows) + 1

    @property
    def step_in_epoch(self) -> int:
        return self.progress.step - (self.epoch - 1) * self.steps_per_epoch

    # ------------------------------------------------------------------ epochs and steps

    def fit(self) -> None:
        """Train until `epochs` rows are finished. Raises Preempted, Diverged or UserError."""
        if self.world.main:
            self.folder.write_log(self.progress.rows)
            self.follow(self.progress.rows)
            self.folder.status("running")
        self._restore_sums()
        self.steps = self.steps_from(self.progress.step)
        while len(self.progress.rows) < self.epochs:
            self._train_epoch()
            validating = time.monotonic()
            score = self.validate(self._agree)
            if score.unreadable:
                self.save()
                raise UserError(
                    f"{len(score.unreadable)} validation images cannot be read, and are "
                    "never replaced: restore them, then resume: " + ", ".join(score.unreadable)
                )
            self._finish_epoch(score, time.monotonic() - validating)
        if self.world.max([self.checkpoints.failures])[0]:
            # The best epoch is about to be read back, or the last to be exported: now or never.
            self.checkpoints.failures = ALLOWED_FAILURES - 1
            self.save()

    def _restore_sums(self) -> None:
        """Each rank goes on with its own sums; another number of ranks with rank 0 holding all.

        The epoch's unreadable images are summed over the ranks alone: rank 0 holds them.
        """
        self.broken = list(self.progress.broken) if self.world.main else []
        if len(self.progress.sums) == self.world.size:
            mine = self.progress.sums[self.world.rank]
        else:
            total = [math.fsum(column) for column in zip(*self.progress.sums, strict=True)]
            mine = total if total and self.world.main else [0.0, 0.0]
        self.trainer.sums = mine

    def _train_epoch(self) -> None:
        progress = self.progress
        seconds, waited = progress.clock
        started = shown = time.monotonic()
        with tqdm(
            total=self.steps_per_epoch,
            initial=self.step_in_epoch,
            unit="step",
            desc=f"epoch {self.epoch}/{self.epochs}",
            leave=False,
            disable=None if self.world.main else True,
        ) as bar:
            while self.step_in_epoch < self.steps_per_epoch:
                self._agree()
                asked = time.monotonic()
                batches = next(self.steps)
                waited += time.monotonic() - asked
                for batch in batches:
                    self._note_broken(batch)
                self.trainer.step(batches, step=progress.step, lr=self.lr_of(progress.step))
                progress.step += 1
                progress.clock = [seconds + time.monotonic() - started, waited]
                bar.update()
                if time.monotonic() - shown > SHOW_SECONDS:
                    shown = time.monotonic()
                    self._show(bar)
            self._show(bar)
        self._agree()

    def _show(self, bar: tqdm) -> None:
        """Read the running loss: the one wait for the device between two saves."""
        loss, images = self.trainer.sums
        self.diverged |= not self.trainer.is_finite()
        rate = images * self.world.size / max(1e-9, self.progress.clock[0])
        bar.set_postfix_str(
            f"loss {loss / max(1, images):.3f}, "
            f"lr {self.lr_of(self.progress.step - 1):.4g}, {rate:.0f} images/s"
        )

    def _finish_epoch(self, score: Score, validation_seconds: float) -> None:
        progress = self.progress
        loss, images = self.world.sum(self.trainer.sums)
        where = self._where()
        seconds, waited = progress.clock
        best_before = progress.best
        row = {
            "epoch": self.epoch,
            "lr": self.lr_of(progress.step - 1),
            "train_loss": loss / images,
            **score.row("val"),
            "images_per_s": round(images / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "seconds": round(seconds + validation_seconds, 2),
            **self.extra_row(),
        }
        progress.rows.append(row)
        progress.clock = [0.0, 0.0]
        self.trainer.sums = [0.0, 0.0]
        self.broken.clear()
        best = best_before is None or row["val_top1"] > best_before["val_top1"]
        self.save(best=best, where=where)
        if self.world.main:
            self.folder.write_log(progress.rows)
            self.follow(progress.rows)
            print(
                f"Epoch {row['epoch']}: val_acc {row['val_top1']:.1f}, top-5 "
                f"{row['val_top5']:.1f}, val_loss {row['val_loss']:.3f}, train_loss "
                f"{row['train_loss']:.3f}, lr {row['lr']:.4g}, {row['images_per_s']:.0f} "
                f"images/s, {100 * row['data_wait']:.0f} % of it waiting for data, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )

    def _note_broken(self, batch) -> None:
        if not batch.broken.any():
            return
        for index in batch.index[batch.broken == 1].tolist():
            name = self.name_of(index)
            self.broken.append(name)
            self.folder.event("unreadable_image", file=name, epoch=self.epoch)
            if name not in self.warned:
                self.warned.add(name)
                print(
                    f"warning: {name} cannot be read as an image: another of its class takes "
                    "its place",
                    flush=True,
                )
        for index in batch.index[batch.broken == 2].tolist():
            raise UserError(
                f"{self.name_of(index)} cannot be read as an image, nor can any other "
                "of its class: restore the files, then resume"
            )

    # ------------------------------------------------------------------ saves and stops

    def _agree(self) -> None:
        """Where all ranks learn what one of them met: a signal, a loss that is not finite, …"""
        due = self.world.main and time.monotonic() - self.saved_at > self.save_seconds
        stop, diverged, due, broken = self.world.sum(
            [bool(self.stop), self.diverged, due, len(self.broken)]
        )
        if diverged:
            self._fail("the loss is not finite")
        if broken > max(ALLOWED_BROKEN, ALLOWED_BROKEN_SHARE * self.frozen["images"]):
            names = sorted(name for names in self.world.gather(self.broken) for name in names)
            self.save()
            raise UserError(
                f"{len(names)} training images cannot be read, too many to replace: "
                f"restore them, then resume: {', '.join(names)}"
            )
        if stop:
            self._leave()
        if due:
            self.save()

    def save(self, *, best: bool = False, where: str = "") -> None:
        """Write a checkpoint of this moment; on all ranks together."""
        sums = self.world.gather(self.trainer.sums)
        broken = sorted(name for names in self.world.gather(self.broken) for name in names)
        error, bad = None, None
        if self.world.main:
            state = {
                **self.frozen,
                "model": self.trainer.model.state_dict(),
                "optimizer": self.trainer.optimizer.state_dict(),
                "scaler": self.trainer.scaler.state_dict(),
                "step": self.progress.step,
                "rows": self.progress.rows,
                "sums": sums,
                "clock": self.progress.clock,
                "broken": broken,
            }
            bad = first_nonfinite({name: state[name] for name in ("model", "optimizer")})
            try:
                warning = None if bad else self.checkpoints.save(state, best=best)
            except UserError as failure:
                error, warning = failure, None
            if warning:
                print(warning, flush=True)
        not_finite, not_written = self.world.max([bad is not None, error is not None])
        if not_finite:
            self._fail(f"{bad or 'a tensor'} is not finite", where)
        if not_written:
            raise error or UserError(f"rank 0 could not write to {self.folder.path}")
        self.saved_at = time.monotonic()

    def check_stop(self) -> None:
        """Leave when asked to, where nothing has to be saved."""
        if self.stop:
            message = f"preempted in the test, resume with: {self.resume_with}"
            self.folder.status("preempted", message=message, resume=self.resume_with)
            raise Preempted(message)

    def _where(self) -> str:
        return f"epoch {self.epoch} step {self.step_in_epoch}"

    def _fail(self, what: str, where: str = "") -> None:
        message = (
            f"{what} at {where or self._where()}, learning rate "
            f"{self.lr_of(max(0, self.progress.step - 1)):.4g}: use a smaller --lr"
        )
        latest = self.folder.path / LATEST
        if latest.exists():
            message += f" ({latest} is from before)"
        if self.world.main:
            self.folder.status("diverged", message=message)
        raise Diverged(message)

    def _leave(self) -> None:
        self.save()
        message = f"preempted, {self._where()}, resume with: {self.resume_with}"
        if self.world.main:
            self.folder.status(
                "preempted",
                epoch=self.epoch,
                step=self.step_in_epoch,
                message=message,
                resume=self.resume_with,
            )
        self.world.barrier()  # torchrun ends the others as soon as one rank leaves
        raise Preempted(message)
