"""training/run_config.py: what a run is, and when two runs are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from training.results import RESULTS, run_name
from training.run_config import (
    CONFIG,
    check_same_config,
    describe_differences,
    find_differences,
    load_config,
    load_finished,
)

ROOT = Path(__file__).resolve().parent.parent


def config(**changes) -> dict:
    return {
        "dataset": "dtd", "fold": 1, "seed": 42, "model": "resnet18", "epochs": 100,
        "batch_size": 32, "lr": 0.01, "img_size": 224, "precision": "fp32", "weight_decay": 1e-4,
        "data": "abc", "weights": {"source": "w.pt", "sha256": "12"}, "data_dir": "data/dtd",
        **changes,
    }  # fmt: skip


def test_differences_are_named_and_paths_do_not_count():
    old = config()
    moved = config(data_dir="elsewhere", weights={"source": "other.pt", "sha256": "12"})
    assert find_differences(old, moved) == {}
    assert find_differences(config(num_folds=10), config(num_folds=5)) == {}
    new = config(epochs=10, weights={"source": "w.pt", "sha256": "34"})
    assert find_differences(old, new) == {"epochs": (100, 10), "weights": ("12", "34")}
    assert describe_differences(old, new) == "epochs 100 → 10; weights 12 → 34"
    assert find_differences(old, new, ignore=("epochs", "weights")) == {}
    without = {name: value for name, value in old.items() if name != "lr"}
    assert describe_differences(without, old) == "lr None → 0.01"


def test_other_images_and_weights_are_described_in_words():
    new = config(data="def", weights={"source": "x.pt", "sha256": "cd" * 32})
    old = config(weights={"source": "x.pt", "sha256": "ab" * 32})
    text = describe_differences(old, new)
    assert text == "other images, labels or classes; weights abababababab → cdcdcdcdcdcd"


def test_a_run_of_other_settings_is_refused_with_the_remedies(tmp_path):
    check_same_config(tmp_path, config(), config())
    with pytest.raises(UserError, match=r"different settings \(lr 0.01 → 0.1\): .*--overwrite"):
        check_same_config(tmp_path, config(), config(lr=0.1))


def test_the_configuration_is_found_in_started_and_in_finished_runs(tmp_path):
    assert load_config(tmp_path) is None and load_finished(tmp_path, config()) is None
    folder = tmp_path / run_name("dtd", 1, "resnet18", 42)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config()))
    assert load_config(folder) == config()
    assert load_finished(folder, config()) is None
    settings = {name: value for name, value in config().items() if name != "weights"}
    results = {"settings": settings, "weights": config()["weights"], "test_acc": 70.0}
    results |= {name: settings[name] for name in ("dataset", "fold", "model", "seed")}
    (folder / CONFIG).unlink()
    (folder / RESULTS).write_text(json.dumps(results))
    assert load_config(folder) == config()
    assert load_finished(folder, config())["test_acc"] == 70.0
    with pytest.raises(UserError, match="seed 42 → 43"):
        load_finished(folder, config(seed=43))


def test_it_does_not_import_torch():
    code = "import sys, training.run_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
