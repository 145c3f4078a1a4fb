"""run_all.py from its command line to its table, and through everything that stops it."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import run_all
import train
from common.cli import run
from common.errors import UserError
from common.files import is_locked
from data.synthetic import write_dtd
from models import build_model

ROOT = Path(__file__).resolve().parent.parent
ONE, TWO = "dtd_fold1_resnet18_seed42", "dtd_fold2_resnet18_seed42"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with blanks") / "the data"
    write_dtd(folder, images_per_class=24, folds=2, size=40, seed=1, num_classes=3)
    return folder


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    """In the folder above the data, which every command names relative to it."""
    monkeypatch.chdir(data.parent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def flags(run_dir, *more, models="resnet18", epochs=1) -> list[str]:
    words = f"--models {models} --epochs {epochs} --img_size 32 --pretrained none --workers 0"
    return ["--data_dir", "the data", *words.split(), "--run_dir", run_dir, *more]


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as left:
        run(lambda: run_all.main(list(argv)))
    return left.value.code


@pytest.fixture(scope="module")
def swept(data) -> Path:
    """Two finished jobs."""
    done = subprocess.run(
        [sys.executable, ROOT / "run_all.py", *flags("my runs", "--folds", "1-2", "--jobs", "2")],
        cwd=data.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(
        "resnet18 starts from random weights\n2 runs: 0 finished, 2 to do (0 of them started)"
    )
    assert "[2/2] dtd_fold" in done.stdout and "| resnet18 | 11.18" in done.stdout
    return data.parent / "my runs"


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("dtd_*/*")}


def test_a_sweep_leaves_a_table_and_one_folder_per_run(swept):
    plan = {"dataset": "dtd", "models": ["resnet18"], "folds": [1, 2], "seeds": [42]}
    assert json.loads((swept / "sweep.json").read_text()) == {"sweeps": [plan]}
    assert {path.suffix for path in swept.glob("table.*")} == {".md", ".csv", ".tex"}
    for name in (ONE, TWO):
        assert json.loads((swept / name / "results.json").read_text())["epochs"] == 1
        assert "\nEpoch 1: val_acc" in (swept / name / "output.log").read_text()


def test_a_finished_sweep_only_prints_its_table(swept, capsys):
    before = files(swept)
    assert call(*flags("my runs", "--folds", "1-2")) == 0
    out = capsys.readouterr().out
    assert "2 runs: 2 finished, 0 to do" in out and "(2 folds × 1 seed)" in out
    assert files(swept) == before


def test_runs_with_other_settings_are_named_and_left_untouched(swept, capsys):
    before = files(swept)
    assert call(*flags("my runs", "--folds", "1-2", epochs=2)) == 1
    out, err = capsys.readouterr()
    first, second, *_, last = err.splitlines()
    assert first.startswith(
        f"not reused: {Path('my runs', ONE)} already contains a run with different settings "
        "(epochs 1 → 2): archive it with --overwrite, or choose another --run_dir"
    )
    assert TWO in second
    assert last == f"failed or not reused: {ONE}, {TWO}"
    assert "0 to do (0 of them started), 2 not reused" in out
    assert "(2 folds × 1 seed)" in out  # the table is of all that is in RUN_DIR, and says so
    told = "Not run, because the folder contains a run with other settings than those asked for, "
    told += "or results that cannot be used"
    assert f"- {told}: {ONE}, {TWO}." in out
    assert files(swept) == before


def test_dry_run_prints_commands_that_work_when_pasted(swept, capsys):
    before = files(swept)
    assert call(*flags("my runs", "--seeds", "42-43", "--dry_run")) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert "--seed 43" in line and err == "resnet18 starts from random weights\n"
    assert call(*flags("my runs", "--dry_run", epochs=2)) == 0
    out, err = capsys.readouterr()
    assert out == "" and "\nnot reused: " in err  # nothing but commands for GNU parallel
    assert call(*flags("my runs", "--dry-run", "--overwrite")) == 0
    assert shlex.split(capsys.readouterr().out)[-1] == "--overwrite"
    assert files(swept) == before
    subprocess.run(line, shell=True, check=True, capture_output=True)
    assert call(*flags("my runs", "--seeds", "42-43")) == 0
    assert "2 runs: 2 finished, 0 to do" in capsys.readouterr().out


def test_dry_run_prints_commands_only_whatever_the_checks_print(data, tmp_path, monkeypatch):
    """Neither the weights that are found, nor a download, may end up in a job array's list."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "the data").symlink_to(data)
    weights = build_model("resnet18", 10).state_dict()
    torch.save(weights, tmp_path / "weights" / "resnet18_imagenet.pt")
    monkeypatch.chdir(tmp_path)
    load_data = train.load_data
    monkeypatch.setattr(train, "load_data", lambda args: print("downloading") or load_data(args))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        words = flags("new runs", "--folds", "1-2", "--dry_run")
        words[words.index("none")] = "auto"
        assert call(*words) == 0
    for line, fold in zip(out.getvalue().splitlines(), "12", strict=True):
        assert shlex.split(line)[2].endswith("train.py") and f"--fold {fold}" in line
    assert "resnet18 starts from weights/resnet18_imagenet.pt" in err.getvalue()
    assert "downloading" in err.getvalue()
    assert "[Auto-detected] Found ResNet-18 weights: weights/resnet18" in err.getvalue()


@contextmanager
def changed_results(folder: Path, **values):
    """Change values in the results of a run for a while."""
    path = folder / "results.json"
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), **values}))
    try:
        yield
    finally:
        path.write_text(original)


def recorded_precision(folder: Path, precision: str):
    """Let the results of a run be of this precision, whatever this machine's is, for a while."""
    settings = json.loads((folder / "results.json").read_text())["settings"]
    return changed_results(folder, settings={**settings, "precision": precision})


def test_results_that_cannot_be_counted_are_named_and_the_rest_is_tabulated(swept, capsys):
    with changed_results(swept / ONE, test_acc=None):
        assert call(*flags("my runs", "--folds", "1-2")) == 1
    out, err = capsys.readouterr()
    assert f"not reused: {Path('my runs', ONE)}/results.json has null as its test_acc" in err
    assert "2 runs: 1 finished, 0 to do (0 of them started), 1 not reused" in out
    assert " missing" in out and f"or results that cannot be used: {ONE}." in out


def test_a_sweep_is_not_continued_in_another_precision(swept, capsys, monkeypatch):
    """Its table would keep the runs apart. Slurm's runs are not trained where they are planned."""
    words = flags("my runs", "--seeds", "42,91")
    with recorded_precision(swept / ONE, "fp16"):
        assert call(*words) == 2
        assert "--run_dir my runs has runs in fp16, and this machine" in capsys.readouterr().err
        assert call(*words, "--dry_run") == call(*words, "--dry_run", "--launcher", "slurm") == 0
    # a run of the other machine that is not finished
    started = swept / "dtd_fold1_resnet18_seed92"
    started.mkdir()
    settings = json.loads((swept / ONE / "results.json").read_text())["settings"]
    config = {**settings, "seed": 92, "precision": "fp32", "weights": {"source": "none"}}
    (started / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(train, "choose_precision", lambda device, amp: "bf16")
    args = run_all.parse_args(flags("my runs", "--seeds", "92,93"))
    with pytest.raises(UserError, match="has runs in fp32, .* in bf16, .*: add --no_amp, use"):
        run_all.make_plan(*args)
    shutil.rmtree(started)


def test_a_run_that_a_machine_of_another_precision_has_finished_is_done(swept):
    with recorded_precision(swept / ONE, "fp32"):
        plan = run_all.make_plan(*run_all.parse_args(flags("my runs", "--no_amp")))
    config = plan.configs[Path("my runs", ONE)]
    assert (config["precision"], plan.amp, len(plan.finished)) == ("fp32", False, 1)
    # by another run_all.py, after this one was planned
    with recorded_precision(swept / ONE, "bf16"):
        with pytest.raises(UserError, match="precision bf16 → fp32"):
            run_all.load_results(plan, Path("my runs", ONE))
        plan.amp = None
        assert run_all.load_results(plan, Path("my runs", ONE))["fold"] == 1


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_finished_run_of_another_precision_is_no_answer_to_no_amp(swept, launcher, capsys):
    with recorded_precision(swept / ONE, "bf16"):
        words = flags("my runs", "--dry_run", "--launcher", launcher)
        assert call(*words) == call(*words, "--amp") == 0
        assert "not reused" not in capsys.readouterr().err
        call(*words, "--no_amp")
        assert "(precision bf16 → fp32)" in capsys.readouterr().err


def test_a_file_in_place_of_a_run_does_not_end_the_sweep(swept, capsys):
    (swept / "dtd_fold1_resnet18_seed7").touch()
    assert call(*flags("my runs", "--seeds", "7,42", "--dry_run")) == 0
    assert "dtd_fold1_resnet18_seed7 is not a folder" in capsys.readouterr().err
    (swept / "dtd_fold1_resnet18_seed7").unlink()


def test_overwrite_runs_again_and_keeps_the_old_run(swept, capsys):
    old = (swept / ONE / "results.json").read_text()
    assert call(*flags("my runs", "--overwrite")) == 0
    assert "--overwrite: the old run is now in" in capsys.readouterr().out
    (aside,) = (swept / "overwritten").iterdir()
    assert aside.name.startswith(ONE) and (aside / "results.json").read_text() == old
    assert (aside / "output.log").exists()
    new = json.loads((swept / ONE / "results.json").read_text())
    assert new["test_predictions"] == json.loads(old)["test_predictions"]
    assert (swept / ONE / "output.log").read_text().count("$ ") == 1


FAKE = """
import json, os, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = "dtd_fold{--fold}_{--model}_seed{--seed}".format_map(words)
folder = os.path.join(words["--run_dir"], name)
print("line of", name)
"""


@pytest.fixture
def fake_train(monkeypatch, tmp_path):
    """Cells run this code instead of train.py."""

    def use(code: str) -> None:
        (tmp_path / "train.py").write_text(FAKE + code)
        monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))

    return use


def test_a_failed_run_is_tried_again_and_reported_with_its_last_lines(fake_train, tmp_path, capsys):
    fake_train("sys.exit(words['--fold'] == '1')")
    run_dir = str(tmp_path / "runs")
    assert call(*flags(run_dir, "--folds", "1-2", "--jobs", "2")) == 1
    out, err = capsys.readouterr()
    assert f"{ONE} failed; its output ends with\n    $ " in out and "once more" in out
    assert f"{ONE} failed twice; its output ends with\n" in out and f"    line of {ONE}" in out
    assert err.strip().endswith(f"failed or not reused: {ONE}, {TWO}") or (
        err.strip().endswith(f"failed or not reused: {TWO}, {ONE}")
    )  # 2 left no results
    assert (Path(run_dir) / ONE / "output.log").read_text().count("line of") == 2
    assert "2 of 2 missing" in out


def test_a_sweep_with_a_stopped_run_is_unfinished(fake_train, tmp_path, capsys):
    fake_train("sys.exit(75)")
    assert call(*flags(str(tmp_path / "runs"))) == 75
    assert "with 1 runs to do: the same command continues the sweep" in capsys.readouterr().err


def test_overwrite_moves_nothing_while_one_of_the_runs_is_active(swept, capsys, locked_by_another):
    with locked_by_another(swept / TWO):
        before = files(swept)
        assert call(*flags("my runs", "--folds", "1-2", "--overwrite")) == 3
    assert "in use by another running process" in capsys.readouterr().err
    assert files(swept) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_submitted_sweep_says_how_to_continue_and_how_to_collect(
    overwrite, tmp_path, capsys, monkeypatch
):
    submitted = {}
    monkeypatch.setattr(run_all, "submit", lambda jobs, logs, **how: submitted.update(how) or "7")
    more = ["--overwrite"] if overwrite else []
    words = ["--launcher", "slurm", "--max-parallel", "3", "--gpus_per_task", "0", *more]
    assert call(*flags(str(tmp_path / "runs"), *words)) == 0
    told = {"minutes": 240, "partition": None, "gpus": 0, "cpus": 1, "max_parallel": 3}
    assert submitted == told
    out = capsys.readouterr().out
    again = "the same command without --overwrite again" if overwrite else "the same command again"
    assert f"To queue what is missing by then: {again}." in out
    assert out.rstrip().endswith("python -m tools.report " + f"{tmp_path}/runs --dataset dtd")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--folds", "1-3"], ["fold 3"]),
        (["--folds", "3-1"], ["3-1"]),
        (["--folds", "1-"], ["1-"]),
        (["--seeds", "1,1"], ["1,1"]),
        (["--models", "resnet18,resnet50"], ["resnet50", "twistnet18_no_ais"]),
        (["--fold", "1"], ["--fold is a flag of train.py", "--folds"]),
        (["--epoch", "1"], ["--epoch"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--data_dir", "nowhere"], ["nowhere"]),
        (["--pretrained", "nowhere.pt"], ["nowhere.pt"]),
        (["--run_dir", "the data/labels/train1.txt"], ["--run_dir", "train1.txt"]),
        (["--jobs", "0"], ["--jobs"]),
        (["--jobs", "2", "--gpus", "0"], ["--jobs", "--gpus"]),
        (["--gpus", "64"], ["--gpus 64"]),
        (["--gpus", "0,0,2"], ["--gpus 2"]),  # two runs on GPU 0 are allowed, GPU 2 is not there
        (["--gpus", "0,"], ["--gpus", "'0,'"]),
        (["--fold=1"], ["--fold is a flag of train.py", "--folds"]),
        (["--max_parallel", "3"], ["--max_parallel goes with --launcher slurm"]),
        (["--launcher", "slurm", "--jobs", "3"], ["--jobs goes with --launcher local"]),
        (["--launcher", "slurm", "--time", "1"], ["--time", "10"]),
        (["--launcher", "slurm"], ["pip install submitit"]),
    ],
)
def test_bad_input_is_one_line_before_any_run(more, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run_dir = tmp_path / "runs"
    assert call(*flags(str(run_dir), *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    assert not list(run_dir.glob("dtd_*"))


def start(run_dir: str, *more: str, epochs: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "run_all.py", *flags(run_dir, *more, epochs=epochs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def logged(folder: Path) -> list[int]:
    log = folder / "log.jsonl"
    return [json.loads(line)["epoch"] for line in open(log)] if log.exists() else []


def check_each_epoch_ran_once(folder: Path, epochs: int) -> None:
    output = (folder / "output.log").read_text()
    assert re.findall(r"^Epoch (\d+):", output, re.M) == [str(n) for n in range(1, epochs + 1)]
    assert logged(folder) == list(range(1, epochs + 1))


def test_a_sweep_resumes_after_ctrl_c_and_after_kill_9(tmp_path, capsys):
    folder, epochs = tmp_path / ONE, 10
    for stop in (
        lambda sweep: os.killpg(sweep.pid, signal.SIGINT),  # as Ctrl-C does
        lambda sweep: sweep.kill(),
    ):
        seen = len(logged(folder))
        sweep = start(str(tmp_path), epochs=epochs)
        wait_until(lambda seen=seen: len(logged(folder)) > seen)
        stop(sweep)
        stopped = time.monotonic()
        output = sweep.communicate()[0]
        assert sweep.returncode in (75, -signal.SIGKILL), output
        assert (
            sweep.returncode < 0 or "1 runs to do: the same command continues the sweep" in output
        )
        wait_until(lambda: not is_locked(folder), 15)  # no orphan works on
        assert time.monotonic() - stopped < 20
        assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
        assert not (folder / "results.json").exists()
    assert call(*flags(str(tmp_path), epochs=epochs)) == 0
    assert "0 finished, 1 to do (1 of them started)" in capsys.readouterr().out
    check_each_epoch_ran_once(folder, epochs)
    assert (folder / "output.log").read_text().count("resuming ") == 2


def test_two_launchers_share_the_runs_and_none_is_lost_when_one_stops(tmp_path):
    folders, epochs = [tmp_path / ONE, tmp_path / TWO], 24  # long after the signal has come
    sweeps = [start(str(tmp_path), "--folds", "1-2", epochs=epochs) for _ in range(2)]
    wait_until(lambda: all(logged(folder) for folder in folders))  # one job each
    sweeps[0].terminate()
    outputs = [sweep.communicate()[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [75, 0], outputs
    assert "stopped by SIGTERM" in outputs[0] and "(2 folds × 1 seed)" in outputs[1]
    for folder in folders:
        check_each_epoch_ran_once(folder, epochs)
