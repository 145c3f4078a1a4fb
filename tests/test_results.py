"""training/results.py: results.json of a run, and what makes it unusable."""

import json

import pytest

from common.errors import UserError
from training.results import describe_accuracies, parse_run_name, read_results, run_name

NAME = "dtd_fold1_resnet18_seed42"
RESULTS = {
    "model": "resnet18", "dataset": "dtd", "fold": 1, "seed": 42, "best_epoch": 3, "val_acc": 50.0,
    "test_acc": 75, "test_correct": 3, "test_images": 4, "train_images": 4, "val_images": 4,
    "classes": ["a", "b"], "confusion": [[2, 1], [0, 1]], "test_labels": [0, 0, 0, 1],
    "test_predictions": [0, 0, 1, 1], "test_files": ["1", "2", "3", "4"], "parameters": 9,
    "gmacs": 0.5, "seconds": 1.5, "settings": {}, "weights": None, "versions": {},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    (tmp_path / NAME).mkdir()

    def write(**changes):
        text = json.dumps({**RESULTS, **changes})
        (tmp_path / NAME / "results.json").write_text(text)
        return tmp_path / NAME

    return write


def test_results_are_read_and_absent_ones_are_none(tmp_path, write):
    assert read_results(tmp_path) is None and read_results(tmp_path / "none") is None
    folder = write()
    assert read_results(folder) == RESULTS
    assert read_results(folder / "results.json") is None  # a file in place of the folder
    assert describe_accuracies(RESULTS) == "val_acc 50.0, test_acc 75.0"
    assert describe_accuracies({"test_acc": 75.0}) == "test_acc 75.0"


def test_older_results_may_lack_what_is_not_required(write):
    required = ("model", "dataset", "fold", "seed", "test_acc")
    folder = write(**{name: None for name in RESULTS if name not in required})
    assert read_results(folder)["test_acc"] == 75


WRONG = {
    "test_acc": [None, "45.2", True, -0.1, 100.1, float("nan"), float("inf"), 10**400, [75]],
    "val_acc": ["x", float("nan")],
    "model": [None, 3],
    "dataset": [None],
    "fold": [None, 1.0, "1", True],
    "seed": ["42"],
    "test_images": ["12", -1, 1.5],
    "train_images": ["x"],
    "val_images": ["x"],
    "test_correct": [-1],
    "parameters": ["x"],
    "gmacs": ["x", float("nan")],
    "seconds": ["x", -1.0],
    "settings": [3, "x", []],
    "weights": ["x"],
    "versions": [[]],
    "classes": [3, [3]],
    "confusion": [3, [[1, None]], [[1, 2], ["x", 1]], [[1, 2], [3]]],
    "test_labels": [3, [None]],
    "test_predictions": [["0"]],
    "test_files": [3, [3]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_value_of_another_type_or_out_of_range_is_named(write, name, value):
    with pytest.raises(UserError, match=f"{NAME}/results.json has .* as its {name}, which must be"):
        read_results(write(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fold": 2}, "is that of dtd_fold2_resnet18_seed42: restore it, or delete it"),
        ({"test_acc": 0.75}, "contradicts itself: 3 of 4 are not 0.75 %"),
        ({"confusion": [[2, 1], [0, 0]]}, "contradicts itself: its confusion has 3 images, not 4"),
        ({"classes": ["a", "b", "c"]}, "its confusion has 2 rows for 3 classes"),
        ({"test_files": ["1"]}, "its test files, labels and predictions differ in number"),
    ],
)
def test_contradictions_are_named(write, changes, told):
    with pytest.raises(UserError, match=told):
        read_results(write(**changes))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_named(write, text):
    folder = write()
    (folder / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is empty, cut off or not JSON: restore it, or delete it"):
        read_results(folder)


def test_results_that_the_machine_cannot_read_need_not_be_deleted(write):
    folder = write()
    (folder / "results.json").unlink()
    (folder / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results.json cannot be read \(Is a directory\)$"):
        read_results(folder)


def test_a_run_name_is_read_back_as_its_parts():
    name = run_name("kth_tips2b", 3, "twistnet18_no_ais", 42)
    assert name == "kth_tips2b_fold3_twistnet18_no_ais_seed42"
    assert parse_run_name(name) == {
        "dataset": "kth_tips2b",
        "fold": 3,
        "model": "twistnet18_no_ais",
        "seed": 42,
    }
    assert parse_run_name("overwritten") is None and parse_run_name(name + ".old") is None
