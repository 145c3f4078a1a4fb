"""Files: atomic writes, outputs that a user names, JSON, text, checksums, locks and free space."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from common.errors import Busy, UserError

ROOT = Path(__file__).resolve().parent.parent  # of the repository
LOCK = ".lock"
TEMPORARY = ".{name}.tmp{unique}"  # what write_atomic writes before it renames
MARK_RANGE = 1 << 20  # bytes at each end of a file in which check_outputs looks for a mark
LOCK_WAIT = 2  # seconds: a process that was just killed takes a moment to be gone


# ---------------------------------------------------------------- writing


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a power cut, finds the old content or the new.

    Text is written as UTF-8; bytes of file names that are not UTF-8 are written as \\udcXX.
    Raises OSError, and then leaves the old file as it was.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = printable(path)  # a full disk names no file, others the temporary one
        raise
    sync_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    """A random name beside `path`: process ids are not unique across containers and machines.

    It is valid where that of `path` is: a name has at most 255 bytes, and a character up to four.
    """
    return path.with_name(TEMPORARY.format(name=path.name[:60], unique=secrets.token_hex(4)))


def try_writing_beside(path: Path) -> None:
    """Create a file beside `path` and remove it. Raises OSError where that is not possible."""
    temporary = temporary_beside(path)
    temporary.touch()
    temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)


def replace_by_link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no hard links."""
    temporary = temporary_beside(target)
    try:
        os.link(source, temporary)
    except OSError:
        return write_atomic(target, source.read_bytes())
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # replacing a file by itself does nothing


def remove_temporary_files(folder: Path) -> None:
    """Delete what a killed writer left; only for the process that holds the folder's lock."""
    for left in folder.glob(TEMPORARY.format(name="*", unique="[0-9a-f]" * 8)):
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


# ---------------------------------------------------------------- outputs that a user names


def check_outputs(
    paths: Iterable[Path], *, flag: str, mark: bytes, inputs: Iterable[Path] = ()
) -> None:
    """Raise UserError if one of `paths` cannot be written, or is not this tool's.

    A file among `inputs` is never overwritten. Any other file that exists is overwritten only if it
    contains `mark`: bytes that the tool writes near the start or the end of all its files.
    """
    given = {_identity(file) for file in inputs} - {None}
    for path in paths:
        if not path.resolve().parent.is_dir():
            raise UserError(
                f"{flag} {printable(path)}: there is no folder {printable(path.parent)}"
            )
        if _identity(path) in given:
            raise UserError(
                f"{flag} would overwrite {printable(path)}, which is one of the inputs: choose "
                "another name or folder"
            )
        if os.path.lexists(path) and not _contains_mark(path, mark):
            raise UserError(
                f"{flag} would overwrite {printable(path)}, which this tool did not write: choose "
                "another name or folder, or remove the file"
            )
        try:
            with contextlib.suppress(FileNotFoundError):
                path.lstat()  # the name may be too long
            try_writing_beside(path)
        except OSError as error:
            raise UserError(
                f"{flag} {printable(path)}: cannot be written ({error.strerror})"
            ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    """What two names of one file have in common; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _contains_mark(path: Path, mark: bytes) -> bool:
    if not path.is_file():  # a folder, a device, a link that leads nowhere
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(MARK_RANGE)
            file.seek(max(0, path.stat().st_size - MARK_RANGE))
            return mark in start or mark in file.read()
    except OSError:
        return False


def check_output_folder(folder: Path, *, flag: str, made_by_tool: Iterable[str]) -> None:
    """Raise UserError unless `folder` is new, empty, or one that this tool has filled before.

    made_by_tool: file names; the tool's own folders contain at least one of them.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{flag} {printable(folder)} is a file: choose another folder")
    names = set(os.listdir(folder))
    others = names - {LOCK, ".DS_Store"}
    if others and names.isdisjoint(made_by_tool):
        raise UserError(
            f"{flag} {printable(folder)} contains files that this tool did not write "
            f"({printable(min(others))}): choose a new or an empty folder"
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
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def printable(name: str | os.PathLike) -> str:
    """A file's name as text; bytes of it that are not UTF-8 are written as \\xNN."""
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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


def lock_folder(folder: Path, *, required: bool = True, wait: int = LOCK_WAIT):
    """Create `folder` and lock it for this process, until the returned file is closed.

    Raises Busy where another process holds it for `wait` seconds and more, and UserError where it
    cannot be written, or, if the lock is `required`, is on a file system without locks. If it is
    not, such a folder is used without a lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115 (closing it would release the lock)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from error
    try:
        for attempt in range(wait + 1):
            if try_lock(file):
                return file
            if attempt < wait:
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


def is_locked(folder: Path) -> bool:
    """Whether another process holds the folder's lock; False where locks are not supported."""
    try:
        with open(folder / LOCK, "a") as file:
            return not try_lock(file)
    except OSError:
        return False
