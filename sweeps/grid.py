"""The grid of a sweep, models × folds × seeds, and the runs that fill it."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from sweeps.groups import label_groups
from sweeps.results import Run, read_runs


@dataclass
class Sweep:
    """The grid labels × folds × seeds, the runs in it, and what a reader must know about it."""

    run_dir: Path
    dataset: str
    labels: list[str]
    folds: list[int]
    seeds: list[int]
    runs: list[Run]
    outside: list[Run] = field(default_factory=list)  # not in the grid
    notes: list[str] = field(default_factory=list)

    def finished(self, label: str | None = None) -> list[Run]:
        """Finished runs of a row (or of all), in order."""
        found = [run for run in self.runs if run.results and label in (None, run.label)]
        return sorted(found, key=lambda run: (run.label, run.fold, run.seed))

    def accuracies(self, label: str) -> dict[tuple[int, int], float]:
        """Test accuracy in percent of each finished (fold, seed) of a row."""
        return {(r.fold, r.seed): float(r.results["test_acc"]) for r in self.finished(label)}


def read_sweep(
    run_dir: Path,
    *,
    dataset: str | None = None,
    models: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    skip: Collection[str] = (),
) -> Sweep:
    """Read RUN_DIR. The grid is what is given, else sweep.json's, else all that the runs span.

    `skip` names run folders that are not to be counted. Models outside sweep.json get rows too.
    Raises UserError if there is no run at all, or runs of several data sets and no choice.
    """
    run_dir = Path(run_dir)
    runs, notes = read_runs(run_dir, skip)
    plan = {} if models else read_plan(run_dir)
    if dataset not in (None, plan.get("dataset")):
        plan = {}  # of another data set's sweep
    dataset = dataset or plan.get("dataset") or only_dataset(run_dir, runs)
    runs = [run for run in runs if run.dataset == dataset]
    if not runs and not models:
        raise UserError(f"{run_dir} holds no run of {dataset}: give --dataset another name")
    folds = sorted(set(folds or plan.get("folds") or (run.fold for run in runs)))
    seeds = sorted(set(seeds or plan.get("seeds") or (run.seed for run in runs)))
    others = [] if models else sorted({run.model for run in runs})
    models = list(dict.fromkeys([*(models or plan.get("models") or []), *others]))
    inside, outside = [], []
    for run in runs:
        fits = run.fold in folds and run.seed in seeds and run.model in models
        (inside if fits else outside).append(run)
    inside, split = label_groups(inside)
    labels = sorted({*models, *(r.label for r in inside)}, key=lambda x: order_of(x, models))
    return Sweep(run_dir, dataset, labels, folds, seeds, inside, outside, [*notes, *split])


def order_of(label: str, models: list[str]) -> tuple[int, int]:
    """Sorts a model's further groups right behind it."""
    name, _, number = label.partition(" #")
    return models.index(name), int(number or 1)


def read_plan(run_dir: Path) -> dict:
    """sweep.json as run_all.py left it, or {} when there is none."""
    path = run_dir / "sweep.json"
    if not path.is_file():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return {
            "dataset": str(plan["dataset"]),
            "models": [str(name) for name in plan["models"]],
            "folds": [int(fold) for fold in plan["folds"]],
            "seeds": [int(seed) for seed in plan["seeds"]],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): delete or mend it") from error


def only_dataset(run_dir: Path, runs: list[Run]) -> str:
    """The one data set of these runs."""
    names = sorted({run.dataset for run in runs})
    if not names:
        raise UserError(
            f"{run_dir} holds no run folder <dataset>_fold<k>_<model>_seed<s>: give the folder"
            " that train.py or run_all.py had as --run_dir"
        )
    if len(names) > 1:
        raise UserError(f"{run_dir} holds runs of {', '.join(names)}: choose with --dataset")
    return names[0]
