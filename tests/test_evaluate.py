"""tools/evaluate.py: counts equal to those recorded in training, and what it refuses to compare."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain_imagenet
import train
from data.images import read_rgb
from data.loading import EvalLoader
from data.synthetic import write_dtd, write_imagenet_tree
from data.transforms import EvalTransform, normalise
from models.weights import load_trained
from tools import evaluate

RUN = "runs/dtd_fold1_resnet18_seed42"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pretraining of 2 epochs and a run of 3 epochs, as the scripts write them."""
    root = tmp_path_factory.mktemp("trained")
    write_imagenet_tree(
        root / "tree", train_per_class=8, val_per_class=5, size=48, seed=0, num_classes=6
    )
    write_dtd(root / "dtd", images_per_class=18, folds=2, size=48, seed=1, num_classes=3)
    flags = ["--model", "resnet18", "--img_size", "40", "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pretrain_imagenet.main(
            ["--data_dir", "tree", "--epochs", "2", "--batch_size", "7", "--amp", *flags]
        )
        words = "--data_dir dtd --epochs 3 --batch_size 5 --pretrained none"
        train.main([*words.split(), *flags])
    return root


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of `trained` to change."""
    shutil.copytree(trained, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def unchanged(trained, monkeypatch):
    """The original of `trained`, for tests that write nothing."""
    monkeypatch.chdir(trained)


def call(*words):
    evaluate.main([*map(str, words), "--workers", "0"])


WEIGHTS = ("--weights", "weights/resnet18_imagenet.pt", "--data_dir", "tree")


def test_weights_reach_the_accuracies_in_their_json(unchanged, capsys):
    about = json.loads(Path("weights/resnet18_imagenet.json").read_text())
    call(*WEIGHTS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("weights/resnet18_imagenet.pt, sha256 as its JSON says")
    assert "resize 46, crop 40, bf16" in lines[1]  # as in pretraining
    for name, percent in (("top-1", about["top1"]), ("top-5", about["top5"])):
        count = round(percent * 30 / 100)
        assert f"{name} {percent:.2f} % ({count} of 30)" in lines
        assert (
            f"weights/resnet18_imagenet.json: {name} {percent:.2f} % ({count}): the same count"
            in lines
        )


def test_the_training_images_are_not_needed(folder, capsys):
    shutil.rmtree("tree/train")
    call(*WEIGHTS)
    assert capsys.readouterr().out.count("the same count") == 2


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_run_reaches_its_recorded_results(unchanged, capsys, split):
    results = json.loads(Path(RUN, "results.json").read_text())
    call("--weights", f"{RUN}/best.pt", "--split", split)
    out = capsys.readouterr().out
    count, images = results[f"{split}_correct"], results[f"{split}_images"]
    assert f"fold 1, {split}" in out and f"({count} of {images})" in out
    assert f"{results[f'{split}_acc']:.2f} % ({count}): the same count" in out


def test_batches_are_those_of_training(unchanged, monkeypatch):
    """The rounding of a logit depends on the batch, and may decide between two close classes."""
    sizes = []

    def make_loader(*args, **options):
        sizes.append(options["batch_size"])
        return EvalLoader(*args, **options)

    monkeypatch.setattr(evaluate, "EvalLoader", make_loader)
    call("--weights", f"{RUN}/best.pt")
    call(*WEIGHTS)
    assert sizes == [32, 7]  # train.py evaluates at least 32 at once


def test_another_fold_is_evaluated_with_a_warning(unchanged, capsys):
    call("--weights", f"{RUN}/best.pt", "--fold", 2)
    out = capsys.readouterr().out
    assert "warning: trained on fold 1" in out and "nothing is recorded" in out


def test_size_resize_and_mirror_images(unchanged, capsys):
    call(*WEIGHTS, "--img_size", 32, "--resize", 60, "--flip", "--no_amp")
    out = capsys.readouterr().out
    model, about = load_trained("weights/resnet18_imagenet.pt")
    transform = EvalTransform(32)
    transform.resize = 60
    hits = 0
    for path in sorted(Path("tree/val").glob("*/*")):
        image = normalise(transform(read_rgb(path))[None])
        with torch.no_grad():
            logits = model(image) + model(image.flip(-1))
        hits += about["classes"][logits.argmax()] == path.parent.name
    assert "resize 60, crop 32, fp32, with mirror images" in out
    assert f"({hits} of 30)" in out.split("top-5")[0]


@pytest.mark.parametrize(
    ("percent", "count", "images", "recorded", "told"),
    [
        (70.0, 7, 10, 10, " (7): the same count"),
        (70.0, 7, 10, None, " (7): the same count"),
        (70.0, 9, 10, 10, " (7): 2 more, now +20.00 percentage points"),
        (100 / 3, 0, 3, 3, " (1): 1 fewer, now -33.33 percentage points"),
        (70.0, 2, 3, None, " of another number of images, now -3.33 percentage points"),
        (70.0, 7, 10, 20, " of another number of images, now +0.00 percentage points"),
    ],
)
def test_comparison_of_recorded_and_counted_by_hand(percent, count, images, recorded, told):
    assert evaluate.compare(percent, count, images, recorded) == told


def test_fewer_images_of_the_same_percentage_are_not_the_same_count(folder, capsys):
    path = Path("weights/resnet18_imagenet.json")
    record = json.loads(path.read_text())
    assert record["val_images"] == 30
    path.write_text(json.dumps({**record, "val_images": 60}))
    call(*WEIGHTS)
    assert "of another number of images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"dataset": "folder"}, "--data_dir is required"),
        ({"dataset": "folder", "data_dir": "tree/val"}, "--fold is required"),
        ({"dataset": "folder", "img_size": [40], "data_dir": 3}, "--data_dir is required"),
    ],
)
def test_a_checkpoint_of_another_program_is_taken_for_what_it_says(folder, config, told):
    checkpoint = torch.load(f"{RUN}/best.pt", weights_only=True)
    torch.save({**checkpoint, "config": config}, "theirs.pt")
    assert told in error_of("--weights", "theirs.pt")


def test_a_wrong_record_is_reported(folder, capsys):
    path = Path(RUN, "results.json")
    results = json.loads(path.read_text())
    right = results["test_correct"]
    results["test_acc"] = 100 * (right + 2) / results["test_images"]
    path.write_text(json.dumps(results))
    call("--weights", f"{RUN}/best.pt")
    assert f"({right + 2}): 2 fewer, now -" in capsys.readouterr().out


def error_of(*words):
    with pytest.raises(ValueError) as error:
        call(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_do_not_match_their_json_are_refused(folder):
    weights = torch.load("weights/resnet18_imagenet.pt", weights_only=True)
    weights["fc.bias"][0] += 1
    torch.save(weights, "weights/resnet18_imagenet.pt")
    assert "weights/resnet18_imagenet.json says" in error_of(*WEIGHTS)


def test_weights_without_a_json_are_evaluated(folder, capsys):
    Path("weights/resnet18_imagenet.json").unlink()
    call(*WEIGHTS, "--img_size", 40)
    out = capsys.readouterr().out
    assert "does not name its classes" in out and "nothing is recorded" in out
    assert "top-1 " in out


def test_other_classes_are_refused(folder):
    Path("tree/val/banded").rename("tree/val/zz")
    assert "has other classes than" in error_of(*WEIGHTS)
    state = torch.load(f"{RUN}/best.pt", weights_only=True)
    state["classes"] = state["classes"][::-1]
    torch.save(state, "turned.pt")
    assert "the same classes in another order" in error_of("--weights", "turned.pt")
    shutil.rmtree("tree/val/zz")
    assert "has 6 classes, the data in tree 5" in error_of(*WEIGHTS)


def test_an_unreadable_image_ends_the_evaluation(folder):
    broken = next(Path("tree/val/dotted").iterdir())
    content = broken.read_bytes()
    broken.write_bytes(content[: -len(content) // 2])  # its header is whole
    assert str(broken) in error_of(*WEIGHTS)


def test_other_images_in_the_same_fold_cause_a_warning(folder, capsys):
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save("dtd/images/banded/new.jpg")
    labels = Path("dtd/labels/test1.txt")
    labels.write_text(labels.read_text() + "banded/new.jpg\n")
    call("--weights", f"{RUN}/best.pt", "--data_dir", "dtd")
    out = capsys.readouterr().out
    assert "has other images than the run had" in out and "of another number of images" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--weights", "none.pt", "--data_dir", "tree"), "none.pt"),
        (("--weights", "weights/resnet18_imagenet.pt"), "--data_dir"),
        ((*WEIGHTS, "--fold", "1"), "neither folds nor a test split"),
        ((*WEIGHTS, "--dataset", "dtd"), "--fold"),
        ((*WEIGHTS, "--resize", "39"), "--resize 39"),
        ((*WEIGHTS[:3], "nowhere"), "nowhere"),
        (("--weights", f"{RUN}/best.pt", "--fold", "3"), "--fold 3"),
        (
            ("--weights", f"{RUN}/best.pt", "--dataset", "imagenet", "--data_dir", "tree"),
            "3 classes",
        ),
    ],
)
def test_wrong_input_is_a_one_line_error(unchanged, words, told):
    assert told in error_of(*words)
