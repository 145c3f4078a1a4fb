"""Running the jobs of a sweep on this machine: a pool of slots, one process per slot.

A job is finished once its folder has a results.json, and train.py itself locks the folder. No job
is claimed here, so a launcher may be killed, started again, or started twice.
"""

import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import EXIT_BUSY, EXIT_PREEMPTED, EXIT_USAGE
from common.files import is_locked
from training.results import describe_accuracies

DONE, FAILED, STOPPED, BUSY, RETRY = "done", "failed", "stopped", "busy", "retry"
OUTPUT = "output.log"
POLL, BUSY_POLL = 0.1, 5.0  # seconds
GRACE = 60.0  # seconds a stopped process has for saving


@dataclass
class Job:
    """One run of the sweep: its folder and its train.py command."""

    folder: Path
    command: list[str]
    failures: int = 0
    not_before: float = 0.0  # when to look again at a job that another process runs

    @property
    def name(self) -> str:
        return self.folder.name


class LocalPool:
    """Runs jobs, at most one per slot at a time.

    Args:
        slots: environment variables of each slot (its GPU, its share of the cores).
        stop: called at every poll; once it returns True, running jobs are told to save and exit,
            and the rest is not started.
        is_done: whether a job is finished.
        report: called with (job, outcome). Each job ends with DONE, FAILED or STOPPED; before
            that, RETRY means that it failed and is tried once more, BUSY that another process
            runs it and that this one waits.
        polled: called at every poll with the number of running jobs.
    """

    def __init__(
        self,
        slots: list[dict[str, str]],
        *,
        stop: Callable[[], bool],
        is_done: Callable[[Job], bool],
        report: Callable[[Job, str], None],
        polled: Callable[[int], None] = lambda running: None,
    ):
        self.free = list(slots)
        self.stop, self.is_done, self.report, self.polled = stop, is_done, report, polled
        self.running: list[tuple[subprocess.Popen, Job, dict[str, str]]] = []

    def run(self, jobs: Iterable[Job]) -> None:
        waiting = deque(jobs)
        try:
            while (waiting or self.running) and not self.stop():
                self._start(waiting)
                self.polled(len(self.running))
                time.sleep(POLL)
                waiting.extend(self._collect())
        finally:
            self._end_all()

    def _start(self, waiting: deque[Job]) -> None:
        now = time.monotonic()
        for job in [job for job in waiting if job.not_before <= now]:
            if not self.free:
                return
            if is_locked(job.folder):
                self._wait_for(job)
                continue
            waiting.remove(job)
            if self.is_done(job):  # by another launcher, since we looked
                self.report(job, DONE)
            else:
                slot = self.free.pop(0)
                self.running.append((start_process(job, slot), job, slot))

    def _wait_for(self, job: Job) -> None:
        if not job.not_before:
            self.report(job, BUSY)
        job.not_before = time.monotonic() + BUSY_POLL

    def _collect(self) -> list[Job]:
        """Handle the processes that have ended; return the jobs to start again."""
        again = []
        for entry in [entry for entry in self.running if entry[0].poll() is not None]:
            child, job, slot = entry
            self.running.remove(entry)
            self.free.append(slot)
            code = child.returncode
            if code == EXIT_BUSY:
                self._wait_for(job)
                again.append(job)
            elif code == 0 and self.is_done(job):
                self.report(job, DONE)
            elif code == EXIT_PREEMPTED or self.stop():  # by the Ctrl-C that we got too
                self.report(job, STOPPED)
            elif job.failures or code == EXIT_USAGE:
                self.report(job, FAILED)
            else:
                job.failures += 1
                again.append(job)
                self.report(job, RETRY)
        return again

    def _end_all(self) -> None:
        for child, _, _ in self.running:
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for child, job, _ in self.running:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            done = child.returncode == 0 and self.is_done(job)
            self.report(job, DONE if done else STOPPED)
        self.running.clear()


def make_slots(
    jobs: list[Job], num_slots: int | None, gpus: list[int] | None, *, cores: int, workers: int
) -> list[dict[str, str]]:
    """Environment variables per slot: its GPU and its share of the CPU cores.

    The loader workers of the jobs are capped to that share too.

    Args:
        num_slots: number of slots, where no GPUs are given; None for 1.
        gpus: one slot per entry; a GPU that is named twice is shared by two slots. They are
            counted as torch does, among those in CUDA_VISIBLE_DEVICES.
        cores: CPU cores for all slots together.
        workers: loader workers per job, as asked for.
    """
    count = len(gpus) if gpus else num_slots or 1
    count = max(1, min(count, len(jobs)))
    environment = {}
    if count > 1:
        share = max(1, cores // count)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(share))
        for job in jobs:
            job.command += ["--workers", str(min(workers, share))]
    if not gpus:
        return [environment] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(gpu) for gpu in range(max(gpus) + 1)]
    return [{**environment, "CUDA_VISIBLE_DEVICES": ids[gpu]} for gpu in gpus[:count]]


def start_process(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    """Start a job's command; its output is appended to output.log in its folder.

    The process ends itself when this one is gone (training/preemption.py).
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **environment, "TWISTNET_LAUNCHER": str(os.getpid())}
    with open(job.folder / OUTPUT, "a", encoding="utf-8", errors="backslashreplace") as output:
        print("$", shlex.join(job.command), file=output, flush=True)
        return subprocess.Popen(
            job.command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def last_output(folder: Path, lines: int = 12) -> str:
    """The last lines of a job's output, indented."""
    try:
        text = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


class ProgressLine:
    """The live line of a sweep: done, running, failed, time left, mean accuracy per model.

    `results` are those of the jobs that were finished before. Without a terminal, only the lines
    that `say` prints are shown.
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
        """Count a finished job, and print its line."""
        self._count(results)
        self.done += 1
        self.bar.update()
        self.say(
            f"[{self.done}/{self.total}] {name}: {describe_accuracies(results)}, "
            f"{results.get('seconds') or 0:.0f} s"
        )

    def say(self, text: str) -> None:
        self.bar.write(text)

    def show(self, running: int) -> None:
        """Draw the line again, at most once per second."""
        if time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        means = [f"{model} {sum(each) / len(each):.1f}" for model, each in self.accuracies.items()]
        self.bar.set_postfix_str(", ".join([f"{running} running", f"{self.failed} failed", *means]))

    def close(self) -> None:
        self.bar.close()
