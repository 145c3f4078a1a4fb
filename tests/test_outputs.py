"""No tool writes over a file that it was given or that it did not write itself.

The pages of tools.visualize are tested in test_visualize.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.files import MARK_RANGE, check_output_folder, check_outputs
from data.synthetic import write_imagenet_tree
from models import build_model
from tools import demo, export, pack, predict, report

MARK = b"written by this tool"


def check(path, inputs=()):
    check_outputs([Path(path)], flag="--out", mark=MARK, inputs=map(Path, inputs))


def test_a_new_file_and_a_file_of_the_tool_may_be_written():
    check("new.csv")
    Path("start.csv").write_bytes(MARK + b"x" * 3 * MARK_RANGE)
    Path("end.csv").write_bytes(b"x" * 3 * MARK_RANGE + MARK)
    check("start.csv")
    check("end.csv")


def test_a_file_without_the_mark_may_not_be_written():
    Path("mine.csv").write_bytes(b"mine")
    with pytest.raises(UserError, match="--out would overwrite mine.csv, which this tool did not"):
        check("mine.csv")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda name: os.symlink("nowhere", name)])
def test_folders_pipes_and_broken_links_may_not_be_written(make):
    make("x")
    with pytest.raises(UserError, match="which this tool did not write"):
        check("x")


@pytest.mark.parametrize("make", [None, os.link, os.symlink])
def test_an_input_may_not_be_written_by_any_of_its_names(make):
    Path("input.csv").write_bytes(MARK)
    name = "input.csv"
    if make:
        make("input.csv", "other.csv")
        name = "other.csv"
    with pytest.raises(UserError, match=f"overwrite {name}, which is one of the inputs"):
        check(name, inputs=["missing.csv", "input.csv"])


def test_a_file_in_a_missing_folder_may_not_be_written():
    with pytest.raises(UserError, match="--out no/x.csv: there is no folder no"):
        check("no/x.csv")


@pytest.mark.parametrize("name", ["n" * 300, "/proc/x.csv"])
def test_a_name_that_cannot_be_written_is_found_before_the_work(name):
    with pytest.raises(UserError, match=f"--out {name}: cannot be written"):
        check(name)


def test_output_folders_are_new_empty_or_the_tools_own():
    folder = Path("out")

    def check_folder():
        check_output_folder(folder, flag="--out", made_by_tool=["packed.json"])

    check_folder()
    folder.mkdir()
    Path(folder, ".lock").touch()
    check_folder()
    Path(folder, "train.data").touch()
    with pytest.raises(UserError, match=r"--out out contains files .* \(train.data\): choose"):
        check_folder()
    Path(folder, "packed.json").touch()
    check_folder()
    folder = Path("out/packed.json")
    with pytest.raises(UserError, match="--out out/packed.json is a file"):
        check_folder()


# ---------------------------------------------------------------- the tools


@pytest.fixture
def weights():
    model = build_model("resnet18", 3)
    torch.save({"model": model.state_dict(), "config": {"model": "resnet18"}}, "best.pt")
    return "best.pt"


def refusal_of(main, *words):
    with pytest.raises(UserError, match="would overwrite") as error:
        main(list(words))
    return str(error.value)


def test_predict_does_not_overwrite_images_weights_or_other_tables(weights):
    Image.new("RGB", (40, 40)).save("x.png")
    Path("mine.csv").write_text("file,label\n")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    for csv in ("x.png", weights, "mine.csv"):
        words = ("x.png", "--weights", weights, "--img_size", "32", "--workers", "0", "--csv", csv)
        refusal_of(predict.main, *words)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_predict_replaces_its_own_table(weights):
    Image.new("RGB", (40, 40)).save("x.png")
    words = ["--weights", weights, "--img_size", "32", "--workers", "0", "--csv", "table.csv"]
    predict.main(["x.png", *words])
    predict.main(["x.png", "x.png", *words])
    assert len(Path("table.csv").read_text().splitlines()) == 3


def test_export_does_not_overwrite_its_weights_or_another_file(weights):
    Path("weights.pt2").write_bytes(Path(weights).read_bytes())
    Path("other.pt2").write_bytes(b"mine")
    assert "inputs" in refusal_of(export.main, "--weights", "weights.pt2", "--out", "weights.pt2")
    assert "did not write" in refusal_of(export.main, "--weights", weights, "--out", "other.pt2")
    assert Path("weights.pt2").read_bytes() == Path(weights).read_bytes()
    assert Path("other.pt2").read_bytes() == b"mine"


def test_export_replaces_its_own_file(weights, capsys):
    for _ in range(2):
        export.main(["--weights", weights, "--out", "x.pt2"])
    assert capsys.readouterr().out.count("wrote x.pt2") == 2


def test_curves_do_not_overwrite_another_file():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    Path("run").mkdir()
    row = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 50.0}
    Path("run/log.jsonl").write_text(json.dumps(row) + "\n")
    Image.new("RGB", (4, 4)).save("photo.png")
    photo = Path("photo.png").read_bytes()
    refusal_of(lambda words: report.write_curves(*words), [Path("run")], Path("photo.png"))
    assert Path("photo.png").read_bytes() == photo
    for name in ("curves.png", "curves.svg", "curves.pdf"):
        for _ in range(2):  # its own picture is replaced
            report.write_curves([Path("run")], Path(name))
    with pytest.raises(UserError, match="must end in .png"):
        report.write_curves([Path("run")], Path("curves.txt"))


def test_pack_does_not_write_into_a_folder_with_other_files():
    write_imagenet_tree("tree", train_per_class=2, val_per_class=1, size=40, seed=0, num_classes=2)
    Path("out").mkdir()
    Path("out/train.data").write_text("mine")
    words = ["--data_dir", "tree", "--out", "out", "--workers", "0"]
    with pytest.raises(UserError, match=r"--out out contains files .* \(train.data\)"):
        pack.main(words)
    assert [path.name for path in Path("out").iterdir()] == ["train.data"]
    assert Path("out/train.data").read_text() == "mine"
    Path("out/train.data").unlink()
    for _ in range(2):  # its own folder is accepted again
        pack.main(words)


def test_demo_does_not_write_into_a_folder_with_other_files(monkeypatch):
    Path("data/dtd/labels").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["demo", "--out", "."])
    with pytest.raises(UserError, match=r"--out \. contains files .* \(data\)"):
        demo.main()
    assert list(Path("data/dtd/labels").iterdir()) == []
