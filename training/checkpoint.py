"""Checkpoints that are whole or absent: written atomically, checked before they are believed."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import torch

from common.errors import UserError
from common.files import replace_by_link, sync_folder, write_atomic

LATEST, BEST, PREVIOUS = "latest.pt", "best.pt", "latest.prev.pt"
ALLOWED_FAILURES = 3


def serialise(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def first_nonfinite(state: object, name: str = "") -> str | None:
    """The name of the first floating-point tensor in nested dicts and lists that has NaN or inf."""
    if isinstance(state, torch.Tensor):
        return name if state.is_floating_point() and not bool(state.isfinite().all()) else None
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return None
    found = (first_nonfinite(value, f"{name}.{key}" if name else str(key)) for key, value in items)
    return next((bad for bad in found if bad), None)


class Checkpoints:
    """latest.pt, its predecessor and best.pt of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures = 0
        self.trusted = False  # whether latest.pt is known to be whole
        self.owed: bytes | None = None  # the best epoch's checkpoint, until best.pt holds it

    def save(self, state: dict, *, best: bool) -> str | None:
        """Make `state` latest.pt, and best.pt too if it is; a warning where that failed, else None.

        A failed save leaves the files as they were, and a best.pt that it owed is written by the
        next one. The third in a row is a UserError.
        """
        latest = self.folder / LATEST
        fresh = self.folder / f".{LATEST}.new"
        content = serialise(state)
        if best:
            self.owed = content
        try:
            write_atomic(fresh, content)
            # First, so that latest.pt never speaks of a best epoch that best.pt does not hold.
            if best:
                replace_by_link(fresh, self.folder / BEST)
            elif self.owed is not None:
                write_atomic(self.folder / BEST, self.owed)
            self.owed = None
            if latest.exists() and (self.trusted or _is_whole(latest)):
                replace_by_link(latest, self.folder / PREVIOUS)
            os.replace(fresh, latest)
            sync_folder(self.folder)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            self.failures += 1
            reason = f"the checkpoint could not be written to {self.folder} ({error.strerror})"
            if self.failures >= ALLOWED_FAILURES:
                raise UserError(
                    f"{reason}, {self.failures} times in a row: free space there, then "
                    f"resume from {latest}"
                ) from error
            return f"warning: {reason}; {LATEST} is still the one before, training goes on"
        self.failures, self.trusted = 0, True
        return None


def load_checkpoint(path: Path) -> tuple[dict, str | None]:
    """The checkpoint at `path`, or its predecessor with a line that says so when it is damaged.

    Raises UserError when neither can be used. Nothing in a file is ever executed.
    """
    if not path.exists() and not (path.name == LATEST and path.with_name(PREVIOUS).exists()):
        raise UserError(f"--resume {path}: no such file")
    try:
        return _read(path), None
    except _Damaged as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LATEST or not previous.exists():
            raise UserError(f"{path} {error}") from error
        try:
            return _read(previous), f"warning: {path} {error}; going on from {previous}"
        except _Damaged as older:
            raise UserError(
                f"{path} {error}, and {previous} {older}: nothing was overwritten; "
                "--overwrite sets both aside and starts anew"
            ) from older


def _is_whole(path: Path) -> bool:
    try:
        return bool(_read(path))
    except (_Damaged, UserError):
        return False


class _Damaged(Exception):
    pass


_KEYS = {
    "model",
    "optimizer",
    "scaler",
    "step",
    "sums",
    "clock",
    "rows",
    "config",
    "classes",
    "images",
}


def _read(path: Path) -> dict:
    try:
        # torch.save writes a CRC a record that torch.load does not look at.
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError as error:
        raise _Damaged(f"cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever zipfile's parser met in a file that is none of its own
        raise _Damaged("is damaged or no checkpoint at all") from error
    if bad:
        raise _Damaged(f"is damaged (record {bad} fails its checksum)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, numbers and text, and was not "
            "loaded: such a file can run code"
        ) from error
    except Exception as error:  # the unpickler raises whatever a senseless pickle led it to
        raise _Damaged(f"cannot be loaded ({type(error).__name__})") from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path} is no checkpoint of a run (a weights file cannot be resumed)")
    return state
