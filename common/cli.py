"""What all command lines share: spelling of flags, one-line errors, exit codes."""

import argparse
import errno
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    Busy,
    Diverged,
    Preempted,
    UserError,
    is_transient,
)
from common.files import printable
from common.processes import read_integer


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, --data-dir as well as --data_dir, and UserErrors.

    given: names of the flags that the last parsed command line has, whatever their values.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        end = list(args).index("--") if "--" in args else len(args)
        words = [_with_underscores(word) for word in args[:end]]
        for word in [*words, *args[end + 1 :]]:  # an empty path would mean the working folder
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error(f"{word or 'an argument'} is empty: is a shell variable unset?")
        flags = {word.partition("=")[0] for word in words}
        self.given = {a.dest for a in self._actions if flags.intersection(a.option_strings)}
        return super().parse_known_args([*words, *args[end:]], namespace)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def _with_underscores(word: str) -> str:
    """--data-dir=a-b → --data_dir=a-b; words that are not flags stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


# ---------------------------------------------------------------- flags that several scripts have


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` that is not below `minimum`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        noun = "an integer" if kind is int else "a number"
        if not minimum <= value:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} of at least {minimum}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is too large: it must be below 2^63")
        return value

    return parse


def add_amp_flags(group) -> argparse._ArgumentGroup:
    """Add --amp and --no_amp; args.amp is None where neither is given."""
    group.add_argument(
        "--amp",
        action="store_true",
        default=None,
        help="mixed precision, the default with CUDA and on CPUs with bf16 instructions: bf16, or "
        "fp16 on GPUs without bf16",
    )
    group.add_argument(
        "--no_amp",
        dest="amp",
        action="store_false",
        default=None,
        help="float32 throughout, without TF32",
    )
    return group


def add_saving_flags(group) -> None:
    group.add_argument(
        "--save_minutes",
        type=at_least(0, float),
        default=15,
        metavar="M",
        help="minutes between checkpoints within an epoch",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the log as TensorBoard event files into the run's folder "
        "(pip install tensorboard)",
    )


def add_weights_flag(group) -> None:
    group.add_argument(
        "--weights",
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.pt of a run, or a weights file, with its JSON beside it if it has one",
    )


def add_crop_flag(group) -> None:
    group.add_argument(
        "--img_size",
        type=at_least(32),
        metavar="PX",
        help="size of the centre crop (default: as in training, else 224)",
    )


# ---------------------------------------------------------------- the end of a program


def run(main: Callable[[], None], *, ends_torchrun: bool = False) -> None:
    """Run a script's main and exit with its code; what the user can fix is one line on stderr.

    ends_torchrun: the script is a rank of torchrun; an error that would recur also ends torchrun,
    which would otherwise retry it (--max_restarts).

    Exit codes: 0 done, 1 failed (divergence, out of memory), 2 bad input, 3 busy, 75 preempted
    and resumable, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal in Latin-1 must not end a program; a line is in the log when it is printed.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        code = 0
    except BrokenPipeError:  # the reader of the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        explained = explain_error(error)
        if explained is None:
            raise
        line, code = explained
        ignore_closed_output()  # Ctrl-C also ends the tee that our output goes to
        _print_error(line)
        would_recur = code == EXIT_USAGE or isinstance(error, Diverged) or "out of memory" in line
        if ends_torchrun and would_recur:
            _stop_torchrun()
    finally:
        _kill_workers()
    sys.exit(code)


def ignore_closed_output() -> None:
    """Keep a program running when the terminal or pipe that its output goes to is closed."""
    if sys.stdout is not None:
        sys.stdout = _Unbreakable(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = _Unbreakable(sys.stderr)


class _Unbreakable:
    """A text stream that writes to nowhere once its reader has gone."""

    def __init__(self, stream):
        self._stream = stream._stream if isinstance(stream, _Unbreakable) else stream

    def write(self, text: str) -> int:
        return self._guard(self._stream.write, text) or 0

    def flush(self) -> None:
        self._guard(self._stream.flush)

    def _guard(self, operation, *args):
        try:
            return operation(*args)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return None  # the log is on a full disk: there may be space again later
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal was closed
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


# What libraries say when the machine is at one of its limits, and what the user can do.
_LIMITS = {
    "too many open files|received 0 items of ancdata": "the limit of open files is too low for the "
    "loader workers: raise it with ulimit -n, or use fewer --workers",
    "unable to allocate shared memory|unable to open shared memory|bus error|bytes in /dev/shm|"
    "insufficient shared memory": "the loader workers ran out of shared memory (/dev/shm): start "
    "the container with a larger --shm-size or --ipc=host, or use fewer --workers",
    "dataloader worker .*(killed|exited unexpectedly|aborted)": "a loader worker was killed, most "
    "likely because memory ran out: use fewer --workers, or a machine with more memory",
}
# Of CUDA, of cuDNN, of cuBLAS, which also fails to initialise for want of memory, and of the CPU.
_OUT_OF_MEMORY = (
    r"out of memory|CUDNN_STATUS_\w*ALLOC\w*_FAILED|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|"
    "can't allocate memory|not enough memory|cannot allocate memory"
)


# Of a path that the user gave: without permission, through a file, too long; not of a full disk.
_WRONG_PATH = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
}


def explain_error(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code for an error; None for a bug, which deserves its traceback."""
    text = str(error)
    if isinstance(error, (OSError, UserError)) and text.startswith("Caught "):
        text = text.strip().splitlines()[-1]  # the error itself, after the worker's traceback
    if isinstance(error, Busy):
        return f"error: {text}", EXIT_BUSY
    if isinstance(error, UserError):
        return f"error: {text}", EXIT_FAILED if is_transient(error.__cause__) else EXIT_USAGE
    if isinstance(error, Diverged):
        return f"error: {text}", EXIT_FAILED
    if isinstance(error, Preempted):
        return text, EXIT_PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        return (
            "error: BatchNorm needs more than one value per channel: use a larger --batch_size or "
            "--img_size, or add images",
            EXIT_USAGE,
        )
    if not isinstance(error, (OSError, RuntimeError, MemoryError)):
        return None
    # torch's errors are RuntimeErrors that only their texts tell apart.
    for pattern, advice in _LIMITS.items():
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            return f"error: {advice}", EXIT_FAILED
    if re.search(_OUT_OF_MEMORY, text, re.IGNORECASE) or isinstance(error, MemoryError):
        detail = text.splitlines()[0] if text else "MemoryError"
        advice = "use a smaller --batch_size or --img_size"
        return f"error: out of memory: {advice} ({detail})", EXIT_FAILED
    if isinstance(error, RuntimeError) and ("gloo/transport" in text or "NCCL" in text):
        detail = text.strip().splitlines()[-1]
        return (
            "error: the connection to another rank is lost: see that rank's error, then run the "
            f"same command again, as torchrun --max_restarts does ({detail})",
            EXIT_FAILED,
        )
    if isinstance(error, OSError):
        if isinstance(error.filename, (str, os.PathLike)) and error.strerror:
            text = f"{printable(error.filename)}: {error.strerror}"
        return f"error: {text}", EXIT_USAGE if error.errno in _WRONG_PATH else EXIT_FAILED
    return None


def _print_error(line: str) -> None:
    rank = os.environ.get("RANK") or "0"  # as text: an error must be printed in any case
    if rank != "0":
        # Ranks mostly fail alike, and torchrun ends the others as soon as one is gone: a rank
        # other than 0 speaks only if it was alone with its error.
        time.sleep(3)
        line = f"rank {rank}: {line}"
    print(" ".join(line.split()), file=sys.stderr)


def _stop_torchrun() -> None:
    """End torchrun after an error that every restart would meet again (--max_restarts)."""
    if read_integer("TORCHELASTIC_MAX_RESTARTS", 0):
        os.kill(os.getppid(), signal.SIGTERM)


def _kill_workers() -> None:
    """Kill loader workers: they ignore SIGTERM, with which Python would end them and then wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a crash
    for worker in multiprocessing.active_children():
        worker.kill()
