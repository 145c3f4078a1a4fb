"""What every script's command line shares: spelling, one-line errors, exit codes."""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import torch

from training import BusyError, RunError
from training.checkpoint import LATEST
from training.loop import Diverged, Preempted

EXIT_FAILED, EXIT_USAGE, EXIT_BUSY, EXIT_PREEMPTED = 1, 2, 3, 75  # 75: EX_TEMPFAIL, "try again"


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, --data-dir as well as --data_dir, and one-line errors."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in args], namespace)

    def error(self, message: str):
        raise UsageError(f"{message} (see {self.prog} --help)")

    def given(self, args: Sequence[str] | None = None) -> set[str]:
        """The destinations that the command line names itself, whatever their values."""
        unset = object()
        blank = argparse.Namespace(**{action.dest: unset for action in self._actions})
        return {
            name for name, value in vars(self.parse_args(args, blank)).items() if value is not unset
        }


class UsageError(RunError):
    """Flags that do not parse, or do not go together."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return (
        name.replace("-", "_").replace("__", "--", 1) + equals + value
        if (word.startswith("--") and len(name) > 2)
        else word
    )


def add_amp_flags(group) -> argparse._ArgumentGroup:
    """--amp and --no_amp, None where neither is given; see engine.choose_precision."""
    group.add_argument(
        "--amp",
        action="store_true",
        default=None,
        help="mixed precision, the default with CUDA and on CPUs with bf16 "
        "instructions: bf16, or fp16 on GPUs without bf16",
    )
    group.add_argument(
        "--no_amp", dest="amp", action="store_false", default=None, help="float32 throughout"
    )
    return group


def add_tensorboard_flag(group) -> None:
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the log as TensorBoard's event files, beside it (pip install tensorboard)",
    )


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` that is not below `minimum`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a{'n integer' if kind is int else ' number'} "
                f"of at least {minimum}"
            )
        return value

    return parse


def run(main: Callable[[], None], *usage_errors: type[Exception]) -> None:
    """Run a script's main and leave with its exit code; what users can mend is one line.

    0 done, 1 failed (divergence, out of memory), 2 bad input, 3 busy, 75 preempted and resumable.
    """
    try:
        main()
        code = 0
    except BusyError as error:
        code = _say(f"error: {error}", EXIT_BUSY)
    except (RunError, *usage_errors) as error:
        code = _say(f"error: {error}", EXIT_USAGE)
    except Diverged as error:
        code = _say(f"error: {error}", EXIT_FAILED)
    except Preempted as error:
        code = _say(str(error), EXIT_PREEMPTED)
    except torch.OutOfMemoryError as error:
        code = _say(
            f"error: CUDA out of memory: use a smaller --batch_size ({str(error).splitlines()[0]})",
            EXIT_FAILED,
        )
    except RuntimeError as error:
        if "gloo/transport" not in str(error) and "NCCL" not in str(error):
            raise
        code = _say(
            f"error: another rank is gone: resume from {LATEST}, as torchrun "
            "--max_restarts does with --resume auto",
            EXIT_FAILED,
        )
    except BrokenPipeError:  # whoever read the output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except OSError as error:  # a full disk, a folder without permission, outside of the training
        code = _say(f"error: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    finally:
        _end_workers()
    sys.exit(code)


def _end_workers() -> None:
    """Kill loader workers: they ignore SIGTERM, by which Python would end them and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for a crash
    for worker in multiprocessing.active_children():
        worker.kill()


def _say(line: str, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        # Ranks mostly fail alike. torchrun ends the others when one is gone, so that a rank other
        # than 0 gets to speak only when it was alone with its error.
        time.sleep(3)
        line = f"rank {rank}: {line}"
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    return code
