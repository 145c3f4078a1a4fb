"""train.py end to end, in this process, on a few tiny textures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from common.errors import Preempted, UserError
from data.synthetic import write_dtd
from models import build_model
from training.engine import Score
from training.preemption import StopRequest

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/dtd_fold1_resnet18_seed42")


@pytest.fixture(scope="module")
def dtd(tmp_path_factory):
    """3 classes × 9 images, 2 folds: 9 images a split, 2 steps of 4 an epoch."""
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


def test_results_hold_what_a_table_needs(dtd, capsys):
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


def test_same_seed_same_bits_whatever_the_workers(dtd):
    fine_tune(dtd)
    fine_tune(dtd, workers=2, run_dir="again")
    again = Path("again") / RUN.name
    assert same(best(), best(again))
    assert [results()[k] for k in ("val_acc", "test_acc", "test_predictions")] == [
        results(again)[k] for k in ("val_acc", "test_acc", "test_predictions")
    ]
    fine_tune(dtd, seed=43)
    assert not same(best(), best(Path("runs/dtd_fold1_resnet18_seed43")))


def test_interrupted_goes_on_and_finished_is_left_alone(dtd, monkeypatch, capsys):
    fine_tune(dtd, run_dir="whole")
    polls = iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="resume with: python "):
        patch.setattr(StopRequest, "__bool__", lambda self: next(polls) == 4)
        fine_tune(dtd)
    assert not (RUN / "results.json").exists()
    fine_tune(dtd, run_dir=Path("runs").resolve())
    assert same(best(), best(Path("whole") / RUN.name))
    assert results()["test_predictions"] == results(Path("whole") / RUN.name)["test_predictions"]
    written = (RUN / "results.json").stat().st_mtime_ns
    fine_tune(dtd)
    assert "is finished: val_acc" in capsys.readouterr().out
    assert (RUN / "results.json").stat().st_mtime_ns == written


def test_what_goes_on_with_a_run_does_not_overwrite_it(dtd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--overwrite", "--fold", "1"])
    polls = iter(range(100))
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: next(polls) == 4)
    with pytest.raises(Preempted, match="resume with: python train.py --fold 1$"):
        fine_tune(dtd, "--overwrite")


def test_the_tested_epoch_is_the_one_that_is_reported(dtd, monkeypatch):
    fit = train.Run.fit

    def with_an_old_best(run):
        fit(run)
        state = torch.load(RUN / "best.pt", weights_only=True)
        torch.save({**state, "rows": [*state["rows"], {}]}, RUN / "best.pt")

    monkeypatch.setattr(train.Run, "fit", with_an_old_best)
    with pytest.raises(UserError, match="best.pt is not the run's best epoch"):
        fine_tune(dtd)
    assert not (RUN / "results.json").exists()


def test_a_run_keeps_the_precision_it_was_begun_with(dtd, monkeypatch, capsys):
    fine_tune(dtd, "--no_amp", epochs=1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    fine_tune(dtd, epochs=1)  # as on a machine with another default
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="precision fp32 → bf16"):
        fine_tune(dtd, "--amp", epochs=1)


def test_other_settings_are_named_and_overwrite_moves_the_old_run(dtd):
    fine_tune(dtd, epochs=1)
    with pytest.raises(UserError, match="epochs 1 → 2"):
        fine_tune(dtd)
    with pytest.raises(UserError, match="lr 0.01 → 0.02"):
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


@pytest.mark.parametrize(
    "named, error, message",
    [
        ({"fold": 3}, UserError, "fold 3"),
        ({"dataset": "folder"}, UserError, "needs at least 3"),
        ({"data_dir": "nowhere"}, UserError, "nowhere"),
        ({"pretrained": "nowhere.pt"}, UserError, "nowhere.pt"),
    ],
)
def test_bad_input_stops_before_training(dtd, named, error, message):
    with pytest.raises(error, match=message):
        fine_tune(dtd, **named)
    assert not list(Path().glob("runs/*/latest.pt"))


def test_weights_that_do_not_fit_stop_before_training(dtd):
    save_weights("seresnet18", path="other.pt")
    save_weights("resnet18", path="nan.pt", spoil="layer4.1.bn2.running_var")
    for path, message in (("other.pt", "other.pt"), ("nan.pt", "layer4.1.bn2.running_var")):
        with pytest.raises(UserError, match=message):
            fine_tune(dtd, pretrained=path)
    assert not list(Path().glob("runs/*/latest.pt"))


def test_no_accuracy_in_any_epoch_still_ends_with_a_test_result(dtd, monkeypatch):
    monkeypatch.setattr(
        Score,
        "row",
        lambda self, prefix: {f"{prefix}_loss": 9.0, f"{prefix}_top1": 0.0, f"{prefix}_top5": 0.0},
    )
    fine_tune(dtd)
    assert (results()["best_epoch"], results()["val_acc"]) == (1, 0.0)
    assert results()["test_images"] == 9


def test_a_broken_test_image_is_never_left_out(dtd, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dtd, copy)
    name = (copy / "labels/test1.txt").read_text().split()[0]
    whole = (copy / "images" / name).read_bytes()
    (copy / "images" / name).write_bytes(b"")
    with pytest.raises(UserError, match=name):  # a quick look tells
        fine_tune(copy)
    (copy / "images" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name):  # only decoding tells
        fine_tune(copy)
    assert not (RUN / "results.json").exists()
    (copy / "images" / name).write_bytes(whole)
    fine_tune(copy)
    assert results()["test_images"] == 9


def test_bad_input_is_one_line_and_exit_2(dtd):
    def call(*flags):
        return subprocess.run(
            [sys.executable, ROOT / "train.py", "--data_dir", dtd, *flags],
            capture_output=True,
            text=True,
        )

    for flags, message in (
        (["--fold", "99"], "fold 99"),
        (["--model", "vgg"], "vgg"),
        (["--pretrained", "no.pt"], "no.pt"),
    ):
        done = call(*flags)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr
