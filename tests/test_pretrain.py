"""pretrain_imagenet.py end to end, in this process, on a few tiny images."""

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain_imagenet
from common.errors import Preempted, UserError
from data.synthetic import write_imagenet_tree
from models import build_model
from models.weights import load_pretrained
from training.checkpoint import load_checkpoint
from training.distributed import World
from training.preemption import StopRequest

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("images_per_s", "data_wait", "seconds")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """3 classes, 18 images to train on: with a batch of 4, 4 steps an epoch."""
    root = tmp_path_factory.mktemp("tree")
    write_imagenet_tree(root, train_per_class=6, val_per_class=3, size=40, seed=0, num_classes=3)
    return root


def pretrain(tree, *flags, **named):
    named = {
        "model": "resnet18",
        "img_size": 32,
        "batch_size": 4,
        "epochs": 3,
        "workers": 0,
        "warmup_epochs": 1,
        **named,
    }
    line = [
        word
        for name, value in named.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]
    pretrain_imagenet.main(["--data_dir", str(tree), *line, *flags])


def resume(tree, *flags):
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--workers", "0", "--resume", "checkpoints/latest.pt", *flags]
    )


def weights(folder="weights", model="resnet18"):
    return torch.load(Path(folder) / f"{model}_imagenet.pt", weights_only=True)


def rows(folder="checkpoints"):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMINGS}
        for line in lines
    ]


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def stop_at_poll(monkeypatch, poll):
    """Ask the run to stop at the poll of that number; polls are steps and validation batches."""
    polls = iter(range(10**9))
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: next(polls) == poll)


def test_writes_what_the_guides_promise(tree, capsys):
    pretrain(tree, epochs=2)
    printed = capsys.readouterr().out
    assert "global batch 4 (1 × 4), lr 0.0015625 (0.1 × 4 / 256)" in printed
    assert "\nEpoch 1: val_acc" in printed and "\nEpoch 2: val_acc" in printed
    for name in ("latest.pt", "best.pt", "log.jsonl", "resnet18_imagenet.pt"):
        assert (Path("checkpoints") / name).is_file()
    content = Path("weights/resnet18_imagenet.pt").read_bytes()
    assert content == Path("checkpoints/resnet18_imagenet.pt").read_bytes()
    about = json.loads(Path("weights/resnet18_imagenet.json").read_text())
    assert about == json.loads(Path("checkpoints/resnet18_imagenet.json").read_text())
    assert about["sha256"] == hashlib.sha256(content).hexdigest()
    last = rows()[-1]
    assert (
        about["model"],
        about["classes"],
        about["epochs"],
        about["seed"],
        about["img_size"],
    ) == ("resnet18", 3, 2, 42, 32)
    assert (about["top1"], about["top5"]) == (last["val_top1"], last["val_top5"])
    assert about["class_names"] == ["banded", "blotchy", "bricked"]
    assert {"recipe", "command", "versions", "commit", "parameters"} <= about.keys()


def test_log_has_one_row_an_epoch_with_the_rate_used(tree):
    pretrain(tree, epochs=2, lr=64)  # 1.0 for a batch of 4: warm-up of 4 steps, cosine of 4
    lines = [json.loads(line) for line in Path("checkpoints/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["lr"] == 1.0
    assert lines[1]["lr"] == pytest.approx(0.1464466)  # (1 + cos(3/4 π)) / 2
    assert lines[0].keys() == {
        "epoch",
        "lr",
        "train_loss",
        "val_loss",
        "val_top1",
        "val_top5",
        "images_per_s",
        "data_wait",
        "seconds",
    }


def test_final_weights_are_the_last_epochs_and_load_as_torchvisions(tree):
    pretrain(tree)
    latest = torch.load("checkpoints/latest.pt", weights_only=True)
    assert_same(weights(), latest["model"])
    load_pretrained(
        build_model("resnet18", 3), "resnet18", "weights/resnet18_imagenet.pt", keep_head=True
    )


@pytest.mark.parametrize(
    "model, polls",
    [("resnet18", (2, 3)), ("twistnet18", (4, 1)), ("resnet18", (5, 2)), ("twistnet18", (7, 6))],
)
def test_interrupted_twice_equals_uninterrupted_to_the_bit(tree, monkeypatch, model, polls):
    """A poll is before each of 4 steps, after them, and before each of 3 validation batches."""
    flags = {"model": model, "epochs": 2}
    pretrain(tree, **flags, checkpoint_dir="whole", weights_dir="whole", workers=2)
    stop_at_poll(monkeypatch, polls[0])
    with pytest.raises(Preempted, match="resume with: .*--resume checkpoints/latest.pt"):
        pretrain(tree, **flags)
    assert json.loads(Path("checkpoints/status.json").read_text())["state"] == "preempted"
    stop_at_poll(monkeypatch, polls[1])
    with pytest.raises(Preempted):
        resume(tree)
    stop_at_poll(monkeypatch, -1)
    resume(tree)
    assert_same(weights(model=model), weights("whole", model))
    assert rows() == rows("whole")
    assert json.loads(Path("checkpoints/status.json").read_text())["state"] == "finished"


def test_resume_keeps_epochs_and_schedule_and_a_finished_run_only_writes_again(tree):
    pretrain(tree, epochs=2)
    Path("weights/resnet18_imagenet.pt").unlink()
    before = rows()
    resume(tree)
    assert rows() == before and Path("weights/resnet18_imagenet.pt").is_file()
    resume(tree, "--epochs", "4")
    assert [row["epoch"] for row in rows()] == [1, 2, 3, 4]


def test_number_of_workers_and_compile_do_not_matter(tree, monkeypatch):
    pretrain(tree, epochs=1)
    pretrain(tree, epochs=1, workers=2, checkpoint_dir="two", weights_dir="two")
    assert_same(weights(), weights("two"))
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compiled(module, backend="eager")
    )
    pretrain(tree, "--compile", epochs=1, checkpoint_dir="compiled", weights_dir="compiled")
    assert_same(weights(), weights("compiled"))


def test_seed_matters(tree):
    pretrain(tree, epochs=1)
    pretrain(tree, epochs=1, seed=43, checkpoint_dir="other", weights_dir="other")
    assert not torch.equal(weights()["conv1.weight"], weights("other")["conv1.weight"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.2"],
        ["--batch_size", "8"],
        ["--seed", "1"],
        ["--model", "seresnet18"],
        ["--img-size", "64"],
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(tree, flags):
    pretrain(tree, epochs=1)
    with pytest.raises(UserError, match=f"{flags[0].replace('-size', '_size')} .*contradicts"):
        resume(tree, *flags)
    resume(tree, "--batch_size", "4", "--lr", "0.1")  # the same values are no contradiction


def test_precision_belongs_to_the_run(tree):
    pretrain(tree, "--no_amp", epochs=1)
    with pytest.raises(UserError, match="--amp .*contradicts .*fp32"):
        resume(tree, "--amp")
    resume(tree, "--epochs", "2")
    assert load_checkpoint(Path("checkpoints/latest.pt"))[0]["config"]["precision"] == "fp32"


def test_resume_of_nothing_and_of_what_is_no_checkpoint(tree):
    with pytest.raises(UserError, match="checkpoints/latest.pt: no such file"):
        resume(tree)
    assert not Path("checkpoints").exists()
    pretrain(tree, epochs=1)
    with pytest.raises(UserError, match="weights file"):
        pretrain_imagenet.main(
            ["--data_dir", str(tree), "--resume", "weights/resnet18_imagenet.pt"]
        )
    resume_auto = ["--data_dir", str(tree), "--workers", "0", "--resume", "auto"]
    pretrain_imagenet.main(resume_auto)  # finished: writes its outputs again


def test_resume_after_images_were_exchanged_is_refused(tree):
    pretrain(tree, epochs=1)
    path = next(path for path in (tree / "train").glob("*/*"))
    path.rename(path.with_name(f"other{path.suffix}"))
    with pytest.raises(UserError, match="18 training images; .* of other names"):
        resume(tree, "--epochs", "2")


def test_ranks_that_read_different_checkpoints_do_not_start(tree, monkeypatch):
    class Two(World):
        def gather(self, value):
            return [value, value + 1] if isinstance(value, int) else [value]

    pretrain(tree, epochs=1)
    monkeypatch.setattr(
        pretrain_imagenet, "start_processes", lambda: Two(0, 1, 0, 1, torch.device("cpu"))
    )
    with pytest.raises(UserError, match="ranks have read different states"):
        resume(tree, "--epochs", "2")


def test_the_command_that_goes_on_keeps_folders_and_speed(tree, monkeypatch):
    stop_at_poll(monkeypatch, 2)
    with pytest.raises(
        Preempted,
        match="--resume checkpoints/latest.pt --workers 0 "
        "--weights_dir elsewhere --save_minutes 3.0$",
    ):
        pretrain(tree, weights_dir="elsewhere", save_minutes=3)


def test_resume_on_other_data_is_refused(tree, tmp_path):
    pretrain(tree, epochs=1)
    write_imagenet_tree(
        tmp_path / "more", train_per_class=7, val_per_class=3, size=40, seed=0, num_classes=3
    )
    with pytest.raises(UserError, match="3 classes and 21 training images; .* 3 classes and 18"):
        resume(tmp_path / "more")


def test_a_folder_that_holds_a_run_is_not_overwritten(tree, capsys):
    pretrain(tree, epochs=1)
    latest = Path("checkpoints/latest.pt").read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        pretrain(tree, epochs=1)
    assert Path("checkpoints/latest.pt").read_bytes() == latest
    pretrain(tree, "--overwrite", epochs=1, seed=1)
    (aside,) = Path("checkpoints").glob("overwritten-*")
    assert (aside / "latest.pt").read_bytes() == latest
    assert str(aside) in capsys.readouterr().out


def test_weights_of_another_run_are_renamed(tree, capsys):
    Path("weights").mkdir()
    Path("weights/resnet18_imagenet.pt").write_bytes(b"twelve days")
    Path("weights/resnet18_imagenet.json").write_text("{}")
    pretrain(tree, epochs=1)
    (old,) = Path("weights").glob("resnet18_imagenet.2*.pt")
    assert old.read_bytes() == b"twelve days" and old.with_suffix(".json").exists()
    assert (
        f"weights/resnet18_imagenet.pt was another run's: it is now {old}"
        in capsys.readouterr().out
    )
    resume(tree)  # the same run writes over its own
    assert len(list(Path("weights").glob("*.pt"))) == 2


def test_small_sets_and_short_runs(tree, capsys):
    pretrain(tree, epochs=2, batch_size=64, warmup_epochs=5)
    printed = capsys.readouterr().out
    assert "each epoch is one step of 18 images" in printed
    assert "warm-up is a tenth of it, 0 of 2 steps" in printed
    assert len(rows()) == 2 and rows()[-1]["lr"] > 0


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tree):
    from training.loop import Diverged

    with pytest.raises(Diverged, match=r"not finite at epoch \d step \d+, learning rate 1"):
        pretrain(tree, lr=1e12, warmup_epochs=0)
    assert not list(Path("weights").iterdir())
    assert json.loads(Path("checkpoints/status.json").read_text())["state"] == "diverged"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data_dir", "nowhere"], "nowhere/train does not exist"),
        (["--model", "resnet50"], "--model"),
        (["--epochs", "0"], "--epochs"),
        (["--epoch", "3"], "--epoch"),
        (["--resume", "nothing.pt"], "nothing.pt: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags, message):
    done = subprocess.run(
        [sys.executable, ROOT / "pretrain_imagenet.py", *flags], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_a_signalled_process_saves_and_leaves_with_75(tree):
    command = [
        sys.executable,
        ROOT / "pretrain_imagenet.py",
        "--data_dir",
        tree,
        "--model",
        "resnet18",
        "--img_size",
        "32",
        "--batch_size",
        "4",
        "--epochs",
        "500",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = Path("checkpoints/log.jsonl")
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    other = subprocess.run(command, capture_output=True, text=True)  # while the first one runs
    assert other.returncode == 3 and "in use by another running process" in other.stderr
    process.send_signal(signal.SIGUSR1)
    told = time.monotonic()
    line = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 75 and time.monotonic() - told < 20
    status = json.loads(Path("checkpoints/status.json").read_text())
    assert status["state"] == "preempted" and status["message"] in line
    words = shlex.split(status["resume"])
    assert words[:2] == ["python", "pretrain_imagenet.py"]
    epochs = str(len(rows()) + 1)
    pretrain_imagenet.main([*words[2:], "--epochs", epochs, "--workers", "0"])
    assert len(rows()) == int(epochs)


def torchrun(tree, *flags):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            str(ROOT / "pretrain_imagenet.py"),
            "--data_dir",
            str(tree),
            "--workers",
            "1",
            *flags,
        ],
        capture_output=True,
        text=True,
    )


def test_torchrun_with_two_processes_and_on_with_one(tree):
    flags = ["--model", "twistnet18", "--img_size", "32", "--batch_size", "4", "--epochs", "2"]
    done = torchrun(tree, *flags)
    assert done.returncode == 0, done.stderr
    assert "global batch 8 (2 × 4), lr 0.003125 (0.1 × 8 / 256)" in done.stdout
    assert done.stdout.count("\nEpoch 1: val_acc") == 1
    assert len(rows()) == 2
    two = torch.load("checkpoints/latest.pt", weights_only=True)
    assert two["config"]["micro_batches"] == 2
    resume(tree, "--epochs", "3")  # on one process: two micro-batches a step
    one = torch.load("checkpoints/latest.pt", weights_only=True)
    assert one["step"] == 3 * two["step"] // 2 and one["config"]["micro_batches"] == 2


def test_validation_counts_do_not_depend_on_the_number_of_processes(tree):
    """A checkpoint that is finished but for its validation is validated by one and by two."""
    pretrain(tree, model="twistnet18", epochs=1, batch_size=2)
    state = torch.load("checkpoints/latest.pt", weights_only=True)
    expected = state["rows"].pop()
    state["sums"] = [[1.0, 1.0]]
    state["clock"] = [1.0, 0.0]
    state["config"]["micro_batches"], state["step"] = 2, 4  # of 2 × 2 images
    torch.save(state, "checkpoints/latest.pt")
    done = torchrun(tree, "--resume", "checkpoints/latest.pt")
    assert done.returncode == 0, done.stderr
    got = rows()[0]
    assert [got[name] for name in ("val_top1", "val_top5")] == [
        expected[name] for name in ("val_top1", "val_top5")
    ]
    assert got["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-12)
