"""Running the cells of a sweep on this machine: a pool of slots, one process a slot.

A cell is finished by its results.json alone, and train.py itself locks its folder. So nothing is
claimed here: a launcher may be killed, started again, or started twice.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import EXIT_BUSY, EXIT_PREEMPTED, EXIT_USAGE
from common.files import is_locked

DONE, FAILED, STOPPED, BUSY, AGAIN = "done", "failed", "stopped", "busy", "again"
OUTPUT = "output.log"
POLL, BUSY_POLL = 0.1, 5.0  # seconds
GRACE = 60.0  # seconds a stopped process has for saving


@dataclass
class Cell:
    """One run of the sweep: its folder and the command that makes it."""

    folder: Path
    command: list[str]
    failures: int = 0
    not_before: float = 0.0  # when a cell that another process runs is looked at again

    @property
    def name(self) -> str:
        return self.folder.name


class LocalPool:
    """Runs cells in `slots`, each an environment of its own (a GPU, a share of the cores).

    `stop` is asked between polls: once true, running cells are told to save and leave, and the
    rest is not started. `report` is called with (cell, outcome): DONE, FAILED or STOPPED once a
    cell; AGAIN when it failed and is tried once more; BUSY when another process has it: it is
    waited for. `polled` gets the number of running cells, again and again.
    """

    def __init__(
        self,
        slots: list[dict[str, str]],
        *,
        stop: Callable[[], bool],
        is_done: Callable[[Cell], bool],
        report: Callable[[Cell, str], None],
        polled: Callable[[int], None] = lambda running: None,
    ):
        self.free = list(slots)
        self.stop, self.is_done, self.report, self.polled = stop, is_done, report, polled
        self.running: list[tuple[subprocess.Popen, Cell, dict[str, str]]] = []

    def run(self, cells: Iterable[Cell]) -> None:
        waiting = deque(cells)
        try:
            while (waiting or self.running) and not self.stop():
                self._start(waiting)
                self.polled(len(self.running))
                time.sleep(POLL)
                waiting.extend(self._collect())
        finally:
            self._end_all()

    def _start(self, waiting: deque[Cell]) -> None:
        now = time.monotonic()
        for cell in [cell for cell in waiting if cell.not_before <= now]:
            if not self.free:
                return
            if is_locked(cell.folder):
                self._wait_for(cell)
                continue
            waiting.remove(cell)
            if self.is_done(cell):  # by another launcher, since we looked
                self.report(cell, DONE)
            else:
                slot = self.free.pop(0)
                self.running.append((start_process(cell, slot), cell, slot))

    def _wait_for(self, cell: Cell) -> None:
        if not cell.not_before:
            self.report(cell, BUSY)
        cell.not_before = time.monotonic() + BUSY_POLL

    def _collect(self) -> list[Cell]:
        """Take the ended processes; the cells to start again."""
        again = []
        for entry in [entry for entry in self.running if entry[0].poll() is not None]:
            child, cell, slot = entry
            self.running.remove(entry)
            self.free.append(slot)
            code = child.returncode
            if code == EXIT_BUSY:
                self._wait_for(cell)
                again.append(cell)
            elif code == 0 and self.is_done(cell):
                self.report(cell, DONE)
            elif code == EXIT_PREEMPTED or self.stop():  # by the Ctrl-C that we got too
                self.report(cell, STOPPED)
            elif cell.failures or code == EXIT_USAGE:
                self.report(cell, FAILED)
            else:
                cell.failures += 1
                again.append(cell)
                self.report(cell, AGAIN)
        return again

    def _end_all(self) -> None:
        for child, _, _ in self.running:
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for child, cell, _ in self.running:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            done = child.returncode == 0 and self.is_done(cell)
            self.report(cell, DONE if done else STOPPED)
        self.running.clear()


def make_slots(
    cells: list[Cell], slots: int | None, gpus: list[int] | None, *, cores: int, workers: int
) -> list[dict[str, str]]:
    """An environment a slot: its GPU, its fair share of the cores; loaders get no more either.

    `gpus` are counted as torch does, among those that CUDA_VISIBLE_DEVICES leaves it.
    """
    count = max(1, min(len(gpus or []) or slots or 1, len(cells)))
    environment = {}
    if count > 1:
        share = max(1, cores // count)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(share))
        for cell in cells:
            cell.command += ["--workers", str(min(workers, share))]
    if not gpus:
        return [environment] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(gpu) for gpu in range(max(gpus) + 1)]
    return [{**environment, "CUDA_VISIBLE_DEVICES": ids[gpu]} for gpu in gpus[:count]]


def start_process(cell: Cell, environment: dict[str, str]) -> subprocess.Popen:
    """Start a cell's command, which ends itself when this process is gone (training/preemption.py);
    what it prints is added to output.log in its folder."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **environment, "TWISTNET_LAUNCHER": str(os.getpid())}
    with open(cell.folder / OUTPUT, "a") as output:
        print("$", shlex.join(cell.command), file=output, flush=True)
        return subprocess.Popen(
            cell.command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def tail(folder: Path, lines: int = 12) -> str:
    """The last lines of a cell's output, indented."""
    try:
        text = (folder / OUTPUT).read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


class Line:
    """The one live line of a sweep: done, running, failed, time to go, mean accuracy a model.

    `results` are those of the cells that were finished before. Without a terminal there are only
    the lines that `say` prints.
    """

    def __init__(self, total: int, results: list[dict], failed: int):
        self.bar = tqdm(
            total=total,
            initial=len(results),
            unit="run",
            disable=None,
            smoothing=0,
            dynamic_ncols=True,
        )
        self.total, self.done, self.failed = total, len(results), failed
        self.accuracies: dict[str, list[float]] = {}
        for each in results:
            self._count(each)
        self.shown = 0.0

    def _count(self, results: dict) -> None:
        self.accuracies.setdefault(results["model"], []).append(results["test_acc"])

    def add(self, name: str, results: dict) -> None:
        """A cell is done."""
        self._count(results)
        self.done += 1
        self.bar.update()
        self.say(
            f"[{self.done}/{self.total}] {name}: val_acc {results['val_acc']:.1f}, test_acc "
            f"{results['test_acc']:.1f}, {results['seconds']:.0f} s"
        )

    def say(self, text: str) -> None:
        self.bar.write(text)
        sys.stdout.flush()

    def show(self, running: int) -> None:
        """Draw it anew, at most once a second."""
        if time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        means = [f"{model} {sum(each) / len(each):.1f}" for model, each in self.accuracies.items()]
        self.bar.set_postfix_str(", ".join([f"{running} running", f"{self.failed} failed", *means]))

    def close(self) -> None:
        self.bar.close()
