"""train.py end to end, in this process, on a few tiny textures."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train
from common.cli import run
from common.errors import Diverged, Preempted, UserError
from data.synthetic import write_dtd
from models import build_model
from training.checkpoint import FRESH_BEST, load_checkpoint
from training.engine import EvalMetrics, Evaluator, Trainer
from training.loop import TrainLoop
from training.recipes import FINETUNE
from training.run_dir import RunDir

TINY = pytest.mark.usefixtures("tiny_network")
RUN = Path("runs/dtd_fold1_resnet18_seed42")


@pytest.fixture(scope="module")
def dtd(tmp_path_factory):
    """3 classes × 9 images, 2 folds: 9 images per split, 2 steps of 4 per epoch."""
    root = tmp_path_factory.mktemp("data") / "dtd"
    write_dtd(root, images_per_class=9, folds=2, size=40, seed=0, num_classes=3)
    return root


def fine_tune(dtd, *flags, **named):
    named = {
        "data_dir": dtd,
        "model": "resnet18",
        "img_size": 32,
        "batch_size": 4,
        "epochs": 2,
        "workers": 0,
        "pretrained": "none",
        **named,
    }
    train.main(
        [*(word for name, value in named.items() for word in (f"--{name}", str(value))), *flags]
    )


def results(folder=RUN):
    return json.loads((folder / "results.json").read_text())


def best(folder=RUN):
    return torch.load(folder / "best.pt", weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save_weights(name, classes=5, path=None, spoil=None):
    torch.manual_seed(3)
    state = build_model(name, classes).state_dict()
    if spoil:
        state[spoil].view(-1)[0] = float("nan")
    path = Path(path or f"weights/{name}_imagenet.pt")
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)


def test_results_contain_what_a_table_needs(dtd, capsys):
    fine_tune(dtd)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("Epoch")] == [
        "Epoch 1",
        "Epoch 2",
    ]
    assert all(line.split(": ")[1].startswith("val_acc ") for line in lines if "Epoch" in line)
    found = results()
    assert {name: found[name] for name in ("model", "dataset", "fold", "seed", "epochs")} == {
        "model": "resnet18",
        "dataset": "dtd",
        "fold": 1,
        "seed": 42,
        "epochs": 2,
    }
    assert (found["train_images"], found["val_images"], found["test_images"]) == (9, 9, 9)
    rows = [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]
    best_row = max(rows, key=lambda row: row["val_top1"])
    assert (found["best_epoch"], found["val_acc"]) == (best_row["epoch"], best_row["val_top1"])
    assert found["test_acc"] == pytest.approx(100 * found["test_correct"] / 9)
    assert sum(map(sum, found["confusion"])) == 9
    assert sum(found["confusion"][k][k] for k in range(3)) == found["test_correct"]
    hits = [a == b for a, b in zip(found["test_labels"], found["test_predictions"], strict=True)]
    assert sum(hits) == found["test_correct"]
    assert all((dtd / name).is_file() for name in found["test_files"])
    assert found["weights"] == {"source": "none", "sha256": None, "tensors_loaded": 0}
    assert {"settings", "parameters", "seconds", "versions", "commit", "command"} <= found.keys()
    for name in ("config.json", "latest.pt", "best.pt"):
        assert (RUN / name).is_file()


def test_the_same_seed_gives_the_same_bits_for_any_number_of_workers(dtd):
    fine_tune(dtd)
    fine_tune(dtd, workers=2, run_dir="again")
    again = Path("again") / RUN.name
    assert same(best(), best(again))
    assert [results()[k] for k in ("val_acc", "test_acc", "test_predictions")] == [
        results(again)[k] for k in ("val_acc", "test_acc", "test_predictions")
    ]
    fine_tune(dtd, seed=43)
    assert not same(best(), best(Path("runs/dtd_fold1_resnet18_seed43")))


def check_interrupted(dtd, stop_after, capsys, **moment):
    fine_tune(dtd, run_dir="whole")
    stop_after(**moment)
    with pytest.raises(Preempted, match="resume with: python "):
        fine_tune(dtd)
    assert not (RUN / "results.json").exists()
    assert json.loads((RUN / "status.json").read_text())["state"] == "preempted"
    stop_after()
    capsys.readouterr()
    fine_tune(dtd, run_dir=Path("runs").resolve())
    assert same(best(), best(Path("whole") / RUN.name))
    assert results()["test_predictions"] == results(Path("whole") / RUN.name)["test_predictions"]
    return capsys.readouterr().out


def test_an_interrupted_run_resumes_to_the_same_bits_and_a_finished_one_is_left_alone(
    dtd, stop_after, capsys
):
    printed = check_interrupted(dtd, stop_after, capsys, step=2)
    assert f"resuming {RUN.resolve() / 'latest.pt'} in epoch 2, after step 3\n" in printed
    written = (RUN / "results.json").stat().st_mtime_ns
    fine_tune(dtd)
    assert "is finished: val_acc" in capsys.readouterr().out
    assert (RUN / "results.json").stat().st_mtime_ns == written


@TINY
@pytest.mark.parametrize(
    "moment", [{"step": 0}, {"step": 1}, {"validation": 1}, {"step": 3}, {"validation": 2}]
)
def test_interrupted_anywhere_also_before_the_test_a_run_gives_the_same_results(
    dtd, stop_after, capsys, moment
):
    check_interrupted(dtd, stop_after, capsys, **moment)
    assert json.loads((RUN / "status.json").read_text()) == {"state": "finished", "epoch": 2}


@TINY
def test_the_command_that_resumes_does_not_overwrite(dtd, stop_after, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--overwrite", "--fold", "1"])
    stop_after(step=2)
    with pytest.raises(Preempted, match="resume with: python train.py --fold 1$"):
        fine_tune(dtd, "--overwrite")


@TINY
def test_the_tested_epoch_is_the_one_that_is_reported(dtd, monkeypatch):
    fit = TrainLoop.fit

    def fit_and_change_best(train_loop, state):
        fit(train_loop, state)
        content = torch.load(RUN / "best.pt", weights_only=True)
        torch.save({**content, "epoch": content["epoch"] + 1}, RUN / "best.pt")

    monkeypatch.setattr(TrainLoop, "fit", fit_and_change_best)
    with pytest.raises(UserError, match="best.pt is not of the best epoch, .: start again with"):
        fine_tune(dtd)
    assert not (RUN / "results.json").exists()
    assert json.loads((RUN / "status.json").read_text())["state"] == "failed"


@TINY
def test_a_damaged_best_is_one_line_that_says_what_to_do(dtd, stop_after):
    stop_after(validation=2)
    with pytest.raises(Preempted, match="preempted before the test"):
        fine_tune(dtd)
    stop_after()
    (RUN / "best.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged or not of epoch ., the best one: start again"):
        fine_tune(dtd)


@TINY
def test_a_save_that_was_killed_between_its_two_files_is_completed(dtd, stop_after):
    stop_after(step=2)
    with pytest.raises(Preempted):
        fine_tune(dtd)
    stop_after()
    (RUN / "best.pt").rename(RUN / FRESH_BEST)
    fine_tune(dtd)
    assert results()["epochs"] == 2 and not (RUN / FRESH_BEST).exists()


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"damaged")])
@TINY
def test_a_run_without_its_best_is_not_resumed(dtd, stop_after, spoil):
    """Its test result would be that of another epoch."""
    stop_after(step=2)
    with pytest.raises(Preempted):
        fine_tune(dtd)
    stop_after()
    spoil(RUN / "best.pt")
    with pytest.raises(UserError, match="best.pt is missing, damaged or not of epoch 1"):
        fine_tune(dtd)
    fine_tune(dtd, "--overwrite")
    assert results()["epochs"] == 2


@TINY
def test_a_checkpoint_of_the_older_format_is_resumed_to_the_same_bits(
    dtd, stop_after, write_in_old_format
):
    fine_tune(dtd, run_dir="whole")
    stop_after(step=2)
    with pytest.raises(Preempted):
        fine_tune(dtd)
    stop_after()
    clip_norm = json.loads((RUN / "config.json").read_text())["clip_norm"]
    for name in ("latest.pt", "best.pt"):
        weights = load_checkpoint(RUN / name)[0].weights
        write_in_old_format(RUN / name)
        content = torch.load(RUN / name, weights_only=True)
        content["config"]["clip_norm"], content["weights"] = clip_norm, weights
        torch.save(content, RUN / name)
    fine_tune(dtd)
    whole = Path("whole") / RUN.name
    assert same(best(), best(whole)) and results()["weights"] == results(whole)["weights"]


@TINY
@pytest.mark.parametrize(
    ("name", "value"), [("clip_norm", 1e-4), ("weight_decay", 0.5), ("momentum", 0.1)]
)
def test_the_values_of_the_recipe_act(dtd, monkeypatch, name, value):
    fine_tune(dtd)
    monkeypatch.setitem(FINETUNE, name, value)
    fine_tune(dtd, run_dir="other")
    other = Path("other") / RUN.name
    assert not same(best(), best(other)) and results(other)["settings"][name] == value
    assert "num_folds" not in results(other)["settings"]  # which only --dataset folder has


@TINY
@pytest.mark.parametrize(("warmup_steps", "first_lr"), [(100, 0.015), (2, 0.03)])
def test_the_warm_up_has_its_steps_but_at_most_a_tenth_of_the_run(
    dtd, monkeypatch, warmup_steps, first_lr
):
    monkeypatch.setitem(FINETUNE, "warmup_steps", warmup_steps)
    fine_tune(dtd, epochs=20)  # 40 steps, two per epoch
    lines = (RUN / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines[:2]] == pytest.approx(
        [first_lr, 0.03], rel=5e-3
    )


@pytest.mark.parametrize(("pretrained", "factor"), [("auto", 10), ("none", 1)])
def test_a_new_classifier_on_pretrained_weights_learns_faster(dtd, monkeypatch, pretrained, factor):
    monkeypatch.setitem(FINETUNE, "head_lr_factor", 10)
    save_weights("resnet18")
    factors = {}

    def note_factors(loop, state):
        names = {id(p): name for name, p in loop.trainer.model.named_parameters()}
        for group in loop.trainer.optimizer.param_groups:
            factors.update({names[id(p)]: group["lr_factor"] for p in group["params"]})

    monkeypatch.setattr(train.TrainLoop, "fit", note_factors)
    with pytest.raises(UserError):  # nothing was trained that could be tested
        fine_tune(dtd, pretrained=pretrained)
    assert factors.pop("fc.weight") == factors.pop("fc.bias") == factor
    assert set(factors.values()) == {1}


def test_an_interrupted_run_keeps_the_factor_of_its_classifier(dtd, stop_after):
    save_weights("resnet18")
    fine_tune(dtd, pretrained="auto", run_dir="whole")
    stop_after(step=1)
    with pytest.raises(Preempted):
        fine_tune(dtd, pretrained="auto")
    fine_tune(dtd, pretrained="auto")
    assert same(best(), best(Path("whole") / RUN.name))


@TINY
def test_a_finished_run_does_not_need_its_precision(dtd, refuse_precision, capsys):
    fine_tune(dtd, epochs=1)
    refuse_precision()
    fine_tune(dtd, epochs=1)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="the run is in bf16"):
        fine_tune(dtd, epochs=1, seed=2)


@TINY
def test_a_run_keeps_the_precision_that_it_started_with(dtd, monkeypatch, capsys):
    fine_tune(dtd, "--no_amp", epochs=1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    fine_tune(dtd, epochs=1)  # as on a machine with another default
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="precision fp32 → bf16"):
        fine_tune(dtd, "--amp", epochs=1)


@TINY
def test_other_settings_are_named_and_overwrite_archives_the_old_run(dtd):
    fine_tune(dtd, epochs=1)
    with pytest.raises(UserError, match="epochs 1 → 2"):
        fine_tune(dtd)
    with pytest.raises(UserError, match="lr 0.03 → 0.02"):
        fine_tune(dtd, epochs=1, lr=0.02)
    fine_tune(dtd, "--overwrite")
    assert results()["epochs"] == 2
    (old,) = Path("runs/overwritten").iterdir()
    assert old.name.startswith(RUN.name) and results(old)["epochs"] == 1


def test_pretrained_weights_are_found_and_part_of_the_settings(dtd, capsys):
    save_weights("twistnet18")
    fine_tune(dtd, model="twistnet18", pretrained="auto", epochs=1)
    printed = capsys.readouterr().out
    assert "[Auto-detected] Found TwistNet weights: weights/twistnet18_imagenet.pt\n" in printed
    assert (
        "\n[TwistNet Pretrained] Loaded 204 layers from weights/twistnet18_imagenet.pt\n" in printed
    )
    run = Path("runs/dtd_fold1_twistnet18_seed42")
    assert results(run)["weights"]["source"] == "weights/twistnet18_imagenet.pt"
    gates = json.loads((run / "log.jsonl").read_text())["gates"]
    assert len(gates) == 4 and all(0.1 < gate < 0.14 for gate in gates)
    fine_tune(dtd, model="twistnet18", pretrained="auto", epochs=1)  # finished: skipped
    Path("weights").rename("elsewhere")
    fine_tune(
        dtd,
        model="twistnet18",
        epochs=1,  # the same weights from another place
        pretrained="elsewhere/twistnet18_imagenet.pt",
    )
    save_weights("twistnet18", classes=6, path="other.pt")
    with pytest.raises(UserError, match="weights"):
        fine_tune(dtd, model="twistnet18", epochs=1, pretrained="other.pt")


def test_weights_that_do_not_fit_stop_before_training(dtd):
    save_weights("seresnet18", path="other.pt")
    save_weights("resnet18", path="nan.pt", spoil="layer4.1.bn2.running_var")
    for path, message in (("other.pt", "other.pt"), ("nan.pt", "layer4.1.bn2.running_var")):
        with pytest.raises(UserError, match=message):
            fine_tune(dtd, pretrained=path)
    assert not list(Path().glob("runs/*/latest.pt"))


@TINY
def test_no_accuracy_in_any_epoch_still_ends_with_a_test_result(dtd, monkeypatch):
    monkeypatch.setattr(
        EvalMetrics,
        "as_row",
        lambda self, prefix: {f"{prefix}_loss": 9.0, f"{prefix}_top1": 0.0, f"{prefix}_top5": 0.0},
    )
    fine_tune(dtd)
    assert (results()["best_epoch"], results()["val_acc"]) == (1, 0.0)
    assert results()["test_images"] == 9


@TINY
def test_a_test_loss_that_is_nan_is_not_reported(dtd, stop_after, monkeypatch):
    stop_after(validation=2)
    with pytest.raises(Preempted):
        fine_tune(dtd)
    stop_after()
    nan = EvalMetrics(math.nan, 3, 9, 9, [], torch.zeros(9, dtype=torch.int64), overflowed=1)
    monkeypatch.setattr(Evaluator, "run", lambda self, model: nan)
    with pytest.raises(Diverged, match=r"the test loss of epoch \d is not finite"):
        fine_tune(dtd)
    assert not (RUN / "results.json").exists()


@TINY
def test_a_run_that_failed_in_its_first_step_can_be_started_with_other_settings(dtd, monkeypatch):
    def run_out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Trainer, "step", run_out_of_memory)
        fine_tune(dtd, epochs=1)
    fine_tune(dtd, epochs=2)
    assert results()["epochs"] == 2


@TINY
def test_a_broken_test_image_is_never_left_out(dtd, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dtd, copy)
    name = (copy / "labels/test1.txt").read_text().split()[0]
    whole = (copy / "images" / name).read_bytes()
    (copy / "images" / name).write_bytes(b"")
    with pytest.raises(UserError, match=name):  # its header shows it
        fine_tune(copy)
    (copy / "images" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name):  # only decoding shows it
        fine_tune(copy)
    assert not (RUN / "results.json").exists()
    (copy / "images" / name).write_bytes(whole)
    fine_tune(copy)
    assert results()["test_images"] == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fold", "3"], "fold 3"),
        (["--dataset", "folder"], "needs at least 3"),
        (["--data_dir", "nowhere"], "nowhere"),
        (["--model", "vgg"], "vgg"),
        (["--pretrained", "no.pt"], "no.pt"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_before_training(dtd, flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: train.main(["--data_dir", str(dtd), *flags]))
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err
    assert not list(Path().glob("runs/*/latest.pt"))


@pytest.mark.parametrize(
    ("value", "message"),
    [("2", "one process per run"), ("two", "WORLD_SIZE is 'two', not a number")],
)
def test_torchrun_is_refused(dtd, monkeypatch, value, message):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match=message):
        fine_tune(dtd)


@TINY
def test_a_run_without_its_latest_checkpoint_does_not_start_from_zero(dtd):
    fine_tune(dtd)
    for name in ("latest.pt", "results.json"):
        (RUN / name).unlink()
    with pytest.raises(UserError, match="has best.pt without latest.pt: restore it, or start"):
        fine_tune(dtd)


@TINY
def test_overwrite_leaves_nothing_of_the_old_run(dtd):
    fine_tune(dtd)
    (RUN / "output.log").touch()  # of run_all.py
    RunDir(RUN).archive(RUN / "overwritten")
    assert [p.name for p in RUN.iterdir() if p.is_file()] == [".lock"]


@TINY
def test_a_damaged_test_image_is_found_before_training(dtd, tmp_path):
    shutil.copytree(dtd, tmp_path / "damaged")
    name = (dtd / "labels" / "test1.txt").read_text().split()[0]
    path = tmp_path / "damaged" / "images" / name
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="Validation and test use every image"):
        fine_tune(tmp_path / "damaged")
    assert not (RUN / "latest.pt").exists()
