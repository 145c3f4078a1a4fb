"""sweeps/slurm.py: what a job does, and a sweep on a real Slurm with one of its runs preempted."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import slurm_cluster

from common.errors import UserError
from data.synthetic import write_dtd
from sweeps import slurm
from sweeps.launching import Job
from sweeps.slurm import SlurmTask, submit

ROOT = Path(__file__).resolve().parent.parent


def job(tmp_path: Path, code: str) -> SlurmTask:
    start = (
        f"import os, signal, sys, time; os.chdir({str(tmp_path)!r})\n"
        "open('starts', 'a').write('x'); starts = os.path.getsize('starts')\n"
    )
    return SlurmTask(Job(tmp_path, [sys.executable, "-S", "-c", start + code]), {"THREADS": "7"})


@pytest.mark.parametrize(
    ("code", "starts"),
    [
        ("pass", 1),
        ("sys.exit(starts == 1)", 2),  # failed once
        ("sys.exit([3, 3, 0][starts - 1])", 3),  # busy: another launcher has it
        ("sys.exit([75, 0][starts - 1])", 2),  # stopped, and nobody ended the job after that
        ("sys.exit(os.environ['THREADS'] != '7')", 1),
    ],
)
def test_a_task_runs_until_its_job_is_finished(tmp_path, monkeypatch, code, starts):
    monkeypatch.setattr(slurm, "BUSY_POLL", 0.05)
    monkeypatch.setattr(slurm, "LAST_WAIT", 0.05)
    job(tmp_path, code)()
    assert (tmp_path / "starts").stat().st_size == starts


@pytest.mark.parametrize(
    ("code", "starts"), [("print('oh'); sys.exit(1)", 2), ("print('oh'); sys.exit(2)", 1)]
)
def test_a_failed_task_shows_the_last_lines_of_output(tmp_path, code, starts):
    with pytest.raises(UserError, match=r"exit code [12]; its output ends with[^$]*\$[^$]*oh"):
        job(tmp_path, code)()
    assert (tmp_path / "starts").stat().st_size == starts


def test_a_preempted_task_lets_the_run_save_before_it_is_queued_again(tmp_path):
    pytest.importorskip("submitit", reason="pip install submitit")
    saving = (
        "def save(*_):\n    time.sleep(0.5); open('saved', 'w'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save); open('up', 'w'); time.sleep(60)"
    )
    one = job(tmp_path, saving)
    again = []

    class Left(BaseException):
        pass

    def handle(*_):  # in the middle of waiting for the run, as submitit's handler
        again.append(one.checkpoint().function)
        raise Left

    def preempt():
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handle)
    try:
        threading.Thread(target=preempt).start()
        with pytest.raises(Left):
            one()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "saved").exists()
    assert again[0].job == one.job and again[0].child is None
    assert isinstance(one.checkpoint().function, SlurmTask)  # also where no run is left


def test_a_missing_slurm_or_submitit_is_named(tmp_path, monkeypatch):
    wanted = {"minutes": 60, "partition": None, "gpus": 0, "cpus": 1, "max_parallel": None}
    pytest.importorskip("submitit", reason="pip install submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun"):
        submit([Job(tmp_path, ["true"])], tmp_path / "logs", **wanted)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        submit([Job(tmp_path, ["true"])], tmp_path / "logs", **wanted)


@pytest.fixture
def cluster(monkeypatch):
    """The environment of a cluster that lives as long as a test, and asks Slurm things in it."""
    pytest.importorskip("submitit", reason="pip install submitit")
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            env = slurm_cluster.start(Path(folder))
            for name, value in {**env, "OMP_NUM_THREADS": "1"}.items():
                monkeypatch.setenv(name, value)
            yield lambda *command: slurm_cluster.ask(env, *command)
        finally:
            slurm_cluster.stop(Path(folder))


def wait_until(condition, seconds: float, ask) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, ask("squeue")
        time.sleep(0.2)


def test_a_sweep_on_a_cluster_survives_a_preemption(cluster, tmp_path):
    """Four runs, two at a time; a job of a better partition takes the place of one of them."""
    write_dtd(tmp_path / "the data", images_per_class=120, folds=2, size=40, seed=1, num_classes=4)
    words = (
        "--models resnet18 --folds 1-2 --seeds 1,2 --epochs 15 --img_size 32 --pretrained none "
        "--workers 0 --launcher slurm --partition low --gpus_per_task 0 --max_parallel 2"
    )
    command = [sys.executable, ROOT / "run_all.py", "--data_dir", "the data", *words.split()]
    command += ["--run_dir", "my runs"]
    submitted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    array = submitted.stdout.split("Slurm job array ")[1].split(":")[0]
    collect = submitted.stdout.splitlines()[-1].strip()

    runs = tmp_path / "my runs"

    def both_train() -> bool:  # neither is still importing torch, when it could not save
        started = [path for path in runs.glob("dtd_*/") if not (path / "results.json").exists()]
        logs = [path / "log.jsonl" for path in started if (path / "output.log").exists()]
        return len(logs) == 2 and all(log.exists() and log.read_text().strip() for log in logs)

    wait_until(both_train, 120, cluster)
    assert cluster(
        "sbatch", "--parsable", "--partition", "high", "--output", "/dev/null", "--wrap", "true"
    ).isdigit()

    def held_back() -> list[str]:
        return [
            line.split()[0]
            for line in cluster("squeue", "-h", "-o", "%i %r").splitlines()
            if line.endswith("BeginTime")
        ]

    wait_until(held_back, 60, cluster)
    (preempted,) = held_back()
    assert preempted.startswith(f"{array}_")
    cluster("scontrol", "update", f"JobId={preempted}", "StartTime=now")  # two minutes otherwise
    wait_until(lambda: not cluster("squeue", "-h", "-o", "%i"), 150, cluster)

    outputs = [path.read_text() for path in sorted(runs.glob("dtd_*/output.log"))]
    assert len(outputs) == len(list(runs.glob("dtd_*/results.json"))) == 4
    assert sorted(text.count("$ ") for text in outputs) == [1, 1, 1, 2]
    (torn,) = (text for text in outputs if text.count("$ ") == 2)
    assert "\npreempted, " in torn and "\nresuming " in torn  # in an epoch or at the end of one
    for text in outputs:
        assert [text.count(f"\nEpoch {epoch}:") for epoch in range(1, 17)] == [1] * 15 + [0]
    (plan,) = json.loads((runs / "sweep.json").read_text())["sweeps"]
    assert plan["folds"] == plan["seeds"] == [1, 2]
    report = subprocess.run(
        collect.replace("python", sys.executable, 1),
        shell=True,
        text=True,
        cwd=tmp_path,
        capture_output=True,
    )
    assert "(2 folds × 2 seeds)" in report.stdout, report.stderr


def test_a_cluster_can_be_stopped_twice(tmp_path):
    slurm_cluster.stop(tmp_path)
    (tmp_path / "slurmctld.process").write_text(str(os.getpid()))  # not a daemon of ours
    slurm_cluster.stop(tmp_path)
    assert slurm_cluster.is_running(tmp_path, "slurmctld") is None
