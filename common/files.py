"""Files: atomic writes, JSON, text of any encoding, checksums, folder locks and free space."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import Busy, UserError

LOCK = ".lock"
TEMPORARY = ".{name}.tmp{process}"  # what write_atomic writes before it renames
LOCK_ATTEMPTS = 3  # one per second: a process that was just killed takes a moment to be gone


# ---------------------------------------------------------------- writing


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a power cut, finds the old content or the new.

    Text is written as UTF-8. Raises OSError, and then leaves the old file as it was.
    """
    temporary = path.with_name(TEMPORARY.format(name=path.name, process=os.getpid()))
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_by_link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no hard links."""
    temporary = target.with_name(TEMPORARY.format(name=target.name, process=os.getpid()))
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        return write_atomic(target, source.read_bytes())
    os.replace(temporary, target)


def remove_temporary_files(folder: Path) -> None:
    """Delete what a killed writer left; only for the process that holds the folder's lock."""
    for left in folder.glob(TEMPORARY.format(name="*", process="*")):
        left.unlink(missing_ok=True)


def unused_path(path: Path) -> Path:
    """`path`, or where that exists `path` with the first free number: name-2.ext, name-3.ext."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def require_free_space(folder: Path, needed: float) -> None:
    """Raise UserError unless `needed` bytes are free on the disk of `folder`, which must exist."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs about {needed / 1e9:.1f} GB more and has {free / 1e9:.1f} GB free: "
            "make room, or choose a folder on another disk"
        )


# ---------------------------------------------------------------- reading


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 (with or without BOM), UTF-16 (with BOM) or else Latin-1.

    Raises OSError. Lists and tables that come with datasets are written on all kinds of systems.
    """
    return decode_text(path.read_bytes())


def decode_text(content: bytes) -> str:
    """Decode the bytes of a text file as read_text does."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_json(path: Path) -> dict | None:
    """Read a JSON object; None where the file does not exist or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def printable(name: str | os.PathLike) -> str:
    """A file's name as text that any UTF-8 stream takes, whatever bytes the name has."""
    return os.fspath(name).encode(errors="replace").decode()


# ---------------------------------------------------------------- locks


def try_lock(file) -> bool:
    """Take the lock of an open file for this process, if no other process has it.

    It is a POSIX record lock: forked loader workers do not inherit it, it works over NFS, and the
    kernel releases it however the process ends. Raises OSError where locks are not supported.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def open_lock(folder: Path, *, required: bool = True):
    """Create `folder` and lock it for this process, until the returned file is closed.

    Raises Busy where another process holds it, and UserError where it cannot be written, or, if
    the lock is `required`, is on a file system without locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115 (closing it would release the lock)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from error
    try:
        for attempt in range(LOCK_ATTEMPTS):
            if try_lock(file):
                return file
            if attempt < LOCK_ATTEMPTS - 1:
                time.sleep(1)
    except OSError as error:
        if not required:
            return file
        file.close()
        raise UserError(
            f"{folder} is on a file system without locks ({error.strerror}): use another folder"
        ) from error
    file.close()
    raise Busy(f"{folder} is in use by another running process")


@contextlib.contextmanager
def lock_folder(folder: Path, *, required: bool = True) -> Iterator[None]:
    """Hold the lock of `folder` inside a with block; raises as open_lock does.

    With `required` False, a folder on a file system without locks is used without one.
    """
    with open_lock(folder, required=required):
        yield


def is_locked(folder: Path) -> bool:
    """Whether another process holds the folder's lock; False where locks are not supported."""
    try:
        with open(folder / LOCK, "a") as file:
            return not try_lock(file)
    except OSError:
        return False
