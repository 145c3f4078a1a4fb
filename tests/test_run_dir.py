"""training/run_dir.py: the lock, the log, the events, how a run ended, and what made it."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess

import pytest

from common.errors import Busy, Diverged, Preempted, UserError
from common.files import read_json, sha256
from training import run_dir
from training.checkpoint import BEST, LATEST, PREVIOUS
from training.run_dir import RunDir, provenance


def child(work):
    """Fork a process that does `work` and then waits to be killed; its id, once it is done."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            work()
            os.write(writing, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 4) == b"done"
    finally:
        os.close(reading)
    return process


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(run_dir.time, "sleep", lambda seconds: None)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "deep" / "run"
    holder = child(RunDir(folder).lock)
    try:
        with pytest.raises(Busy, match=r"deep/run is in use by another running process"):
            RunDir(folder).lock()
    finally:
        kill(holder)
    RunDir(folder).lock()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    def hold_and_fork():
        folder = RunDir(tmp_path)
        folder.lock()
        worker = child(lambda: None)
        (tmp_path / "worker").write_text(str(worker))

    holder = child(hold_and_fork)
    worker = int((tmp_path / "worker").read_text())
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        os.kill(worker, 0)  # still there
        RunDir(tmp_path).lock()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked_or_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        RunDir(tmp_path / "file").lock()

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match="file system without locks .*No locks available"):
        RunDir(tmp_path / "run").lock()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (LATEST, "", True),
        (BEST, "", True),
        (PREVIOUS, "", True),
        ("config.json", "{}", True),
        ("results.json", "{}", True),
        ("log.jsonl", '{"epoch": 1}\n', True),
        ("log.jsonl", "\n", False),
        ("events.jsonl", "{}\n", False),
        ("status.json", "{}", False),
        (None, None, False),
    ],
)
def test_what_counts_as_a_run(tmp_path, name, content, expected):
    if name:
        (tmp_path / name).write_text(content)
    assert RunDir(tmp_path).contains_run() is expected
    assert RunDir(tmp_path / "nowhere").contains_run() is False


def test_archive_moves_a_runs_files_and_keeps_the_lock(tmp_path, capsys):
    folder = RunDir(tmp_path / "run")
    folder.lock()
    for name in (LATEST, "log.jsonl", "config.json"):
        (folder.path / name).write_text(name)
    (folder.path / "kept").mkdir()
    folder.archive(tmp_path / "old" / "run-1")
    (target,) = (tmp_path / "old").iterdir()
    assert str(target) in capsys.readouterr().out
    assert target.parent == tmp_path / "old" and target.name.startswith("run-1-2")
    assert sorted(os.listdir(target)) == sorted([LATEST, "log.jsonl", "config.json"])
    assert (target / LATEST).read_text() == LATEST
    assert sorted(os.listdir(folder.path)) == [".lock", "kept"]
    assert not folder.contains_run()
    waiting = child(lambda: refused(folder.path))
    kill(waiting)


def refused(path):
    with pytest.raises(UserError):
        RunDir(path).lock()


def test_the_log_is_rewritten_whole(tmp_path):
    folder = RunDir(tmp_path)
    folder.write_log([{"epoch": 1, "lr": 0.1}, {"epoch": 2, "lr": 0.05}])
    folder.write_log([{"epoch": 1, "lr": 0.1}])
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1, "lr": 0.1}\n'
    folder.write_log([])
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_events_are_appended_with_their_time(tmp_path):
    folder = RunDir(tmp_path)
    folder.log_event("unreadable_image", file="a b\n.jpg", epoch=3)
    folder.log_event("other")
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (first["event"], first["file"], first["epoch"]) == ("unreadable_image", "a b\n.jpg", 3)
    assert second["event"] == "other" and first["time"][:2] == "20"


def test_a_log_or_status_that_cannot_be_written_is_only_a_warning(tmp_path, capsys):
    folder = RunDir(tmp_path / "gone")
    folder.write_log([])
    folder.log_event("other")
    folder.write_status("running")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["warning:"] * 3
    assert all("could not be written (No such file or directory)" in line for line in lines)


def kinds_of_events(folder):
    path = folder / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_a_run_that_was_killed_is_recognised_by_the_next_start(tmp_path):
    def train():
        folder = RunDir(tmp_path)
        folder.lock()
        folder.write_status("running")

    kill(child(train))
    assert read_json(tmp_path / "status.json")["state"] == "running"
    for _ in range(2):  # it is told once
        RunDir(tmp_path).lock()
        assert kinds_of_events(tmp_path) == ["killed"]
        assert read_json(tmp_path / "status.json")["state"] == "killed"


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_was_killed_before_its_first_save_is_forgotten(tmp_path, saved):
    (tmp_path / "config.json").write_text("{}")
    if saved:
        (tmp_path / LATEST).touch()
    RunDir(tmp_path).write_status("running")
    RunDir(tmp_path).lock()
    assert (tmp_path / "config.json").exists() == saved


def test_a_file_server_that_fails_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(run_dir.os, "listdir", fail)
    with pytest.raises(UserError, match="the error"), RunDir(tmp_path).recording_failure():
        raise UserError("the error")
    assert (tmp_path / "config.json").exists()


def test_a_run_that_said_how_it_ended_was_not_killed(tmp_path):
    RunDir(tmp_path).write_status("finished")
    RunDir(tmp_path).lock()
    assert not (tmp_path / "events.jsonl").exists()
    assert read_json(tmp_path / "status.json")["state"] == "finished"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("two\n lines"), "two lines"),
        (RuntimeError("size mismatch\nin x"), "size mismatch in x"),
        (MemoryError(), "out of memory: use a smaller --batch_size or --img_size (MemoryError)"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "3"),
    ],
)
def test_every_error_is_in_status_json(tmp_path, error, message):
    with pytest.raises(type(error)), RunDir(tmp_path).recording_failure():
        raise error
    assert read_json(tmp_path / "status.json") == {"state": "failed", "message": message}


def test_the_loop_has_recorded_a_stop_itself(tmp_path):
    folder = RunDir(tmp_path)
    folder.write_status("preempted", step=3)
    with pytest.raises(Preempted), folder.recording_failure():
        raise Preempted("x")
    assert read_json(tmp_path / "status.json") == {"state": "preempted", "step": 3}


def test_divergence_has_a_state_of_its_own(tmp_path):
    with pytest.raises(Diverged), RunDir(tmp_path).recording_failure():
        raise Diverged("x")
    assert read_json(tmp_path / "status.json") == {"state": "diverged", "message": "x"}


def test_the_log_has_no_numbers_that_json_lacks(tmp_path):
    RunDir(tmp_path).write_log([{"epoch": 1, "val_loss": float("nan"), "lr": 0.5}])
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1, "val_loss": null, "lr": 0.5}\n'


def test_only_rank_0_records_a_failure(tmp_path):
    with pytest.raises(UserError), RunDir(tmp_path).recording_failure(active=False):
        raise UserError("x")
    assert not (tmp_path / "status.json").exists()


def test_status_is_replaced(tmp_path):
    folder = RunDir(tmp_path)
    folder.write_status("running")
    folder.write_status("preempted", epoch=12, step=803)
    assert read_json(tmp_path / "status.json") == {"state": "preempted", "epoch": 12, "step": 803}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b"3", None),
        (b"\xff\xfe{}", None),
        (None, None),
    ],
)
def test_read_json(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == expected


def test_sha256_is_that_of_the_bytes():
    assert sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_provenance_is_plain_text(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/train.py", "--fold", "2"])
    made = provenance()
    assert made["command"] == "train.py --fold 2"
    assert set(made["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert all(type(version) is str for version in made["versions"].values())
    json.dumps(made)


def git(root, *words):
    subprocess.run(
        ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x@y", *words],
        check=True,
        capture_output=True,
    )


def test_the_commit_is_the_checkouts_own(tmp_path, monkeypatch):
    module = tmp_path / "training" / "run_dir.py"
    module.parent.mkdir()
    module.touch()
    monkeypatch.setattr(run_dir, "ROOT", tmp_path)
    assert provenance()["commit"] is None  # a copy without git, perhaps inside another checkout
    git(tmp_path, "init", "-q")
    assert provenance()["commit"] is None  # nothing committed yet
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "x")
    git(tmp_path, "tag", "v1")
    commit = provenance()["commit"]
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    module.write_text("changed")
    assert provenance()["commit"] == f"{commit}-dirty"


def test_archive_leaves_files_of_others(tmp_path):
    for name in ("latest.pt", "log.jsonl", "resnet18_imagenet.pt", "notes.txt", "train.py"):
        (tmp_path / name).touch()
    directory = RunDir(tmp_path)
    for _ in range(2):  # in the same second
        directory.archive(tmp_path / "overwritten")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"notes.txt", "train.py"}
    assert len(list(tmp_path.glob("overwritten-*"))) == 2
