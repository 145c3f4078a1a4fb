"""A run's folder: its lock, its log, its events, how it ended, and what made it."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
import torchvision

from common.cli import explain_error
from common.errors import Diverged, Preempted
from common.files import (
    ROOT,
    lock_folder,
    read_json,
    remove_temporary_files,
    unused_path,
    write_atomic,
    write_json,
)
from training.checkpoint import BEST, FRESH_LATEST, LATEST, PREVIOUS
from training.results import RESULTS
from training.run_config import CONFIG, LOG

EVENTS, STATUS = "events.jsonl", "status.json"
FILES_OF_A_RUN = (
    *(CONFIG, RESULTS, LOG, EVENTS, STATUS, LATEST, BEST, PREVIOUS, "output.log"),
    *("*_imagenet.pt", "*_imagenet.json", "*_imagenet.*.pt", "*_imagenet.*.json"),
    "events.out.tfevents.*",
)


class RunDir:
    """The folder of one run; `lock` keeps others out until this object or its process is gone."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    def lock(self) -> None:
        """Create and lock the folder, and remove what a killed process left half-written.

        Raises Busy where another process trains there, UserError where it cannot be written.
        """
        self._lock = lock_folder(self.path)
        remove_temporary_files(self.path)
        (self.path / FRESH_LATEST).unlink(missing_ok=True)
        if (read_json(self.path / STATUS) or {}).get("state") == "running":
            # No other process has the lock, and the last one did not say how it ended.
            self.log_event("killed")
            self.write_status("killed")
            self._forget_unsaved()

    def contains_run(self) -> bool:
        """Whether a run has left its configuration, a checkpoint or a finished epoch here."""
        log = self.path / LOG
        names = (CONFIG, RESULTS, LATEST, BEST, PREVIOUS)
        return any((self.path / name).exists() for name in names) or (
            log.exists() and log.read_bytes().strip() != b""
        )

    def archive(self, target: Path) -> None:
        """Move the run's files into the new folder `target`-<time>; others stay."""
        target = unused_path(target.with_name(target.name + time.strftime("-%Y%m%d-%H%M%S")))
        target.mkdir(parents=True)
        for pattern in FILES_OF_A_RUN:
            for entry in self.path.glob(pattern):
                entry.rename(target / entry.name)
        print(f"--overwrite: the old run is now in {target}")

    # ------------------------------------------------------------------ records

    def write_log(self, history: list[dict]) -> None:
        text = "".join(json.dumps(_without_nan(row)) + "\n" for row in history)
        self._write(LOG, lambda path: write_atomic(path, text))

    def log_event(self, kind: str, **details) -> None:
        """Append one line to events.jsonl. Safe on every rank: a line is written at once."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind, **details})

        def append(path: Path) -> None:
            with open(path, "a") as file:
                file.write(line + "\n")

        self._write(EVENTS, append)

    def write_status(self, state: str, **details) -> None:
        self._write(STATUS, lambda path: write_json(path, {"state": state, **details}))

    @contextlib.contextmanager
    def recording_failure(self, *, active: bool = True) -> Iterator[None]:
        """Write into status.json how the block ended if it raises (rank 0 only: `active`)."""
        try:
            yield
        except Preempted:
            raise  # its status says how to resume
        except BaseException as error:
            if active:
                state = "diverged" if isinstance(error, Diverged) else "failed"
                line, _ = explain_error(error) or (str(error) or type(error).__name__, None)
                message = " ".join(line.removeprefix("error: ").split())
                self.write_status(state, message=message)
                self._forget_unsaved()
            raise

    def _forget_unsaved(self) -> None:
        """Remove the configuration of a run without checkpoints: others can then be started."""
        with contextlib.suppress(OSError):
            if not any(name.endswith(".pt") for name in os.listdir(self.path)):
                (self.path / CONFIG).unlink(missing_ok=True)

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """A failed write is only a warning: each checkpoint has the log, too."""
        try:
            write(self.path / name)
        except OSError as error:
            print(f"warning: {self.path / name} could not be written ({error.strerror})")


def _without_nan(row: dict) -> dict:
    """A row of the log with None for numbers that JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def provenance() -> dict:
    """Versions, git commit and command line, for results.json and the JSON beside weights."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "numpy": str(numpy.__version__),
        },
        "commit": find_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def find_commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside of git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
