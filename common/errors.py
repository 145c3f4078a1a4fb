"""The ways in which a program can end early, and the exit code of each."""

import errno

EXIT_FAILED = 1  # diverged, out of memory, a full disk
EXIT_USAGE = 2  # bad input, which the user can fix
EXIT_BUSY = 3  # another process works in the folder
EXIT_PREEMPTED = 75  # stopped by a signal and resumable; EX_TEMPFAIL, "try again"

# What network and FUSE file systems report while a server restarts; not every system has them all.
_TRANSIENT = (
    "EIO ESTALE ETIMEDOUT EAGAIN ENOTCONN ESHUTDOWN ECONNRESET ECONNREFUSED ECONNABORTED EHOSTDOWN "
    "EHOSTUNREACH ENETDOWN ENETUNREACH EREMOTEIO ECOMM EKEYEXPIRED"
)
TRANSIENT = {getattr(errno, name) for name in _TRANSIENT.split() if hasattr(errno, name)}

READ, REPLACED, UNREADABLE = range(3)  # whether an image is its own, another of its class, or none


def is_transient(error: BaseException | None) -> bool:
    """Whether the same operation may work in a minute, so that a run should be started again."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


class UserError(ValueError):
    """Something that the user can fix; the message is one line that names it and says how."""


class Busy(UserError):
    """A folder that another running process works in."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state: the same command resumes it."""


class Diverged(Exception):
    """The loss, a weight or a statistic is no longer finite."""
