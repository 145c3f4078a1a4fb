"""A run's folder: the lock that makes it one run's, its log, its events, and what made it."""

import fcntl
import hashlib
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

from training import BusyError, RunError
from training.checkpoint import BEST, LATEST, PREVIOUS, write_atomic

LOG, EVENTS, STATUS, LOCK = "log.jsonl", "events.jsonl", "status.json", ".lock"


class Folder:
    """A run's folder, held by this process alone until it ends, however it ends."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    def lock(self) -> None:
        """Make the folder and claim it. RunError when another live process holds it.

        A POSIX record lock: it is the process's own, so that forked loader workers do not keep it,
        it works over NFS, and the kernel drops it however the process dies.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK, "a")  # noqa: SIM115 (held until the process ends)
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror})") from error
        for wait in (1, 1, 0):  # a process that was just killed takes a moment to be gone
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._sweep_up()
            except (BlockingIOError, PermissionError):
                time.sleep(wait)
            except OSError as error:
                raise RunError(
                    f"{self.path} lies on a file system without locks "
                    f"({error.strerror}): use a folder on another one"
                ) from error
        raise BusyError(f"{self.path} is in use by another running process")

    def _sweep_up(self) -> None:
        """Delete half-written files of a process that was killed; only its successor may."""
        for pattern in (".*.tmp*", f".{LATEST}.new"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)

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


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """A JSON object, or None where the file is not there or holds none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
