"""The ways in which a program can end early, and the exit code of each."""

EXIT_FAILED = 1  # diverged, out of memory, a full disk
EXIT_USAGE = 2  # bad input, which the user can fix
EXIT_BUSY = 3  # another process works in the folder
EXIT_PREEMPTED = 75  # stopped by a signal and resumable; EX_TEMPFAIL, "try again"


class UserError(ValueError):
    """Something that the user can fix; the message is one line that names it and says how."""


class Busy(UserError):
    """A folder that another running process works in."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state: the same command resumes it."""


class Diverged(Exception):
    """The loss, a weight or a statistic is no longer finite."""
