"""training/export.py: the weights that pretraining exports, and those of other runs kept."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import Diverged
from training.export import archive_previous, write_weights


def record(run="a", **more):
    return {"model": "x", "top1": 50.0, "recipe": {"run": run, "epochs": 2}, **more}


def network(value=1.0):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    nn.init.constant_(model[0].weight, value)
    return model


def test_the_same_weights_and_record_are_written_into_each_folder(tmp_path, capsys):
    model, folders = network(), [tmp_path / "one", tmp_path / "deep" / "two"]
    write_weights(model, record(), "x_imagenet", folders)
    one, two = (folder / "x_imagenet.pt" for folder in folders)
    assert one.read_bytes() == two.read_bytes()
    loaded = torch.load(one, weights_only=True)
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.items())
    about = json.loads(one.with_suffix(".json").read_text())
    assert about == json.loads(two.with_suffix(".json").read_text())
    assert list(about)[:3] == ["model", "top1", "recipe"] and about["recipe"]["run"] == "a"
    assert about["sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()
    assert about["parameters"] == 2 * 3 + 3 + 3 + 3  # without BatchNorm's statistics
    assert capsys.readouterr().out == f"wrote {one}\nwrote {two}\n"


def test_a_run_replaces_its_own_weights(tmp_path):
    for value in (1.0, 2.0):
        write_weights(network(value), record(), "x", [tmp_path])
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.pt"]
    assert torch.load(tmp_path / "x.pt", weights_only=True)["0.weight"][0, 0] == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: None,
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"recipe": "guide"}'),
        lambda path: path.write_text('{"recipe": {}}'),
    ],
)
def test_weights_of_another_run_are_renamed_by_their_date(tmp_path, spoil, capsys):
    write_weights(network(1.0), record("a"), "x", [tmp_path])
    first = (tmp_path / "x.pt").read_bytes()
    spoil(tmp_path / "x.json")
    had_record = (tmp_path / "x.json").exists()
    written = time.mktime((2026, 3, 4, 5, 6, 7, 0, 0, -1))
    os.utime(tmp_path / "x.pt", (written, written))
    write_weights(network(2.0), record("b"), "x", [tmp_path])
    old = tmp_path / "x.2026-03-04_050607.pt"
    assert old.read_bytes() == first and old.with_suffix(".json").exists() == had_record
    assert json.loads((tmp_path / "x.json").read_text())["recipe"]["run"] == "b"
    assert f"x.pt belonged to another run: it is now {old}" in capsys.readouterr().out


def test_weights_of_the_same_second_do_not_replace_each_other(tmp_path):
    path = tmp_path / "x.pt"
    for content in ("1", "2", "3"):
        path.write_text(content)
        os.utime(path, (1e9, 1e9))
        archive_previous(path, {"recipe": {"run": "b"}})
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["1", "2", "3"]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = network()
    model[1].running_var[1] = float("nan")
    with pytest.raises(Diverged, match=r"1\.running_var is not finite: the weights were not writt"):
        write_weights(model, record(), "x", [tmp_path])
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_weights_of_the_run_whole(tmp_path, monkeypatch):
    write_weights(network(1.0), record(), "x", [tmp_path])
    before = {path.name: path.read_bytes() for path in Path(tmp_path).iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_weights(network(2.0), record(), "x", [tmp_path])
    assert {path.name: path.read_bytes() for path in Path(tmp_path).iterdir()} == before
