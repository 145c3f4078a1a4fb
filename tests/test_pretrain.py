"""pretrain_imagenet.py end to end, in this process, on a few tiny images."""

import errno
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo
from tiny_network import TinyNetwork

import pretrain_imagenet
from common.cli import run
from common.errors import Diverged, Preempted, UserError
from data import loading
from data.synthetic import write_imagenet_tree
from models import build_model
from models.weights import load_pretrained
from tools import pack
from training.checkpoint import load_checkpoint
from training.distributed import DistributedContext
from training.engine import EvalMetrics
from training.loop import TrainLoop
from training.recipes import PRETRAIN
from training.run_dir import RunDir

TINY_SCRIPT = Path(__file__).with_name("tiny_network.py")
TINY = pytest.mark.usefixtures("tiny_network")
ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("images_per_s", "data_wait", "seconds")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """3 classes, 18 images to train on: with a batch of 4, 4 steps per epoch."""
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


def status(folder="checkpoints"):
    return json.loads((Path(folder) / "status.json").read_text())


def saved(path="checkpoints/latest.pt"):
    return load_checkpoint(Path(path))[0]


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


@TINY
def test_the_log_has_one_row_per_epoch_with_the_rate_used(tree):
    pretrain(tree, epochs=2, lr=64)  # 1.0 for a batch of 4: warm-up of 4 steps, cosine of 4
    lines = [json.loads(line) for line in Path("checkpoints/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["lr"] == 1.0
    assert lines[1]["lr"] == pytest.approx(0.1464466)  # (1 + cos(3/4 π)) / 2


def test_the_final_weights_are_the_last_epochs_and_load_as_torchvisions(tree):
    pretrain(tree)
    latest = torch.load("checkpoints/latest.pt", weights_only=True)
    assert_same(weights(), latest["model"])
    load_pretrained(
        build_model("resnet18", 3), "resnet18", "weights/resnet18_imagenet.pt", keep_head=True
    )


def check_interrupted_twice(tree, stop_after, *, model, first, second):
    """Interrupted in a step or in a validation, and resumed by the same command and by --resume."""
    flags = {"model": model, "epochs": 2}
    pretrain(tree, **flags, checkpoint_dir="whole", weights_dir="whole", workers=2)
    stop_after(**first)
    with pytest.raises(Preempted, match="resume with: .*--resume checkpoints/latest.pt"):
        pretrain(tree, **flags)
    assert status()["state"] == "preempted"
    stop_after(**second)
    with pytest.raises(Preempted):
        pretrain(tree, **flags)
    stop_after()
    resume(tree)
    assert_same(weights(model=model), weights("whole", model))
    assert rows() == rows("whole")
    assert status()["state"] == "finished"


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [("resnet18", {"step": 1}, {"step": 5}), ("twistnet18", {"validation": 1}, {"step": 6})],
)
def test_a_run_that_is_interrupted_twice_ends_with_the_same_bits(
    tree, stop_after, model, first, second
):
    check_interrupted_twice(tree, stop_after, model=model, first=first, second=second)


@TINY
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"step": 0}, {"step": 1}),
        ({"step": 2}, {"validation": 1}),
        ({"step": 3}, {"step": 4}),
        ({"validation": 1}, {"step": 7}),
    ],
)
def test_interrupted_anywhere_a_small_network_ends_with_the_same_bits(
    tree, stop_after, first, second
):
    check_interrupted_twice(tree, stop_after, model="resnet18", first=first, second=second)


@TINY
def test_the_same_command_says_where_it_resumes(tree, stop_after, capsys):
    stop_after(step=5)
    with pytest.raises(Preempted):
        pretrain(tree)
    stop_after()
    capsys.readouterr()
    pretrain(tree)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resuming checkpoints/latest.pt in epoch 2, after step 6"
    assert [line[:8] for line in lines if line.startswith("Epoch")] == ["Epoch 2:", "Epoch 3:"]


@TINY
def test_the_same_command_leaves_a_finished_run_alone_and_writes_its_outputs_again(tree, capsys):
    pretrain(tree, epochs=2)
    latest, before = Path("checkpoints/latest.pt").read_bytes(), rows()
    exported = Path("weights/resnet18_imagenet.pt").read_bytes()
    for path in [*Path("weights").iterdir(), Path("checkpoints/resnet18_imagenet.pt")]:
        path.unlink()
    capsys.readouterr()
    pretrain(tree, epochs=2)
    printed = capsys.readouterr().out
    assert "has finished its 2 epochs: writing its outputs again" in printed
    assert "\nEpoch" not in printed and rows() == before
    assert Path("checkpoints/latest.pt").read_bytes() == latest
    for folder in ("weights", "checkpoints"):
        assert (Path(folder) / "resnet18_imagenet.pt").read_bytes() == exported
        assert (Path(folder) / "resnet18_imagenet.json").is_file()
    assert status() == {"state": "finished", "epoch": 2}


@pytest.mark.parametrize(
    ("flags", "named", "difference"),
    [
        ([], {"epochs": 4}, "epochs 1 → 4"),
        ([], {"lr": 0.2}, "lr 0.1 → 0.2"),
        ([], {"batch_size": None}, "batch_size 4 → 256"),  # its default counts as well
        ([], {"model": "seresnet18", "seed": 1}, "model resnet18 → seresnet18; seed 42 → 1"),
        (["--clip_norm", "5"], {}, "clip_norm 0 → 5.0"),
        (["--amp"], {}, "precision fp32 → mixed"),
        (["--recipe", "a1"], {"batch_size": 4}, "recipe guide → a1"),
    ],
)
@TINY
def test_the_same_folder_with_other_settings_is_refused_by_name(tree, flags, named, difference):
    pretrain(tree, "--no_amp", epochs=1)
    before = Path("checkpoints/latest.pt").read_bytes()
    with pytest.raises(UserError, match=r"already contains a run with other settings") as caught:
        pretrain(tree, *flags, **{"epochs": 1, **named})
    assert difference in str(caught.value) and "--overwrite" in str(caught.value)
    assert Path("checkpoints/latest.pt").read_bytes() == before
    assert status()["state"] in ("finished", "failed")


@TINY
def test_resume_keeps_epochs_and_schedule_and_a_finished_run_only_writes_again(tree):
    pretrain(tree, epochs=2)
    Path("weights/resnet18_imagenet.pt").unlink()
    before = rows()
    resume(tree)
    assert rows() == before and Path("weights/resnet18_imagenet.pt").is_file()
    resume(tree, "--epochs", "4")
    assert [row["epoch"] for row in rows()] == [1, 2, 3, 4]


@TINY
def test_the_number_of_workers_does_not_matter(tree):
    pretrain(tree, epochs=1)
    pretrain(tree, epochs=1, workers=2, checkpoint_dir="two", weights_dir="two")
    assert_same(weights(), weights("two"))


# ------------------------------------------------------------------ --compile


def test_compile_captures_twistnet_whole_and_keeps_the_names_of_its_weights(tree, eager_compiler):
    pretrain(tree, "--compile", model="twistnet18", epochs=1, batch_size=9)
    assert eager_compiler["stats"]["unique_graphs"] == 2  # one of training, one of evaluation
    assert not eager_compiler["graph_break"]
    assert list(weights(model="twistnet18")) == list(build_model("twistnet18", 3).state_dict())


@TINY
def test_compile_does_not_matter(tree, eager_compiler):
    pretrain(tree, epochs=1)
    pretrain(tree, "--compile", epochs=1, checkpoint_dir="compiled", weights_dir="compiled")
    assert eager_compiler["stats"]["unique_graphs"] >= 2  # it was compiled
    assert_same(weights(), weights("compiled"))


@pytest.mark.slow
@TINY
def test_a_compiled_run_is_resumed_without_compiling(tree, stop_after):
    """With torch's own compiler. Its sums have another order, so that only bits differ."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    pretrain(tree, "--no_amp", epochs=2, checkpoint_dir="plain", weights_dir="plain")
    stop_after(step=4)
    with pytest.raises(Preempted, match="--resume checkpoints/latest.pt .*--compile"):
        pretrain(tree, "--no_amp", "--compile", epochs=2)
    stop_after()
    pretrain(tree, "--no_amp", epochs=2)
    assert list(weights()) == list(weights("plain"))
    for name, value in weights("plain").items():
        torch.testing.assert_close(weights()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@TINY
def test_a_compiled_run_of_two_processes_has_plain_names_and_is_resumed_by_one(tree):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    flags = ["--model", "resnet18", "--img_size", "32", "--batch_size", "4", "--epochs", "2"]
    done = torchrun(tree, "--compile", "--no_amp", *flags, script=TINY_SCRIPT)
    assert done.returncode == 0, done.stderr
    assert len(rows()) == 2 and saved().config["micro_batches"] == 2
    assert list(weights()) == list(TinyNetwork(3).state_dict())
    resume(tree, "--epochs", "3")
    assert len(rows()) == 3


def test_the_seed_matters(tree):
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
@TINY
def test_a_flag_that_contradicts_the_resumed_checkpoint_is_refused(tree, flags):
    pretrain(tree, epochs=1)
    name = flags[0].lstrip("-").replace("-", "_")
    with pytest.raises(UserError, match=f"with other settings .*{name} .* → {flags[1]}"):
        resume(tree, *flags)
    resume(tree, "--batch_size", "4", "--lr", "0.1")  # the same values are no contradiction


@TINY
def test_precision_belongs_to_the_run(tree):
    pretrain(tree, "--no_amp", epochs=1)
    with pytest.raises(UserError, match="precision fp32 → mixed"):
        resume(tree, "--amp")
    resume(tree, "--epochs", "2")
    assert saved().config["precision"] == "fp32"


@TINY
def test_resuming_nothing_or_something_else_is_refused(tree):
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


@TINY
def test_resuming_after_images_were_exchanged_is_refused(tree):
    pretrain(tree, epochs=1)
    path = next(path for path in (tree / "train").glob("*/*"))
    path.rename(path.with_name(f"other{path.suffix}"))
    with pytest.raises(UserError, match="18 training images; .* of other names"):
        resume(tree, "--epochs", "2")


@TINY
def test_ranks_that_read_different_checkpoints_do_not_start(tree, monkeypatch):
    class OtherStep(DistributedContext):
        def gather(self, value):
            return [value, value + 1] if type(value) is int else [value]

    class NoCheckpoint(DistributedContext):
        def gather(self, value):
            return [value, False] if value is True else [value]

    pretrain(tree, epochs=1)
    for context, message in (
        (OtherStep(), "ranks have read different states"),
        (NoCheckpoint(), "some ranks do not find checkpoints/latest.pt"),
    ):
        monkeypatch.setattr(pretrain_imagenet, "init_distributed", lambda context=context: context)
        with pytest.raises(UserError, match=message):
            resume(tree, "--epochs", "2")


@TINY
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", ["lr", "precision", "training images", "validation images"])
def test_ranks_that_differ_in_data_or_settings_do_not_start(tree, monkeypatch, name, resumed):
    class OtherRank(DistributedContext):
        def gather(self, value):
            return [value, {**value, name: "x"} if isinstance(value, dict) else value]

    if resumed:
        pretrain(tree, epochs=1)
    monkeypatch.setattr(pretrain_imagenet, "init_distributed", OtherRank)
    with pytest.raises(
        UserError, match=f"the ranks differ in {name}: every machine needs the same"
    ):
        pretrain(tree, *(["--resume", "checkpoints/latest.pt"] if resumed else []), epochs=2)


@TINY
def test_the_command_that_resumes_keeps_folders_and_speed(tree, stop_after):
    stop_after(step=1)
    with pytest.raises(
        Preempted,
        match="--resume checkpoints/latest.pt --workers 0 "
        "--weights_dir elsewhere --save_minutes 3.0$",
    ):
        pretrain(tree, weights_dir="elsewhere", save_minutes=3)


@TINY
def test_resuming_on_other_data_is_refused(tree, tmp_path):
    pretrain(tree, epochs=1)
    write_imagenet_tree(
        tmp_path / "more", train_per_class=7, val_per_class=3, size=40, seed=0, num_classes=3
    )
    with pytest.raises(UserError, match="3 classes and 21 training images; .* 3 classes and 18"):
        resume(tmp_path / "more")


@TINY
def test_overwrite_archives_the_old_run(tree, capsys):
    pretrain(tree, epochs=1)
    latest = Path("checkpoints/latest.pt").read_bytes()
    pretrain(tree, "--overwrite", epochs=1, seed=1)
    (archived,) = Path("checkpoints").glob("overwritten-*")
    assert (archived / "latest.pt").read_bytes() == latest
    assert str(archived) in capsys.readouterr().out
    assert saved().config["seed"] == 1


@TINY
def test_overwrite_does_not_archive_what_torchrun_restarts(tree, monkeypatch):
    pretrain(tree, epochs=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="torchrun has restarted this run"):
        pretrain(tree, "--overwrite", epochs=1)
    assert Path("checkpoints/latest.pt").exists()


@TINY
def test_overwrite_is_refused_where_several_machines_may_restart(tree, monkeypatch):
    """A machine does not count the restarts that another one has caused."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    pretrain(tree, epochs=1)
    with pytest.raises(UserError, match="--overwrite and --max_restarts on several machines"):
        pretrain(tree, "--overwrite", epochs=1)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    pretrain(tree, "--overwrite", epochs=1)


@TINY
def test_only_what_is_left_to_train_needs_the_precision_of_the_run(tree, refuse_precision, capsys):
    pretrain(tree, epochs=1)
    refuse_precision()
    pretrain(tree, epochs=1)
    assert "has finished its 1 epochs" in capsys.readouterr().out
    with pytest.raises(UserError, match="the run is in bf16"):
        pretrain(tree, "--resume", "checkpoints/latest.pt", epochs=2)


@TINY
def test_a_folder_with_a_run_but_without_latest_is_not_overwritten(tree):
    pretrain(tree, epochs=2)
    for name in ("latest.pt", "latest.prev.pt"):
        (Path("checkpoints") / name).unlink()
    with pytest.raises(UserError, match="without latest.pt: resume it with --resume checkpoints/b"):
        pretrain(tree, epochs=2)
    with pytest.raises(UserError, match="latest.pt: no such file; --resume checkpoints/best.pt is"):
        resume(tree)
    best = saved("checkpoints/best.pt").epoch
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--workers", "0", "--resume", "checkpoints/best.pt"]
    )
    assert len(rows()) == 2 and best <= 2 and saved().epoch == 2
    Path("other").mkdir()
    Path("other/log.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match="without latest.pt: archive it with --overwrite, or choo"):
        pretrain(tree, epochs=2, checkpoint_dir="other")


@TINY
def test_a_run_keeps_its_weights_folder_and_a_branch_does_not_write_there(tree, monkeypatch):
    pretrain(tree, epochs=1, weights_dir="own")
    resume(tree, "--epochs", "2")
    about = Path("own/resnet18_imagenet.json").read_text()
    assert json.loads(about)["epochs"] == 2 and not Path("weights").exists()
    monkeypatch.chdir("own")  # from anywhere
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--workers", "0", "--resume", "../checkpoints/latest.pt"]
    )
    monkeypatch.chdir("..")
    assert sorted(os.listdir("own")) == ["resnet18_imagenet.json", "resnet18_imagenet.pt"]
    branch(tree, "--epochs", "3")
    assert Path("weights/resnet18_imagenet.pt").exists()
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--workers", "0", "--resume", "branch/latest.pt"]
    )
    assert json.loads(Path("own/resnet18_imagenet.json").read_text())["epochs"] == 2


@TINY
def test_weights_beside_the_checkpoints_stay_there_when_the_folder_moves(tree, capsys):
    pretrain(tree, epochs=1, weights_dir="checkpoints")
    Path("checkpoints").rename("moved")
    words = ["--data_dir", str(tree), "--workers", "0", "--resume", "moved/latest.pt"]
    pretrain_imagenet.main([*words, "--epochs", "2"])
    assert not Path("checkpoints").exists() and not Path("weights").exists()
    assert "belonged to another run" not in capsys.readouterr().out


@TINY
def test_a_run_does_not_fall_back_behind_its_latest_checkpoint(tree, stop_after):
    words = ["--data_dir", str(tree), "--workers", "0", "--resume"]
    stop_after(step=5)
    with pytest.raises(Preempted):
        pretrain(tree)
    stop_after()
    before = Path("checkpoints/latest.pt").read_bytes()
    for name in ("best.pt", "latest.prev.pt"):
        with pytest.raises(UserError, match="checkpoints/latest.pt is further, after 1 epoch"):
            pretrain_imagenet.main([*words, f"checkpoints/{name}"])
    pretrain(tree, epochs=1, checkpoint_dir="foreign")
    shutil.copy("foreign/latest.pt", "checkpoints/foreign.pt")
    with pytest.raises(UserError, match="foreign.pt is of another run than checkpoints/latest.pt"):
        pretrain_imagenet.main([*words, "checkpoints/foreign.pt"])
    assert Path("checkpoints/latest.pt").read_bytes() == before


@TINY
def test_a_run_that_was_resumed_from_best_is_continued_by_the_same_command(tree, stop_after):
    pretrain(tree, epochs=1)
    for name in ("latest.pt", "latest.prev.pt"):
        Path("checkpoints", name).unlink(missing_ok=True)
    words = ["--data_dir", str(tree), "--workers", "0", "--resume", "checkpoints/best.pt"]
    words += ["--epochs", "3"]
    stop_after(step=7)
    with pytest.raises(Preempted):
        pretrain_imagenet.main(words)
    first = saved().step
    stop_after(step=first)
    with pytest.raises(Preempted):
        pretrain_imagenet.main(words)
    assert saved().step == first + 1
    stop_after()
    pretrain_imagenet.main(words)
    assert saved().epoch == 3 and [row["epoch"] for row in rows()] == [1, 2, 3]


@TINY
@pytest.mark.parametrize("moment", [{"validation": 2}, {"step": 7}])  # after and before it
def test_a_run_that_ends_before_its_schedule_says_so(tree, stop_after, capsys, moment):
    stop_after(**moment)
    with pytest.raises(Preempted):
        pretrain(tree, epochs=8)
    stop_after()
    resume(tree, "--epochs", "2")
    out = capsys.readouterr().out
    assert "warning: the run was meant to have 8 epochs, and its learning rate is still" in out
    rate = saved().history[-1]["lr"]
    assert f"is still {rate:.3g}:" in out and rate == pytest.approx(0.001519, abs=1e-6)
    about = json.loads(Path("weights/resnet18_imagenet.json").read_text())
    assert about["recipe"]["earlier_epochs"] == [8]
    resume(tree)
    assert "was meant to have" not in capsys.readouterr().out


@TINY
def test_overwrite_leaves_nothing_of_the_old_run(tree):
    pretrain(tree, "--tensorboard", epochs=1, weights_dir="checkpoints")
    RunDir(Path("checkpoints")).archive(Path("checkpoints/overwritten"))
    assert [p.name for p in Path("checkpoints").iterdir() if p.is_file()] == [".lock"]


@TINY
def test_changed_validation_images_are_noticed(tree, tmp_path, capsys):
    shutil.copytree(tree, tmp_path / "tree")
    pretrain(tmp_path / "tree", epochs=1)
    for folder in (tmp_path / "tree" / "val").iterdir():
        next(folder.iterdir()).unlink()
    resume(tmp_path / "tree", "--epochs", "2")
    assert "has other validation images than the run had before" in capsys.readouterr().out
    resume(tmp_path / "tree")
    assert "other validation images" not in capsys.readouterr().out


@TINY
def test_a_copied_checkpoint_does_not_overwrite_the_weights_of_its_run(tree, capsys):
    pretrain(tree, epochs=1)
    before = Path("weights/resnet18_imagenet.pt").read_bytes()
    Path("copy").mkdir()
    shutil.copy("checkpoints/latest.pt", "copy")
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--workers", "0", "--resume", "copy/latest.pt", "--epochs", "2"]
    )
    assert "belonged to another run" in capsys.readouterr().out
    assert before in [path.read_bytes() for path in Path("weights").glob("*.*.pt")]


@TINY
def test_damaged_checkpoints_with_an_intact_best_name_it(tree):
    pretrain(tree, epochs=2)
    epoch = saved("checkpoints/best.pt").epoch
    for name in ("latest.pt", "latest.prev.pt"):
        Path("checkpoints", name).write_bytes(b"")
    hint = f"--resume checkpoints/best.pt would continue after epoch {epoch}"
    with pytest.raises(UserError, match=hint):
        pretrain(tree, epochs=2)


@TINY
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": "mine"}, "was made with --recipe mine, which this version does not have"),
        ({"img_size": None}, "latest.pt is not a checkpoint of pretrain_imagenet.py"),
    ],
)
def test_a_checkpoint_of_another_version_is_one_line(tree, change, told):
    pretrain(tree, epochs=1)
    path = Path("checkpoints/latest.pt")
    content = torch.load(path, weights_only=True)
    config = {**content["config"], **change}
    content["config"] = {name: value for name, value in config.items() if value is not None}
    torch.save(content, path)
    with pytest.raises(UserError, match=told):
        resume(tree)


@TINY
def test_warnings_at_the_start(tree, capsys):
    pretrain(tree, epochs=1, weight_decay=100)
    out = capsys.readouterr().out
    assert "warning: a step decays the weights by 16 %: use a smaller --weight_decay" in out
    pretrain(tree, recipe="fast", epochs=1, checkpoint_dir="fast", img_size=48, warmup_epochs=None)
    assert "validation every" not in capsys.readouterr().out


@TINY
def test_a_pack_of_smaller_images_than_validation_needs_is_named(tree, tmp_path, capsys):
    words = ["--data_dir", str(tree), "--workers", "0", "--out", str(tmp_path / "packed")]
    pack.main([*words, "--short_side", "34"])
    pretrain(tmp_path / "packed", epochs=1)
    assert "was packed with --short_side 34, and validation needs 37 px" in capsys.readouterr().out


def test_a_weights_folder_that_cannot_be_written_is_found_at_the_start(tree):
    with pytest.raises(UserError, match="--weights_dir /proc: "):
        pretrain(tree, weights_dir="/proc")
    assert not Path("checkpoints/latest.pt").exists()


# ------------------------------------------------------------------ branches


def branch(tree, *flags, source="checkpoints/latest.pt"):
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--workers", "0", "--resume", source]
        + ["--checkpoint_dir", "branch", *flags]
    )


@TINY
def test_a_run_resumed_into_another_folder_is_another_run(tree):
    """Its weights do not replace those of the run that it was resumed from."""
    pretrain(tree, epochs=2)
    first = Path("weights/resnet18_imagenet.pt").read_bytes()
    before = Path("checkpoints/latest.pt").read_bytes()
    branch(tree, "--epochs", "3")
    (renamed,) = Path("weights").glob("resnet18_imagenet.2*.pt")
    assert renamed.read_bytes() == first != Path("weights/resnet18_imagenet.pt").read_bytes()
    assert json.loads(renamed.with_suffix(".json").read_text())["epochs"] == 2
    assert Path("checkpoints/latest.pt").read_bytes() == before
    assert saved("branch/latest.pt").config["run"] != saved().config["run"]
    resume(tree)  # the first run again: the branch's weights are renamed, too
    assert len(list(Path("weights").glob("resnet18_imagenet.2*.pt"))) == 2


@TINY
def test_a_branch_gets_the_best_epoch_of_its_history(tree, monkeypatch):
    top1 = iter([90.0, 10.0, 20.0])
    as_row = EvalMetrics.as_row
    monkeypatch.setattr(
        EvalMetrics, "as_row", lambda m, prefix: {**as_row(m, prefix), "val_top1": next(top1)}
    )
    pretrain(tree, epochs=2)
    branch(tree, "--epochs", "3")
    assert saved("branch/best.pt").epoch == 1
    assert saved("branch/latest.pt").best_epoch == 1


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"damaged")])
@TINY
def test_a_branch_without_a_usable_best_has_one_at_its_end(tree, spoil, capsys):
    pretrain(tree, epochs=2)
    spoil(Path("checkpoints/best.pt"))
    branch(tree, "--epochs", "3")
    assert saved("branch/best.pt").epoch == 3
    assert "branch/best.pt is missing, damaged or not of epoch 1" in capsys.readouterr().out


@TINY
def test_a_finished_run_can_be_branched_without_training(tree):
    pretrain(tree, epochs=2)
    Path("checkpoints/best.pt").unlink()
    branch(tree)
    assert saved("branch/latest.pt").epoch == saved("branch/best.pt").epoch == 2
    assert_same(weights("branch"), weights("checkpoints"))


@TINY
def test_a_branch_needs_a_folder_of_its_own(tree):
    pretrain(tree, epochs=1)
    pretrain(tree, epochs=1, checkpoint_dir="branch", seed=1)
    before = Path("branch/latest.pt").read_bytes()
    told = "branch already contains another run than checkpoints/latest.pt: {}choose another --che"
    with pytest.raises(
        UserError, match=told.format("resume that one with --resume branch/latest.pt, or ")
    ):
        branch(tree, "--epochs", "2")
    assert Path("branch/latest.pt").read_bytes() == before
    branch(tree, source="branch/latest.pt")  # as it says
    for name in ("latest.pt", "latest.prev.pt"):
        Path("branch", name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=told.format("")):
        branch(tree, "--epochs", "2")


def interrupt_branch(tree, stop_after):
    """Make a branch of a finished run, and stop it after its tenth step."""
    pretrain(tree, epochs=2)
    stop_after(step=9)
    with pytest.raises(Preempted):
        branch(tree, "--epochs", "3")
    stop_after()


@TINY
def test_the_same_command_continues_a_branch(tree, stop_after, capsys):
    interrupt_branch(tree, stop_after)
    begun = saved("branch/latest.pt")
    assert (begun.step, begun.config["branch_of"]) == (10, saved().config["run"])
    capsys.readouterr()
    branch(tree, "--epochs", "3")
    assert "resuming branch/latest.pt in epoch 3, after step 10" in capsys.readouterr().out
    assert saved("branch/latest.pt").config["run"] == begun.config["run"]
    pretrain(tree, epochs=3, checkpoint_dir="whole")
    assert saved("branch/latest.pt").step == saved("whole/latest.pt").step == 12


@TINY
def test_a_branch_of_an_older_version_is_continued(tree, stop_after, capsys):
    interrupt_branch(tree, stop_after)
    content = torch.load("branch/latest.pt", weights_only=True)
    del content["config"]["branch_from"]
    torch.save(content, "branch/latest.pt")
    branch(tree, "--epochs", "3")
    assert "resuming branch/latest.pt in epoch 3" in capsys.readouterr().out


@TINY
def test_a_branch_that_crashes_in_its_first_step_can_be_started_again(tree, monkeypatch):
    pretrain(tree, epochs=2)
    with pytest.raises(UserError, match="--epochs 1 is less than the run has trained: it has fini"):
        branch(tree, "--epochs", "1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(TrainLoop, "train_epoch", raise_out_of_memory)
        branch(tree, "--epochs", "3")
    branch(tree, "--epochs", "3")
    assert saved("branch/latest.pt").epoch == 3
    pretrain(tree, epochs=1, checkpoint_dir="other", seed=1)
    with pytest.raises(UserError, match="branch already contains another run than other/latest.pt"):
        branch(tree, source="other/latest.pt")


@TINY
def test_a_branch_whose_first_save_fails_can_be_started_again(tree, monkeypatch):
    pretrain(tree, epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoint.write_atomic", raise_disk_full)
        with pytest.raises(UserError, match="could not be written to branch"):
            branch(tree, "--epochs", "3")
    branch(tree, "--epochs", "3")
    assert saved("branch/latest.pt").epoch == 3


@TINY
def test_another_checkpoint_of_the_same_run_does_not_continue_a_branch(tree):
    pretrain(tree, epochs=2)
    branch(tree, "--epochs", "3", source="checkpoints/latest.prev.pt")
    with pytest.raises(UserError, match="branch already contains another run than checkpoints/lat"):
        branch(tree, "--epochs", "3")


def raise_disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raise_out_of_memory(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("global_batch", "advice"),
    [(None, "or start a new run in another --checkpoint_dir"), (8, "or a smaller --batch_size")],
)
def test_more_processes_than_the_run_has_micro_batches_are_refused(global_batch, advice):
    config = {"micro_batches": 2, "batch_size": 4, "global_batch": global_batch}
    with pytest.raises(UserError, match=f"4 processes cannot share evenly: .* divides 2, {advice}"):
        pretrain_imagenet.make_sampler(100, config, DistributedContext(world_size=4))


@TINY
def test_too_few_epochs_leave_a_finished_run_as_it_is(tree, capsys):
    pretrain(tree, epochs=2)
    with pytest.raises(UserError, match="--epochs 1 is less than the run has trained: it has fini"):
        resume(tree, "--epochs", "1")
    assert json.loads(Path("checkpoints/status.json").read_text())["state"] == "finished"
    assert "writing its outputs again" not in capsys.readouterr().out


@TINY
def test_an_epoch_that_has_begun_is_not_said_to_be_the_last(tree, stop_after, capsys):
    stop_after(step=7)
    with pytest.raises(Preempted):
        pretrain(tree, epochs=3)
    capsys.readouterr()
    with pytest.raises(UserError, match="--epochs 1 is less than .*: its epoch 2 has begun"):
        resume(tree, "--epochs", "1")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------ the recipe


@TINY
def test_the_clip_norm_of_the_recipe_and_of_the_flag_acts(tree, monkeypatch):
    def first_epoch(*flags, name):
        pretrain(tree, *flags, epochs=1, checkpoint_dir=name, weights_dir=name, lr=6.4)
        return weights(name)["conv1.weight"], rows(name)[0]

    free, row = first_epoch("--no_amp", "--clip_norm", "0", name="free")
    flag, clipped_row = first_epoch("--no_amp", "--clip_norm", "0.01", name="flag")
    monkeypatch.setitem(PRETRAIN["guide"], "clip_norm", 0.01)
    recipe, _ = first_epoch("--no_amp", name="recipe")
    assert torch.equal(flag, recipe) and not torch.equal(flag, free)
    assert saved("recipe/latest.pt").config["clip_norm"] == 0.01
    assert row["grad_norm"] > 0.01 and clipped_row["grad_norm"] > 0.01  # before clipping


@TINY
def test_a_checkpoint_of_the_older_format_resumes_to_the_same_bits_without_clipping(
    tree, stop_after, write_in_old_format, monkeypatch
):
    pretrain(tree, "--clip_norm", "0", checkpoint_dir="whole", weights_dir="whole")
    stop_after(step=5)
    with pytest.raises(Preempted):
        pretrain(tree, "--clip_norm", "0")
    stop_after()
    write_in_old_format(Path("checkpoints/latest.pt"))
    monkeypatch.setitem(PRETRAIN["guide"], "clip_norm", 0.01)  # what a new run has
    with pytest.raises(UserError, match=r"clip_norm 0 → 5\.0"):
        pretrain(tree, "--clip_norm", "5")
    pretrain(tree)
    assert_same(weights(), weights("whole"))

    def without_norms(rows):
        return [{k: v for k, v in row.items() if not k.startswith("grad_norm")} for row in rows]

    assert without_norms(rows()) == without_norms(rows("whole"))
    assert rows()[2] == rows("whole")[2] and saved().config["clip_norm"] == 0


# ------------------------------------------------------------------ weights, data, failures


@TINY
def test_weights_of_another_run_are_renamed(tree, capsys):
    Path("weights").mkdir()
    Path("weights/resnet18_imagenet.pt").write_bytes(b"twelve days")
    Path("weights/resnet18_imagenet.json").write_text("{}")
    pretrain(tree, epochs=1)
    (old,) = Path("weights").glob("resnet18_imagenet.2*.pt")
    assert old.read_bytes() == b"twelve days" and old.with_suffix(".json").exists()
    assert (
        f"weights/resnet18_imagenet.pt belonged to another run: it is now {old}"
        in capsys.readouterr().out
    )
    resume(tree)  # the same run writes over its own
    assert len(list(Path("weights").glob("*.pt"))) == 2


@TINY
def test_small_sets_and_short_runs(tree, capsys):
    pretrain(tree, epochs=2, batch_size=64, warmup_epochs=5)
    printed = capsys.readouterr().out
    assert "each epoch is one step of 18 images" in printed
    assert "warm-up is a tenth of it, 0 of 2 steps" in printed
    assert len(rows()) == 2 and rows()[-1]["lr"] > 0


def break_an_image(tree, part):
    path = sorted((tree / part).glob("*/*"))[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])
    return path, content


@TINY
def test_every_way_out_is_in_status_json_and_the_run_can_be_resumed(tree, monkeypatch):
    broken, content = break_an_image(tree, "val")
    try:
        with pytest.raises(UserError, match="1 validation images cannot be decoded"):
            pretrain(tree)
    finally:
        broken.write_bytes(content)
    assert status()["state"] == "failed" and str(broken) in status()["message"]

    monkeypatch.setattr(loading, "SHARED_MEMORY", Path("/"))
    usage = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="too little for 1 loader"):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        pretrain(tree, workers=1)
    assert status()["state"] == "failed" and "--shm-size" in status()["message"]

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(TrainLoop, "fit", out_of_memory)
        pretrain(tree)
    advice = "out of memory: use a smaller --batch_size or --img_size (CUDA"
    assert status()["message"].startswith(advice)

    with pytest.raises(UserError, match="lr 0.1 → 0.2"):
        pretrain(tree, lr=0.2)
    assert status()["message"].startswith("out of memory")  # a refused command did not run

    pretrain(tree)  # after all of them
    assert status() == {"state": "finished", "epoch": 3} and len(rows()) == 3


def out_of_memory(train_loop, state):
    train_loop.run_dir.write_status("running")
    raise RuntimeError("CUDA error: out of memory")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tree):
    with pytest.raises(Diverged, match=r"not finite at epoch \d step \d+, learning rate 1"):
        pretrain(tree, lr=1e12, warmup_epochs=0)
    assert not list(Path("weights").iterdir())
    assert status()["state"] == "diverged"


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
def test_bad_input_is_one_line_and_exit_2(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: pretrain_imagenet.main(flags))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1 and message in err


def test_a_signalled_process_saves_and_leaves_with_75(tree):
    flags = "--model resnet18 --img_size 32 --batch_size 4 --epochs 500 --workers 1"
    script = ROOT / "pretrain_imagenet.py"
    command = [sys.executable, script, "--data_dir", tree, *flags.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_first_epoch(process)
    other = subprocess.run(command, capture_output=True, text=True)  # while the first one runs
    assert other.returncode == 3 and "in use by another running process" in other.stderr
    process.send_signal(signal.SIGUSR1)
    told = time.monotonic()
    line = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 75 and time.monotonic() - told < 20
    told_by_file = status()
    assert told_by_file["state"] == "preempted" and told_by_file["message"] in line
    words = shlex.split(told_by_file["resume"])
    script = str(ROOT / "pretrain_imagenet.py")  # the run was started in another folder
    assert words[:2] == ["python", script]
    epochs = str(len(rows()) + 1)
    pretrain_imagenet.main([*words[2:], "--epochs", epochs, "--workers", "0"])
    assert len(rows()) == int(epochs)


def test_ctrl_c_of_a_program_whose_output_goes_through_tee_saves_and_exits_with_75(tree):
    """Ctrl-C ends the tee as well; its terminal knows ASCII only."""
    flags = ["--img_size", "32", "--batch_size", "4", "--epochs", "5000", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, TINY_SCRIPT, "--data_dir", tree, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    tee = subprocess.Popen(
        ["tee", "out.txt"],
        stdin=process.stdout,
        stdout=subprocess.DEVNULL,
        process_group=process.pid,
    )
    process.stdout.close()
    wait_for_first_epoch(process)
    os.killpg(process.pid, signal.SIGINT)
    assert tee.wait() == -signal.SIGINT and process.wait() == 75
    assert status()["state"] == "preempted" and saved().step > 0
    assert "global batch 4 (1 \\xd7 4)" in Path("out.txt").read_text()


def wait_for_first_epoch(process):
    log = Path("checkpoints/log.jsonl")
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)


def torchrun(tree, *flags, script=ROOT / "pretrain_imagenet.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(script), "--data_dir", str(tree), "--workers", "1", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_of_two_processes_is_resumed_by_one(tree):
    flags = ["--model", "twistnet18", "--img_size", "32", "--batch_size", "4", "--epochs", "2"]
    done = torchrun(tree, *flags)
    assert done.returncode == 0, done.stderr
    assert "global batch 8 (2 × 4), lr 0.003125 (0.1 × 8 / 256)" in done.stdout
    assert done.stdout.count("\nEpoch 1: val_acc") == 1
    assert len(rows()) == 2
    two = saved()
    assert two.config["micro_batches"] == 2
    resume(tree, "--epochs", "3")  # on one process: two micro-batches per step
    one = saved()
    assert one.step == 3 * two.step // 2 and one.config["micro_batches"] == 2


@TINY
def test_validation_counts_do_not_depend_on_the_number_of_processes(tree):
    """A checkpoint that lacks only its validation is validated by one and by two processes."""
    pretrain(tree, epochs=1, batch_size=2)
    content = torch.load("checkpoints/latest.pt", weights_only=True)
    expected = content["history"].pop()
    content.update(epoch=0, best_epoch=0, loss_sums=[[1.0, 1.0]], seconds=1.0)
    content["config"]["micro_batches"], content["step"] = 2, 4  # of 2 × 2 images
    torch.save(content, "checkpoints/latest.pt")
    done = torchrun(tree, "--resume", "checkpoints/latest.pt", script=TINY_SCRIPT)
    assert done.returncode == 0, done.stderr
    got = rows()[0]
    assert [got[name] for name in ("val_top1", "val_top5")] == [
        expected[name] for name in ("val_top1", "val_top5")
    ]
    assert got["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-12)
