"""tools/predict.py: the network's classes and probabilities for files and folders."""

import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data.decoding import check_header
from data.images import read_rgb
from data.transforms import EvalTransform, normalise
from models import build_model
from tools import predict

CLASSES = ["banded", "dotted", "müll", "ringed", "woven", "wavy"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model("resnet18", len(CLASSES))
    torch.nn.init.normal_(model.fc.weight)
    return model.eval()


@pytest.fixture
def checkpoint(model):
    torch.save(
        {
            "model": model.state_dict(),
            "classes": CLASSES,
            "config": {"model": "resnet18", "img_size": 48},
        },
        "best.pt",
    )
    return "best.pt"


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def wanted(model, path, size=48):
    """(name, probability) of all classes, best first, computed one image at a time."""
    image = EvalTransform(size)(read_rgb(Path(path)))
    with torch.no_grad():
        chances = model(normalise(image[None]))[0].softmax(0)
    order = chances.argsort(descending=True).tolist()
    return [(CLASSES[i], chances[i].item()) for i in order]


def call(*words):
    predict.main([*map(str, words), "--workers", "0"])


def test_files_and_folders_are_classified_to_the_screen_and_to_csv(model, checkpoint, capsys):
    files = ["one.png", "deep/a/1.png", "deep/b/c/2.PNG"]
    for seed, file in enumerate(files):
        write_image(Path(file), seed)
    write_image(Path("deep/.hidden/3.png"), 9)
    Path("deep/notes.txt").write_text("no image")
    call("one.png", "deep", "--weights", checkpoint, "--csv", "all.csv", "--batch-size", 2)
    lines = capsys.readouterr().out.splitlines()
    with open("all.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["file", "class_1", "probability_1"] and len(header) == 11
    assert [row[0] for row in rows] == files
    for line, row in zip(lines, rows, strict=True):
        best = wanted(model, row[0])[:5]
        assert line == f"{row[0]}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in best)
        assert row[1::2] == [name for name, _ in best]
        assert [float(p) for p in row[2::2]] == pytest.approx([p for _, p in best], abs=1e-5)


def test_unreadable_images_are_named_with_the_reason(model, checkpoint, capsys):
    write_image(Path("in/good.png"), 1)
    Path("in/bad.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        call("in", "--weights", checkpoint, "--csv", "all.csv")
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out.startswith("in/good.png: ") and len(out.splitlines()) == 1
    reason, summary = err.splitlines()
    assert reason.startswith("in/bad.jpg cannot be read as an image (not a format")
    assert summary == "1 of 2 images cannot be read"
    assert len(Path("all.csv").read_text().splitlines()) == 2


def test_classes_and_size_come_from_the_json_beside_the_weights(model, capsys):
    write_image(Path("one.png"), 1)
    torch.save(model.state_dict(), "w.pt")
    call("one.png", "--weights", "w.pt")
    at_224 = wanted(model, "one.png", 224)
    number = CLASSES.index(at_224[0][0])
    assert capsys.readouterr().out.startswith(f"one.png: class {number} {100 * at_224[0][1]:.1f} %")
    sha = predict.load_trained("w.pt")[1]["sha256"]
    Path("w.json").write_text(json.dumps({"class_names": CLASSES, "img_size": 64, "sha256": sha}))
    call("one.png", "--weights", "w.pt")
    name, chance = wanted(model, "one.png", 64)[0]
    assert capsys.readouterr().out.startswith(f"one.png: {name} {100 * chance:.1f} %")
    call("one.png", "--weights", "w.pt", "--img_size", 32)
    name, chance = wanted(model, "one.png", 32)[0]
    assert capsys.readouterr().out.startswith(f"one.png: {name} {100 * chance:.1f} %")


def test_fewer_classes_than_five(capsys):
    torch.save(build_model("resnet18", 2).state_dict(), "two.pt")
    write_image(Path("one.png"), 1)
    call("one.png", "--weights", "two.pt", "--img_size", 32, "--csv", "all.csv")
    assert capsys.readouterr().out.count(" %") == 2
    assert Path("all.csv").read_text().splitlines()[0].count(",") == 4


def test_a_file_name_that_is_not_utf8_is_printed(checkpoint, capsys):
    file = Path(b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    write_image(Path("x.png"), 1)
    Path("x.png").rename(file)
    call(file, "--weights", checkpoint, "--csv", "all.csv")
    assert capsys.readouterr().out.startswith("caf\\xe9.png: ")
    assert b"caf\xe9.png," in Path("all.csv").read_bytes()


def test_classes_of_any_type_have_names(model, capsys):
    config = {"model": "resnet18", "img_size": "48"}
    numbers = list(range(len(CLASSES)))
    torch.save({"model": model.state_dict(), "classes": numbers, "config": config}, "theirs.pt")
    write_image(Path("one.png"), 1)
    call("one.png", "--weights", "theirs.pt")
    best = CLASSES.index(wanted(model, "one.png", 224)[0][0])
    assert capsys.readouterr().out.startswith(f"one.png: {best} ")


def test_a_pipe_named_like_an_image_is_unreadable(checkpoint, capsys):
    os.mkfifo("pipe.png")
    with pytest.raises(SystemExit):
        call("pipe.png", "--weights", checkpoint)
    assert "pipe.png cannot be read as an image" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"pipe\.png cannot be read as an image"):
        check_header(Path("pipe.png"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none.png"], "none.png: no such file"),
        (["empty"], "empty: no images"),
        (["one.png", "--csv", "no/where.csv"], "there is no folder no"),
        (["one.png", "--csv", "n" * 300], "cannot be written .File name too long"),
        (["one.png", "--csv", "/proc/x.csv"], "--csv /proc/x.csv: cannot be written"),
        (["one.png", ""], "an argument is empty"),
        (["one.png", "--batch_size", "0"], "--batch_size"),
        ([], "required: IMAGE"),
    ],
)
def test_wrong_input_is_a_one_line_error(checkpoint, words, told):
    Path("empty").mkdir()
    write_image(Path("one.png"), 1)
    with pytest.raises(ValueError, match=told) as error:
        call(*words, "--weights", checkpoint)
    assert "\n" not in str(error.value)


def test_a_file_on_a_bad_sector_is_named_and_the_others_are_classified(checkpoint, failing, capsys):
    for name in ("a.png", "b.png"):
        write_image(Path(name), 1)
    failing(errno.EIO, 100, "a.png")
    with pytest.raises(SystemExit):
        call("--weights", checkpoint, "a.png", "b.png", "--csv", "out.csv")
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == ["b.png"]
    assert "Input/output error: 'a.png'" in "".join(capsys.readouterr())


def test_files_ignored_by_their_names_are_counted_by_suffix(checkpoint, capsys):
    write_image(Path("in/deep/good.png"), 1)
    for name in ("a.gif", "deep/b.GIF", "c.heic", "deep/README", ".hidden.gif"):
        Path("in", name).write_bytes(b"")
    call("in", "--weights", checkpoint)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("in: ignored by their names: 2 .gif, 1 .heic, 1 without suffix (images")
    Path("in/deep/good.png").unlink()
    with pytest.raises(UserError, match="in: no images in this folder; ignored .* 2 .gif"):
        call("in", "--weights", checkpoint)


def test_checkpoint_is_accepted_as_another_name_of_weights():
    assert predict.parse_args(["x.png", "--checkpoint", "best.pt"]).weights == Path("best.pt")
