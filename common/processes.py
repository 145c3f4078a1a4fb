"""What a process may use of its machine, and which signals ask it to stop."""

import os
import signal

from common.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def read_integer(name: str, default: int) -> int:
    """An integer of the environment, as torchrun sets them; an empty variable counts as not set.

    Raises UserError where the variable is not a number.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a number: unset it")
    return int(text)


def usable_cpus() -> int:
    """CPUs that this process may run on, divided by the ranks that torchrun started here."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // max(1, read_integer("LOCAL_WORLD_SIZE", 1)))


def ignore_stop_signals(worker_id: int = 0) -> None:
    """Let a loader worker outlive the stop signals; it ends with the process that started it.

    torchrun signals the whole process group of a rank, and a rank whose workers die first
    crashes before it can save.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
