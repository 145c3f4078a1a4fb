"""The runs of a sweep: which there are, which were planned, and which belong together.

A run is stored in RUN_DIR/<dataset>_fold<k>_<model>_seed<s>/ and is finished once it has a
results.json. Other files in RUN_DIR are ignored; results that cannot be read are noted.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from common.errors import UserError
from common.files import lock_folder, printable, write_json
from training.results import parse_run_name, read_results
from training.run_config import LOG, NOT_COMPARED, brief, comparable, config_of, find_differences

PLAN = "sweep.json"
Key = tuple[int, int]  # (fold, seed)

# settings that say which run it is, or that change nothing: runs that differ only in these are
# averaged (`data`, the fingerprint of the splits, differs from fold to fold)
IDENTITY_KEYS = ("model", "fold", "seed", "data", *NOT_COMPARED)


@dataclass(frozen=True)
class Run:
    """One run; `results` is None until it is finished."""

    folder: Path
    dataset: str
    model: str
    fold: int
    seed: int
    results: dict | None
    label: str  # the model's name; "name #2" for runs of other settings or weights

    @property
    def key(self) -> Key:
        return self.fold, self.seed


@dataclass
class Sweep:
    """All runs of one dataset in RUN_DIR, grouped into the rows of a table by their labels."""

    run_dir: Path
    dataset: str
    labels: list[str]  # of the rows, in order
    runs: list[Run]
    planned: dict[str, set[Key]]  # by model
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know

    def finished(self, label: str | None = None) -> list[Run]:
        """Finished runs of a row (or of all rows), in order."""
        found = [run for run in self.runs if run.results and label in (None, run.label)]
        return sorted(found, key=lambda run: (run.label, run.fold, run.seed))

    def accuracies(self, label: str) -> dict[Key, float]:
        """Test accuracy in percent of each finished (fold, seed) of a row."""
        return {run.key: float(run.results["test_acc"]) for run in self.finished(label)}

    def expected(self, label: str) -> set[Key]:
        """(fold, seed) of all runs that a row should have: those planned, and those finished."""
        return self.planned[model_of(label)] | self.accuracies(label).keys()

    @property
    def all_expected(self) -> set[Key]:
        """(fold, seed) of all runs that any row should have."""
        return set().union(*(self.expected(label) for label in self.labels))

    @property
    def folds(self) -> list[int]:
        return sorted({fold for fold, _ in self.all_expected})


def model_of(label: str) -> str:
    """The model of a row: "resnet18" for "resnet18 #2"."""
    return label.partition(" #")[0]


# ---------------------------------------------------------------- reading


def read_sweep(run_dir: Path, *, dataset: str | None = None) -> Sweep:
    """Read all runs of one dataset in RUN_DIR, and what run_all.py planned there.

    `dataset` may be None where RUN_DIR contains only one. A model that was never planned (its runs
    were started one by one) should have all runs that were planned for the others; without any
    plan, each model should have all folds × seeds that RUN_DIR contains.

    Raises UserError if there is no run at all, or if there are several datasets and no choice.
    """
    run_dir = Path(run_dir)
    runs, notes = read_runs(run_dir)
    plans = read_plans(run_dir)
    dataset = dataset or only_dataset(run_dir, runs, plans)
    others = Counter(run.dataset for run in runs if run.dataset != dataset)
    if others:
        counts = ", ".join(f"{count} of {name}" for name, count in sorted(others.items()))
        notes.append(f"Not in this table: runs of other datasets ({counts}).")
    runs = [run for run in runs if run.dataset == dataset]
    plans = [plan for plan in plans if plan["dataset"] == dataset]
    if not runs and not plans:
        raise UserError(f"{run_dir} contains no run of {dataset}: give another --dataset")

    # rows, in the order in which the models were planned
    named = [model for plan in plans for model in plan["models"]]
    models = list(dict.fromkeys([*named, *sorted(run.model for run in runs)]))
    planned = plan_by_model(models, plans, runs)
    stray = [r.folder.name for r in runs if not r.results and r.key not in planned[r.model]]
    if stray:
        notes.append(
            f"Not in this table: runs that are not finished and not planned ({some(stray)})."
        )
    runs = [run for run in runs if run.results or run.key in planned[run.model]]
    runs, groups = label_groups(runs)
    labels = sorted(
        {*models, *(run.label for run in runs)},
        key=lambda label: (models.index(model_of(label)), int(label.partition(" #")[2] or 1)),
    )
    return Sweep(run_dir, dataset, labels, runs, planned, [*notes, *groups])


def read_runs(run_dir: Path) -> tuple[list[Run], list[str]]:
    """All runs in run_dir, finished or not, and a note on each that cannot be counted."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder: give the --run_dir of a sweep")
    runs, notes = [], []
    for folder in sorted(run_dir.iterdir()):
        name = parse_run_name(folder.name)
        if name is None or not folder.is_dir():
            continue
        results = None
        try:
            results = read_results(folder)
        except UserError as error:
            notes.append(f"Not counted: {error}.")
            print(f"warning: not counted: {error}", file=sys.stderr)
        if results and results.get("classes"):  # folder names may have bytes of any encoding
            results["classes"] = [printable(name) for name in results["classes"]]
        runs.append(Run(folder, **name, results=results, label=name["model"]))
    return runs, notes


def read_log(folder: Path) -> list[dict]:
    """The epochs in the log.jsonl of a run, in order; [] where there is no log.

    Incomplete and foreign lines are skipped; of several lines of one epoch the last one counts.
    """
    path = folder / LOG
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


def only_dataset(run_dir: Path, runs: Sequence[Run], plans: Sequence[dict]) -> str:
    """The one dataset that was planned here, or, without a plan, that the runs have."""
    names = sorted({plan["dataset"] for plan in plans} or {run.dataset for run in runs})
    if not names:
        raise UserError(
            f"{run_dir} contains no run folder <dataset>_fold<k>_<model>_seed<s>: give the folder"
            " that train.py or run_all.py had as --run_dir"
        )
    if len(names) > 1:
        raise UserError(f"{run_dir} contains runs of {', '.join(names)}: choose with --dataset")
    return names[0]


# ---------------------------------------------------------------- what was planned


def add_plan(
    run_dir: Path,
    *,
    dataset: str,
    models: Sequence[str],
    folds: Sequence[int],
    seeds: Sequence[int],
) -> None:
    """Add a grid of runs to those in RUN_DIR/sweep.json, which other run_all.py may write too."""
    new = {"dataset": dataset, "models": [*models], "folds": [*folds], "seeds": [*seeds]}
    with lock_folder(run_dir, wait=60):  # another one writes its plan, which takes a moment
        plans = read_plans(run_dir)
        before = set().union(*(planned_runs(plan) for plan in plans))
        if not planned_runs(new) <= before:
            write_json(run_dir / PLAN, {"sweeps": [*plans, new]})


def read_plans(run_dir: Path) -> list[dict]:
    """The grids that were planned in RUN_DIR: dataset, models, folds and seeds of each."""
    path = run_dir / PLAN
    if not os.path.lexists(path):
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plans = content.get("sweeps", [content])  # older files store a single grid
        problem = next(filter(None, map(find_plan_problem, plans)), None)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, RecursionError):
        problem = "it is not the JSON that run_all.py writes"
    if problem:
        raise UserError(f"{path} cannot be used: {problem}: correct or delete it")
    return plans


def find_plan_problem(plan: dict) -> str | None:
    """What is wrong with a grid of sweep.json; None if it is one."""
    kinds = {"dataset": str, "models": str, "folds": int, "seeds": int}
    for name, kind in kinds.items():
        values = [plan.get(name)] if name == "dataset" else plan.get(name)
        if not (isinstance(values, list) and values and all(type(v) is kind for v in values)):
            what = "text" if kind is str else "integers"
            return f"its {name} must be {what if name == 'dataset' else f'a list of {what}'}"
    return None


def planned_runs(plan: dict) -> set[tuple]:
    """(dataset, model, fold, seed) of all runs of a grid."""
    return set(product([plan["dataset"]], plan["models"], plan["folds"], plan["seeds"]))


def plan_by_model(
    models: Sequence[str], plans: Sequence[dict], runs: Sequence[Run]
) -> dict[str, set[Key]]:
    """The (fold, seed) that each model should have, as read_sweep says."""
    planned: dict[str, set[Key]] = {}
    for plan in plans:
        for model in plan["models"]:
            planned.setdefault(model, set()).update(product(plan["folds"], plan["seeds"]))
    everything = set().union(*planned.values())
    if not plans:
        everything = set(product({run.fold for run in runs}, {run.seed for run in runs}))
    return {model: planned.get(model, everything) for model in models}


# ---------------------------------------------------------------- which runs belong together


def label_groups(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Label runs of one model that differ in settings, weights or data, and note the difference.

    The largest group keeps the model's name, the others are "name #2", "name #3", …; unfinished
    runs stay with the largest. Runs of one fold must have seen the same images, and runs of
    different folds the same number of images.
    """
    # What most runs have seen.
    labelled, notes = [run for run in runs if not run.results], []
    finished = [run for run in runs if run.results]
    counts = Counter(filter(None, (count_images(run.results) for run in finished)))
    usual_count = counts.most_common(1)[0][0] if counts else None
    variants = {fold: rank_data(finished, fold) for fold in {run.fold for run in finished}}

    def images_of(run: Run) -> list:
        variant = variants[run.fold].index(as_text(data_of(run.results)))
        return [count_images(run.results) or usual_count, variant]

    for model in dict.fromkeys(run.model for run in finished):
        # Runs of equal settings and images.
        groups: dict[str, list[Run]] = {}
        for run in finished:
            if run.model == model:
                how = comparable(settings_of(run.results), IDENTITY_KEYS)
                groups.setdefault(as_text([how, images_of(run)]), []).append(run)
        # The largest group keeps the name.
        largest, *rest = sorted(groups.values(), key=len, reverse=True)
        labelled += largest
        for number, group in enumerate(rest, 2):
            label = f"{model} #{number}"
            labelled += [replace(run, label=label) for run in group]
            changes = describe_settings(group[0].results, largest[0].results)
            if not changes or images_of(group[0]) != [usual_count, 0]:
                changes = ", ".join(filter(None, [changes, "other images than most runs"]))
            names = some([run.folder.name for run in group])
            notes.append(f"{label} is kept apart from {model}: {changes} ({names})")
    return labelled, notes


def settings_of(results: dict) -> dict:
    """The configuration of a finished run and its classes, with the weights by their contents."""
    return {**config_of(results), "classes": results.get("classes")}


def data_of(results: dict) -> object:
    """What tells the images of a run from those of others: a fingerprint, or the test files."""
    return (results.get("settings") or {}).get("data") or results.get("test_files")


def count_images(results: dict) -> int | None:
    """Images of the whole dataset, which all folds share; None where results do not say.

    None for DTD, too, whose folds are lists of any length.
    """
    if results.get("dataset") == "dtd":
        return None
    counts = [results.get(f"{split}_images") for split in ("train", "val", "test")]
    return None if None in counts else sum(counts)


def rank_data(runs: Sequence[Run], fold: int) -> list[str]:
    """What the runs of a fold saw, the data of most runs first."""
    seen = Counter(as_text(data_of(run.results)) for run in runs if run.fold == fold)
    return [data for data, _ in seen.most_common()]


def describe_settings(results: dict, other: dict, ignore: Sequence[str] = ()) -> str:
    """How settings differ from those of another run: "epochs 10 instead of 100, …"."""
    changes = find_differences(settings_of(other), settings_of(results), (*IDENTITY_KEYS, *ignore))
    return ", ".join(
        f"{k} {brief(new)} instead of {brief(old)}" for k, (old, new) in changes.items()
    )


def some(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def as_text(value: object) -> str:
    """A value of results.json as something to compare and count."""
    return json.dumps(value, sort_keys=True)
