"""A run's folder: the lock that makes it one run's, its log, its events, and what made it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import torchvision

from common.files import open_lock, remove_temporary_files, write_atomic, write_json
from training.checkpoint import BEST, LATEST, PREVIOUS
from training.run_config import LOG

EVENTS, STATUS = "events.jsonl", "status.json"


class Folder:
    """A run's folder, held by this process alone until it ends, however it ends."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    def lock(self) -> None:
        """Make the folder and claim it; raises as open_lock does."""
        self._lock = open_lock(self.path)
        remove_temporary_files(self.path)
        (self.path / f".{LATEST}.new").unlink(missing_ok=True)

    def holds_run(self) -> bool:
        """Whether a run has left a checkpoint or a finished epoch here."""
        log = self.path / LOG
        return any((self.path / name).exists() for name in (LATEST, BEST, PREVIOUS)) or (
            log.exists() and log.read_bytes().strip() != b""
        )

    def set_aside(self, target: Path) -> Path:
        """Move this folder's files, all but hidden ones, into the new folder `target`-<time>."""
        target = target.with_name(target.name + time.strftime("-%Y%m%d-%H%M%S"))
        target.mkdir(parents=True)
        for entry in self.path.iterdir():
            if entry.is_file() and not entry.name.startswith("."):
                entry.rename(target / entry.name)
        return target

    def write_log(self, rows: list[dict]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._write(LOG, lambda path: write_atomic(path, text.encode()))

    def event(self, kind: str, **details) -> None:
        """Append one line to events.jsonl; every rank may, in a single write each."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind, **details})

        def append(path: Path) -> None:
            with open(path, "a") as file:
                file.write(line + "\n")

        self._write(EVENTS, append)

    def status(self, state: str, **details) -> None:
        self._write(STATUS, lambda path: write_json(path, {"state": state, **details}))

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """A full disk does not end a run for want of its log, which each checkpoint holds too."""
        try:
            write(self.path / name)
        except OSError as error:
            print(
                f"warning: {self.path / name} could not be written ({error.strerror})", flush=True
            )


def provenance() -> dict:
    """Versions, git commit and command line, for results.json and the JSON beside weights."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "numpy": str(numpy.__version__),
        },
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            [
                "git",
                "-C",
                os.fspath(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
