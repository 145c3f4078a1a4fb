"""Reading the runs of a sweep: which there are, and which are finished.

A run lies in RUN_DIR/<dataset>_fold<k>_<model>_seed<s>/ and is finished by its results.json alone.
Whatever else lies in RUN_DIR is left alone; what cannot be read is noted and not counted.
"""

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

NAME = re.compile(r"(?P<dataset>.+)_fold(?P<fold>\d+)_(?P<model>.+)_seed(?P<seed>-?\d+)")


@dataclass(frozen=True)
class Run:
    """One cell of a sweep; `results` is None until it is finished."""

    folder: Path
    dataset: str
    model: str
    fold: int
    seed: int
    results: dict | None
    label: str  # the model's name; "name #2" for runs of other settings or weights


def read_runs(run_dir: Path, skip: Collection[str] = ()) -> tuple[list[Run], list[str]]:
    """All run folders in run_dir, finished or not, and a note on each that cannot be counted."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder: give the --run_dir of a sweep")
    runs, notes = [], []
    for folder in sorted(run_dir.iterdir()):
        match = NAME.fullmatch(folder.name)
        if not match or not folder.is_dir() or folder.name in skip:
            continue
        results, problem = read_results(folder)
        if problem:
            notes.append(f"{folder.name}: {problem}; not counted")
        name = results or match.groupdict()
        model, fold, seed = str(name["model"]), int(name["fold"]), int(name["seed"])
        runs.append(Run(folder, str(name["dataset"]), model, fold, seed, results, model))
    return runs, notes


def read_results(folder: Path) -> tuple[dict | None, str | None]:
    """results.json of a run as (results, None); (None, problem) if it cannot be counted."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        name = "{dataset}_fold{fold}_{model}_seed{seed}".format(**results)
        accuracy = float(results["test_acc"])
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"its results.json cannot be read ({type(error).__name__}: {error})"
    if name != folder.name:
        return None, f"its results.json is that of {name}"
    if not math.isfinite(accuracy):
        return None, f"its test accuracy is {accuracy}"
    if not all(isinstance(results.get(k) or {}, dict) for k in ("settings", "weights", "versions")):
        return None, "its results.json holds settings, weights or versions that are no objects"
    return results, None


def read_log(path: Path) -> list[dict]:
    """Epochs of a log.jsonl in order; torn or foreign lines are passed over, the last of an epoch
    counts. A log that is not there is empty."""
    if not path.is_file():
        return []
    epochs = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            epochs[int(entry["epoch"])] = entry
        except (ValueError, KeyError, TypeError, OverflowError):
            continue  # the line being written when the run was killed, or is right now
    return [epochs[epoch] for epoch in sorted(epochs)]
