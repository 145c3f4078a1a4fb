"""Rows that take turns, the processes that they start, and the table of their medians."""

import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from common.errors import UserError
from common.files import ROOT


def interleaved(
    rows: dict[str, Callable[[int], None]],
    *,
    rounds: int,
    images: int,
    warm: int = 1,
    cpu_seconds: Callable[[], float] = lambda: time.process_time(),
) -> list[dict]:
    """Run the rows in turn, `rounds` times, after `warm` turns each that do not count.

    images: how many images a turn processes.  cpu_seconds: the clock of CPU time.

    Returns for each row the medians of CPU and wall milliseconds per image; the first row's CPU
    and wall times divided by its own, as the median over the rounds; and the wall time in seconds
    of each turn.
    """
    # run
    measured = {name: [] for name in rows}  # (CPU, wall) seconds of each turn
    for turn in range(warm + rounds):
        for name, row in rows.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            row(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent = cpu_seconds() - cpu, time.perf_counter() - wall
            if turn >= warm:
                measured[name].append(spent)

    # medians
    table = []
    first = next(iter(measured.values()))
    for name, turns in measured.items():
        row = {"row": name, "walls": [wall for _, wall in turns]}
        for i, clock in enumerate(("cpu", "wall")):
            ratios = [theirs[i] / own[i] for theirs, own in zip(first, turns, strict=True)]
            row[f"{clock}_ms"] = 1e3 / images * median(turn[i] for turn in turns)
            row[f"{clock}_ratio"] = median(ratios)
        table.append(row)
    return table


def print_table(title: str, table: list[dict]) -> None:
    print(f"\n{title}\n{'':32}{'CPU ms':>9}{'wall ms':>9}{'images/s':>10}{'CPU ×':>8}{'wall ×':>8}")
    for row in table:
        print(
            f"{row['row']:32}{row['cpu_ms']:9.3f}{row['wall_ms']:9.3f}"
            f"{1e3 / row['wall_ms']:10.1f}{row['cpu_ratio']:8.2f}{row['wall_ratio']:8.2f}"
        )


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
