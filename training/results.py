"""results.json of a finished fine-tuning run: reading it, and what makes it unusable.

Nothing here imports torch, so that a sweep can be tabulated on a machine without it.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError

RESULTS = "results.json"
RUN_NAME = re.compile(r"(?P<dataset>.+)_fold(?P<fold>\d+)_(?P<model>.+)_seed(?P<seed>-?\d+)")


def run_name(dataset: str, fold: int, model: str, seed: int) -> str:
    """Name of the run's folder inside of RUN_DIR; timm/NAME is written timm-NAME in it."""
    return f"{dataset}_fold{fold}_{model.replace('/', '-')}_seed{seed}"


def parse_run_name(name: str) -> dict | None:
    """The dataset, fold, model and seed in a folder's name; None for any other folder."""
    match = RUN_NAME.fullmatch(name)
    if match is None:
        return None
    model = re.sub("^timm-", "timm/", match["model"])
    return {
        "dataset": match["dataset"],
        "fold": int(match["fold"]),
        "model": model,
        "seed": int(match["seed"]),
    }


def read_results(folder: Path) -> dict | None:
    """The results of the finished run in `folder`; None where there are none.

    Raises UserError where they cannot be read, or cannot be those of this run.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        problem = find_problem(results, folder.name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):
        problem = "is empty, cut off or not JSON"
    if problem:
        raise UserError(
            f"{path} {problem}: restore it, or delete it and run the same command again; with its "
            "latest.pt and best.pt the run is only tested again"
        )
    return results


def find_problem(results: object, folder_name: str) -> str | None:
    """Why these cannot be the results of the run in the folder of this name; None if they can."""
    if not isinstance(results, dict):
        return "is not a JSON object"
    # Values that are missing, of another type or out of range.
    for name, (is_valid, what) in FIELDS.items():
        value = results.get(name)
        if (name in REQUIRED or value is not None) and not is_valid(value):
            return f"has {json.dumps(value)[:40]} as its {name}, which must be {what}"
    # Values of another run.
    name = run_name(*(results[key] for key in ("dataset", "fold", "model", "seed")))
    if name != folder_name:
        return f"is that of {name}"
    # Values that contradict each other; older results lack some of them.
    correct, images = results.get("test_correct"), results.get("test_images")
    if correct is not None and images and abs(100 * correct / images - results["test_acc"]) > 1e-6:
        return f"contradicts itself: {correct} of {images} are not {results['test_acc']} %"
    matrix = results.get("confusion")
    if matrix and images and sum(map(sum, matrix)) != images:
        return f"contradicts itself: its confusion has {sum(map(sum, matrix))} images, not {images}"
    names = results.get("classes")
    if matrix and names and len(matrix) != len(names):
        return f"contradicts itself: its confusion has {len(matrix)} rows for {len(names)} classes"
    columns = [results.get(f"test_{name}") or [] for name in ("files", "labels", "predictions")]
    if len({len(column) for column in columns}) > 1:
        return "contradicts itself: its test files, labels and predictions differ in number"
    return None


def describe_accuracies(results: dict) -> str:
    """Such as "val_acc 70.1, test_acc 69.0"; results that were edited may lack the first."""
    names = [name for name in ("val_acc", "test_acc") if results.get(name) is not None]
    return ", ".join(f"{name} {results[name]:.1f}" for name in names)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: object) -> bool:
    return _is_integer(value) and value >= 0


def _is_amount(value: object) -> bool:
    return _is_count(value) or (isinstance(value, float) and math.isfinite(value) and value >= 0)


def is_percentage(value: object) -> bool:
    return _is_amount(value) and value <= 100


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _list_of(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_matrix(value: object) -> bool:
    return _list_of(_list_of(_is_count))(value) and all(len(row) == len(value) for row in value)


# What each value of results.json must be, if it is there.
REQUIRED = ("dataset", "model", "fold", "seed", "test_acc")
FIELDS = {
    **dict.fromkeys(["dataset", "model"], (_is_text, "text")),
    **dict.fromkeys(["fold", "seed", "best_epoch"], (_is_integer, "an integer")),
    **dict.fromkeys(["test_acc", "val_acc"], (is_percentage, "a number from 0 to 100")),
    **dict.fromkeys(["train_images", "val_images", "test_images"], (_is_count, "a count")),
    **dict.fromkeys(["test_correct", "val_correct", "parameters"], (_is_count, "a count")),
    **dict.fromkeys(["gmacs", "seconds"], (_is_amount, "a number of at least 0")),
    **dict.fromkeys(["settings", "weights", "versions"], (_is_object, "an object")),
    **dict.fromkeys(["classes", "test_files"], (_list_of(_is_text), "a list of text")),
    **dict.fromkeys(["test_labels", "test_predictions"], (_list_of(_is_integer), "integers")),
    "confusion": (_is_matrix, "a square matrix of counts"),
}
