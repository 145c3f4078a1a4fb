"""Checkpoints: what is in them, written atomically, verified on load, one predecessor kept."""

import errno
import io
import math
import os
import pickle
import threading
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from common.errors import UserError, is_transient
from common.files import replace_by_link, sync_folder, write_atomic

LATEST, BEST, PREVIOUS = "latest.pt", "best.pt", "latest.prev.pt"
FRESH_LATEST, FRESH_BEST = ".latest.pt.new", ".best.pt.new"  # until they are complete
MAX_FAILURES = 3  # failed saves in a row, on a full disk say, that end the run
TENSORS = ("model", "optimizer", "scaler")  # a checkpoint's state dicts, see Trainer.state_dict


@dataclass
class TrainState:
    """Everything in a checkpoint but the tensors: what the run is, and its progress.

    A checkpoint is one flat dictionary: these fields, and the state dicts `model`, `optimizer` and
    `scaler` (see Trainer.state_dict). It has no state of random generators: draws depend only on
    seed, epoch, step and index.
    """

    config: dict  # recipe and flags: what makes two runs the same run
    classes: list[str]
    num_images: int  # in the training set
    data_digest: str | None = None  # of the training set's file names; old checkpoints lack it
    weights: dict | None = None  # the pretrained weights that a fine-tuning started from
    step: int = 0  # global steps trained
    epoch: int = 0  # epochs finished; the one in progress is the next
    history: list[dict] = field(default_factory=list)  # one row per finished epoch, as in log.jsonl
    best_epoch: int = 0  # the epoch whose state best.pt holds; 0: none yet
    # of the epoch in progress
    loss_sums: list[list[float]] = field(default_factory=list)  # by rank: summed loss, images
    grad_norms: list[float] = field(default_factory=list)  # by step
    seconds: float = 0.0  # of training so far
    data_wait: float = 0.0  # of these, seconds of waiting for the loader
    unreadable: list[str] = field(default_factory=list)  # training images that were replaced

    @property
    def best(self) -> dict | None:
        """The row of the epoch in best.pt."""
        return self.history[self.best_epoch - 1] if self.best_epoch else None

    def loss_sum_of(self, rank: int, world_size: int) -> list[float]:
        """Summed loss and number of images that a rank starts from.

        If the number of ranks has changed, rank 0 takes the total.
        """
        if len(self.loss_sums) == world_size:
            return self.loss_sums[rank]
        if rank or not self.loss_sums:
            return [0.0, 0.0]
        return [math.fsum(column) for column in zip(*self.loss_sums, strict=True)]

    def end_epoch(self, row: dict) -> bool:
        """Append a finished epoch's row and start the next one; True if it is the best so far."""
        self.epoch += 1
        self.history.append(row)
        self.seconds, self.data_wait = 0.0, 0.0
        self.loss_sums, self.grad_norms, self.unreadable = [], [], []
        return self.update_best()

    def update_best(self) -> bool:
        """Whether the last epoch has the best validation so far, which best_epoch then names."""
        row = self.history[-1]
        is_best = "val_top1" in row and (
            self.best is None or row["val_top1"] > self.best["val_top1"]
        )
        if is_best:
            self.best_epoch = self.epoch
        return is_best

    def to_dict(self, tensors: dict[str, dict]) -> dict:
        """The content of a checkpoint; `tensors` is the trainer's state_dict."""
        return {**asdict(self), **tensors}

    @classmethod
    def from_dict(cls, content: dict) -> tuple["TrainState", dict[str, dict]]:
        """The state and the tensors of a checkpoint of this or an older version.

        Raises KeyError or TypeError where it is not a checkpoint of a run.
        """
        content = _upgrade(content)
        tensors = {name: content[name] for name in TENSORS}
        return cls(**{f.name: content[f.name] for f in fields(cls)}), tensors


def _upgrade(old: dict) -> dict:
    """Rename the keys of older checkpoints and fill in what they lack."""
    if not isinstance(old, dict):
        raise TypeError(f"a checkpoint is a dict, not {type(old).__name__}")
    if "history" in old:
        return old
    rows = old["rows"]
    best = max(rows, key=lambda row: row["val_top1"], default=None)
    return {
        **{name: old[name] for name in (*TENSORS, "config", "classes", "step")},
        "num_images": old["images"],
        "data_digest": old.get("data"),
        "weights": old.get("weights"),
        "epoch": len(rows),
        "history": rows,
        "best_epoch": best["epoch"] if best else 0,
        "loss_sums": old["sums"],
        "grad_norms": [],
        "seconds": old["clock"][0],
        "data_wait": old["clock"][1],
        "unreadable": old.get("broken", []),
    }


# ---------------------------------------------------------------- tensors


def copy_to_host(state: object) -> object:
    """Copy the tensors in nested dicts and lists to CPU memory, waiting for the device once."""
    copied = _copy_to_host(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy_to_host(state: object) -> object:
    if isinstance(state, torch.Tensor):
        host = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return host.copy_(state, non_blocking=True)
    if isinstance(state, dict):
        return {key: _copy_to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_copy_to_host, state))
    return state


def find_nonfinite(state: object, name: str = "") -> str | None:
    """Name the first floating-point tensor in nested dicts and lists that has NaN or infinity.

    The tensors should be on the CPU: on a GPU each would be waited for.
    """
    if isinstance(state, torch.Tensor):
        bad = state.is_floating_point() and not bool(state.isfinite().all())
        return name if bad else None
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return None
    found = (find_nonfinite(value, f"{name}.{key}" if name else str(key)) for key, value in items)
    return next((bad for bad in found if bad), None)


def serialise(state: dict) -> bytes:
    """torch.save into memory: on a full disk torch.save itself raises what is not an OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- writing


class Checkpointer:
    """Writes latest.pt, its predecessor and best.pt of one folder, in a thread of its own.

    Training continues while a checkpoint is written. Each save first joins the one before, and
    reports if that failed; `join` waits for the last. A failed save leaves the files as they were.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures = 0  # saves in a row that failed
        self.latest_is_verified = False
        self.pending_best: bytes | None = None  # the best epoch's, until best.pt holds it
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the last write

    def save(self, content: dict, *, best: bool) -> str | None:
        """Start writing `content`, whose tensors nobody else changes, as latest.pt.

        If `best`, it becomes best.pt too. Returns a warning if the save before failed; after
        three failures in a row raises UserError.
        """
        warning = self.join()
        self._thread = threading.Thread(target=self._write_guarded, args=(content, best))
        self._thread.start()
        return warning

    def join(self, *, required: bool = False) -> str | None:
        """Wait for the save in progress; returns and raises as `save` does.

        If it is `required`, a single failure raises UserError.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is None:
            self.failures = 0
            return None
        if not isinstance(error, OSError):
            raise error
        self.failures += 1
        reason = f"the checkpoint could not be written to {self.folder} ({error.strerror})"
        if required or self.failures >= MAX_FAILURES:
            raise UserError(
                f"{reason}, {self.failures} times in a row: free space there and run the same "
                "command again"
            ) from error
        return f"warning: {reason}; {LATEST} is still the one before"

    def _write_guarded(self, content: dict, best: bool) -> None:
        try:
            self._write(serialise(content), best)
        except BaseException as error:
            self._error = error

    def _write(self, content: bytes, best: bool) -> None:
        latest, fresh = self.folder / LATEST, self.folder / FRESH_LATEST
        fresh_best = self.folder / FRESH_BEST
        if best:
            self.pending_best = content
        try:
            # Write under temporary names whatever may fail for lack of space.
            write_atomic(fresh, content)
            if self.pending_best is not None:  # no link: whoever copies over one would change both
                write_atomic(fresh_best, self.pending_best)
            # The predecessor is kept only if it is intact.
            if latest.exists() and (self.latest_is_verified or read_epoch(latest) is not None):
                replace_by_link(latest, self.folder / PREVIOUS)
            # Then rename. If the process is killed in between, recover_best does the second half.
            os.replace(fresh, latest)
            if self.pending_best is not None:
                os.replace(fresh_best, self.folder / BEST)
            self.pending_best = None
            sync_folder(self.folder)
        except OSError:
            fresh.unlink(missing_ok=True)
            fresh_best.unlink(missing_ok=True)
            raise
        self.latest_is_verified = True


def recover_best(folder: Path, state: TrainState) -> bool:
    """Whether best.pt is of the state's best epoch, after completing a save that was killed."""
    best, fresh = folder / BEST, folder / FRESH_BEST
    is_completed = fresh.exists() and read_epoch(fresh) == state.best_epoch
    if is_completed:
        os.replace(fresh, best)
    fresh.unlink(missing_ok=True)
    return is_completed or not state.best_epoch or read_epoch(best) == state.best_epoch


def read_epoch(path: Path) -> int | None:
    """Finished epochs of the checkpoint at `path`; None where it is missing or not intact."""
    try:
        return _read(path)[0].epoch
    except (_Damaged, UserError):
        return None


# ---------------------------------------------------------------- reading


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything to resume in a folder."""
    return any((folder / name).exists() for name in (LATEST, PREVIOUS))


def require_checkpoint(path: Path) -> None:
    """Raise UserError unless `path`, or for latest.pt its predecessor, is a file."""
    if path.is_dir():
        raise UserError(f"--resume {path} is a folder: give {path / LATEST}")
    if path.exists() or (path.name == LATEST and path.with_name(PREVIOUS).exists()):
        return
    others = [path.with_name(name) for name in (LATEST, BEST)]
    hint = next((f"; --resume {other} is possible" for other in others if other.exists()), "")
    raise UserError(f"--resume {path}: no such file{hint}")


def load_checkpoint(path: Path) -> tuple[TrainState, dict[str, dict], str | None]:
    """Load the checkpoint at `path`, or its predecessor where it is damaged.

    Returns the state, the tensors (on the CPU) and, if the predecessor was used, a warning.
    Raises UserError when neither can be used. Nothing in the file is executed.
    """
    require_checkpoint(path)
    previous = path.with_name(PREVIOUS)
    try:
        return *_read(path), None
    except _Damaged as error:
        if path.name != LATEST or not previous.exists():
            raise UserError(f"{path} {error}") from error
        try:
            return *_read(previous), f"warning: {path} {error}; resuming from {previous}"
        except _Damaged as older:
            raise UserError(
                f"{path} {error}, and {previous} {older}: nothing was overwritten; --overwrite "
                "archives both and starts again"
            ) from older


def load_tensors(trainer, tensors: dict[str, dict]) -> None:
    """Load a checkpoint's tensors into a training.engine.Trainer; UserError if they do not fit."""
    try:
        trainer.load_state_dict(tensors)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit this run: {error}") from error


class _Damaged(Exception):
    """A file that is damaged, so that its predecessor may be used."""


def _read(path: Path) -> tuple[TrainState, dict[str, dict]]:
    # torch.save writes a CRC for each record, which torch.load does not check.
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError as error:
        if is_transient(error) and error.errno != errno.EIO:  # which is a bad sector, too
            raise
        raise _Damaged(f"cannot be read ({error.strerror})") from error
    except Exception as error:  # zipfile raises many things on files that are not archives
        raise _Damaged("is damaged or not a checkpoint") from error
    if bad:
        raise _Damaged(f"is damaged (record {bad} fails its checksum)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} contains more than tensors, numbers and text, and was not loaded: such a "
            "file can run code"
        ) from error
    except Exception as error:  # the unpickler raises whatever a malformed pickle leads it to
        raise _Damaged(f"cannot be loaded ({type(error).__name__})") from error
    try:
        return TrainState.from_dict(content)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of a run (a weights file cannot be resumed)"
        ) from error
