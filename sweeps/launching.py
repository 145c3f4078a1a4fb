"""Running the cells of a sweep on this machine: a pool of slots, one process a slot.

A cell is finished by its results.json alone, and train.py itself locks its folder. So nothing is
claimed here: a launcher may be killed, started again, or started twice.
"""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

DONE, FAILED, STOPPED, BUSY = "done", "failed", "stopped", "busy"
EXIT_USAGE, EXIT_BUSY, EXIT_PREEMPTED = 2, 3, 75  # train.py's, see training/command_line.py
LOG = "output.log"
GRACE = 60.0  # seconds a stopped process has for saving


@dataclass
class Cell:
    """One run of the sweep: its folder and the command that makes it."""

    folder: Path
    command: list[str]
    tries: int = 0
    not_before: float = 0.0  # when a cell that another launcher runs is looked at again

    @property
    def name(self) -> str:
        return self.folder.name


class LocalPool:
    """Runs cells in `slots`, each an environment of its own (a GPU, a share of the cores).

    `stop` is asked between polls: once true, running cells are told to save and leave, and the
    rest is not started. `finished` is called with (cell, outcome) as cells end.
    """

    def __init__(
        self,
        slots: list[dict[str, str]],
        *,
        stop: Callable[[], bool],
        finished: Callable[[Cell, str], None],
        is_done: Callable[[Cell], bool],
    ):
        self.free = list(slots)
        self.stop, self.finished, self.is_done = stop, finished, is_done
        self.running: list[tuple[subprocess.Popen, Cell, dict[str, str]]] = []

    def run(self, cells: Iterable[Cell]) -> None:
        waiting = deque(cells)
        try:
            while waiting or self.running:
                if self.stop():
                    return
                ready = [cell for cell in waiting if cell.not_before <= time.monotonic()]
                for cell in ready[: len(self.free)]:
                    waiting.remove(cell)
                    if cell.tries and self.is_done(cell):
                        self.finished(cell, DONE)  # by another launcher, while we waited
                    else:
                        self._start(cell)
                time.sleep(0.1)
                waiting.extend(self._collect())
        finally:
            self._end_all()

    def _start(self, cell: Cell) -> None:
        slot = self.free.pop()
        cell.folder.mkdir(parents=True, exist_ok=True)
        # The child ends itself when this process is gone (see training/preemption.py).
        env = {**os.environ, **slot, "TWISTNET_LAUNCHER": str(os.getpid())}
        with open(cell.folder / LOG, "a") as log:
            child = subprocess.Popen(
                cell.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
            )
        self.running.append((child, cell, slot))

    def _collect(self) -> list[Cell]:
        """Take the ended processes; the cells to try again."""
        again = []
        for entry in [entry for entry in self.running if entry[0].poll() is not None]:
            child, cell, slot = entry
            self.running.remove(entry)
            self.free.append(slot)
            code = child.returncode
            if code == EXIT_BUSY:
                cell.tries, cell.not_before = max(1, cell.tries), time.monotonic() + 5
                again.append(cell)
            elif code == 0:
                self.finished(cell, DONE)
            elif code == EXIT_PREEMPTED:
                self.finished(cell, STOPPED)
            elif cell.tries < 2 and code != EXIT_USAGE:
                cell.tries = 2  # the one retry: it goes on from latest.pt
                again.append(cell)
            else:
                self.finished(cell, FAILED)
        return again

    def _end_all(self) -> None:
        for child, _, _ in self.running:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for child, cell, _ in self.running:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            self.finished(cell, DONE if child.returncode == 0 else STOPPED)
        self.running.clear()


def tail(folder: Path, lines: int = 12) -> str:
    """The last lines of a cell's output."""
    try:
        text = (folder / LOG).read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])
