"""Run this project's scripts as processes of their own, and measure the CPU time they use."""

import resource
import shlex
import subprocess
import sys

from common.errors import UserError
from common.files import ROOT


def run_python(arguments: list) -> None:
    """Run Python with these arguments in the project's folder. Raises UserError if it fails."""
    words = list(map(str, arguments))
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(words)} failed: {' '.join(done.stderr.split())[-1000:]}")


def children_cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
