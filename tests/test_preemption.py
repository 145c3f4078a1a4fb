"""training/preemption.py: signals become a request, and so does the death of the launcher."""

import os
import signal
import threading
import time

import pytest

from common.processes import STOP_SIGNALS, ignore_stop_signals
from training import preemption
from training.preemption import StopRequest


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("TWISTNET_LAUNCHER", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_each_signal_is_a_request_that_names_it(name):
    stop = StopRequest()
    assert not stop.requested and stop.reason == ""
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.requested and stop.reason == name


@pytest.mark.parametrize(
    ("under_torchrun", "inherited", "requested"),
    [
        (False, signal.SIG_IGN, False),  # nohup python pretrain_imagenet.py
        (False, signal.SIG_DFL, True),
        (True, signal.SIG_DFL, True),
        (True, signal.SIG_IGN, True),  # nohup torchrun: torchrun passes it on all the same
    ],
)
def test_nohup_keeps_sighup_ignored_without_torchrun(
    monkeypatch, under_torchrun, inherited, requested
):
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setattr(StopRequest, "_watch", lambda self, parent: None)
    signal.signal(signal.SIGHUP, inherited)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested is requested
    os.kill(os.getpid(), signal.SIGTERM)  # nohup is for SIGHUP only
    assert stop.requested


def test_loader_workers_ignore_them():
    StopRequest()
    ignore_stop_signals(3)
    for number in STOP_SIGNALS:
        assert signal.getsignal(number) == signal.SIG_IGN
        os.kill(os.getpid(), number)


def test_a_run_that_a_shell_started_outlives_it(monkeypatch):
    threads = threading.active_count()
    StopRequest()
    monkeypatch.setenv("TWISTNET_LAUNCHER", str(os.getpid()))  # alive, and not the parent
    assert not StopRequest().requested
    assert threading.active_count() == threads


def fork(work):
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def test_a_process_whose_launcher_died_asks_to_stop_and_ends_itself(monkeypatch):
    monkeypatch.setattr(preemption, "ORPHAN_GRACE", 0.5)
    reading, writing = os.pipe()

    def run():
        os.environ["TWISTNET_LAUNCHER"] = str(os.getppid())
        stop = StopRequest()
        os.write(writing, b"started\n")
        while not stop.requested:
            time.sleep(0.01)
        os.write(writing, stop.reason.encode())
        time.sleep(30)  # as in a collective that waits for ranks that have died
        os.write(writing, b"still here")

    def launcher():
        fork(run)
        signal.pause()

    process = fork(launcher)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.readline() == b"started\n"
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        killed = time.monotonic()
        assert pipe.read() == b"the death of its launcher"
        assert time.monotonic() - killed < 5


def test_torchruns_processes_are_watched_too(monkeypatch):
    watched = []
    monkeypatch.setattr(StopRequest, "_watch", lambda self, parent: watched.append(parent))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    StopRequest()
    assert watched == [os.getppid()]


def test_a_launcher_that_died_before_the_run_started_counts_too(monkeypatch):
    """Importing torch takes seconds, in which a sweep can be killed."""
    process = fork(lambda: None)
    os.waitpid(process, 0)
    monkeypatch.setattr(preemption, "ORPHAN_GRACE", 600.0)
    monkeypatch.setenv("TWISTNET_LAUNCHER", str(process))
    stop = StopRequest()
    deadline = time.monotonic() + 2
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stop.requested
