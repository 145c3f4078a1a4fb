"""sweeps/launching.py: the pool, with commands that only pretend to train."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import is_locked
from sweeps import launching
from sweeps.launching import (
    BUSY,
    DONE,
    FAILED,
    RETRY,
    STOPPED,
    Job,
    LocalPool,
    ProgressLine,
    last_output,
    make_slots,
)


def job(folder: Path, name: str, code: str) -> Job:
    """A job whose command is Python; `done()` in it leaves the results."""
    start = (
        f"import os, sys, time; os.chdir({str(folder / name)!r})\n"
        "def done(): open('results.json', 'w').close()\n"
    )
    return Job(folder / name, [sys.executable, "-S", "-c", start + code])


def is_done(job: Job) -> bool:
    return (job.folder / "results.json").exists()


def run_pool(jobs, slots=({},), stop=lambda: False, **more):
    """All outcomes, in order, as (name, outcome)."""
    outcomes = []
    LocalPool(
        list(slots),
        stop=stop,
        is_done=is_done,
        report=lambda job, outcome: outcomes.append((job.name, outcome)),
        **more,
    ).run(jobs)
    return outcomes


def test_jobs_run_in_their_slots_and_never_more_at_a_time(tmp_path):
    work = "time.sleep(0.3); print(os.environ['GPU'], os.environ['TWISTNET_LAUNCHER']); done()"
    counts = []
    jobs = [job(tmp_path, name, work) for name in "abcde"]
    outcomes = run_pool(jobs, [{"GPU": "0"}, {"GPU": "1"}], polled=counts.append)
    assert sorted(outcomes) == [(name, DONE) for name in "abcde"]
    assert max(counts) == 2
    used = [last_output(job.folder, lines=1).split() for job in jobs]
    assert {gpu for gpu, _ in used} == {"0", "1"}
    assert {launcher for _, launcher in used} == {str(os.getpid())}


def test_the_output_is_appended_to_output_log_below_the_command(tmp_path):
    one = job(tmp_path, "a b", "print('hello'); print('oh', file=sys.stderr); done()")
    for _ in range(2):
        run_pool([one])
        (one.folder / "results.json").unlink()
    lines = (one.folder / "output.log").read_text().splitlines()
    assert lines.count("hello") == lines.count("oh") == 2
    assert lines[0].startswith(f"$ {sys.executable}")
    assert (
        last_output(one.folder, lines=1).strip() in ("hello", "oh") and last_output(tmp_path) == ""
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(1)", [RETRY, FAILED]),
        ("os.kill(os.getpid(), 9)", [RETRY, FAILED]),
        ("sys.exit(2)", [FAILED]),  # bad input stays bad
        ("pass", [RETRY, FAILED]),  # exit 0, but no results: not finished
        ("sys.exit(75)", [STOPPED]),  # somebody asked this run alone to stop
        (
            "seen = os.path.exists('x'); open('x', 'w'); done() if seen else sys.exit(1)",
            [RETRY, DONE],
        ),
    ],
)
def test_a_failed_run_is_tried_once_more(tmp_path, code, expected):
    outcomes = run_pool([job(tmp_path, "a", code), job(tmp_path, "b", "done()")])
    assert [outcome for name, outcome in outcomes if name == "a"] == expected
    assert ("b", DONE) in outcomes  # the sweep continues


def test_a_finished_job_is_not_run(tmp_path):
    one = job(tmp_path, "a", "sys.exit(1)")
    one.folder.mkdir()
    (one.folder / "results.json").touch()
    assert run_pool([one]) == [("a", DONE)]
    assert not (one.folder / "output.log").exists()


def test_the_pool_waits_for_a_job_of_another_process_while_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "BUSY_POLL", 0.2)
    one, other = job(tmp_path, "a", "sys.exit(1)"), job(tmp_path, "b", "done()")
    one.folder.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            (
                "import fcntl, time; f = open('.lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
                "open('locked', 'w'); time.sleep(1.5); open('results.json', 'w')"
            ),
        ],
        cwd=one.folder,
    )
    while not (one.folder / "locked").exists():
        time.sleep(0.02)
    assert is_locked(one.folder)
    assert run_pool([one, other]) == [("a", BUSY), ("b", DONE), ("a", DONE)]
    holder.wait()
    assert not is_locked(one.folder) and not is_locked(tmp_path / "not there")


def test_a_job_that_another_process_started_first_has_not_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "BUSY_POLL", 0.2)
    code = "seen = os.path.exists('x'); open('x', 'w'); done() if seen else sys.exit(3)"
    assert run_pool([job(tmp_path, "a", code)]) == [("a", BUSY), ("a", DONE)]


SAVES = (
    "import signal\ndef save(*_):\n    print('saved'); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save); open('up', 'w'); time.sleep(60)"
)


def test_a_stop_lets_runs_save_and_starts_no_others(tmp_path):
    jobs = [job(tmp_path, name, SAVES) for name in "ab"]
    up = jobs[0].folder / "up"
    started = time.monotonic()
    assert run_pool(jobs, stop=up.exists) == [("a", STOPPED)]
    assert time.monotonic() - started < 10
    assert "saved" in last_output(jobs[0].folder) and not jobs[1].folder.exists()


def test_a_run_that_ignores_the_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 0.5)
    code = "import signal; signal.signal(15, signal.SIG_IGN); open('up', 'w'); time.sleep(60)"
    one = job(tmp_path, "a", code)
    assert run_pool([one], stop=(one.folder / "up").exists) == [("a", STOPPED)]


def test_runs_are_stopped_when_the_launcher_fails(tmp_path):
    def broken(running):
        if (tmp_path / "a" / "up").exists():
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        run_pool([job(tmp_path, "a", SAVES)], polled=broken)
    assert "saved" in last_output(tmp_path / "a")


@pytest.mark.parametrize(
    ("slots", "gpus", "jobs", "cores", "threads", "workers", "devices"),
    [
        (None, None, 4, 8, None, None, [None]),
        (2, None, 4, 8, "4", "4", [None, None]),
        (8, None, 3, 8, "2", "2", [None] * 3),  # no more slots than jobs
        (4, None, 4, 2, "1", "1", [None] * 4),
        (None, [0], 4, 8, None, None, ["0"]),
        (None, [3, 1], 4, 16, "8", "6", ["3", "1"]),
        (None, [0, 1], 0, 16, None, None, ["0"]),
        (None, [1, 1, 0], 4, 6, "2", "2", ["1", "1", "0"]),  # two runs share GPU 1
    ],
)
def test_slots_share_the_cores(monkeypatch, slots, gpus, jobs, cores, threads, workers, devices):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [Job(Path(str(n)), ["run"]) for n in range(jobs)]
    made = make_slots(jobs, slots, gpus, cores=cores, workers=6)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in made] == devices
    assert {slot.get("OMP_NUM_THREADS") for slot in made} == {threads}
    assert all(c.command == (["run", "--workers", workers] if workers else ["run"]) for c in jobs)


def test_slots_respect_environment_variables_of_the_user(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    made = make_slots([Job(Path("a"), []), Job(Path("b"), [])], None, [0, 1], cores=8, workers=4)
    assert made == [
        {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "4"},
        {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "7"},
    ]


def test_the_progress_line_shows_counts_and_mean_accuracies(capsys):
    line = ProgressLine(4, [{"model": "a", "test_acc": 10.0}], failed=1)
    line.add("x", {"model": "a", "test_acc": 20.0, "val_acc": 25.0, "seconds": 61.2})
    line.add("y", {"model": "b", "test_acc": 5.0, "val_acc": 1.0, "seconds": 1.0})
    seen = []
    line.bar.set_postfix_str = seen.append
    line.show(2)
    line.show(1)  # too soon
    line.close()
    assert seen == ["2 running, 1 failed, a 15.0, b 5.0"]
    assert capsys.readouterr().out.splitlines() == [
        "[2/4] x: val_acc 25.0, test_acc 20.0, 61 s",
        "[3/4] y: val_acc 1.0, test_acc 5.0, 1 s",
    ]
