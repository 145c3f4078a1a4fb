"""The rows of a sweep's table: who is compared with whom, and what a reader must be told."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import UserError
from sweeps.grid import Sweep
from sweeps.groups import data_of, differences, settings_of
from sweeps.results import Run
from sweeps.statistics import Comparison, Summary, compare, fold_means, holm, summarise


@dataclass(frozen=True)
class Row:
    """One line of the table. `versus` is None for the baseline and where no fold is in both."""

    label: str
    parameters: int | None
    summary: Summary
    versus: Comparison | None = None
    p_holm: float | None = None
    best: bool = False


def pick_baseline(sweep: Sweep, name: str | None = None) -> str:
    """The model that others are compared with: `name`, else resnet18, else the sweep's first."""
    if name is None:
        return "resnet18" if "resnet18" in sweep.labels else sweep.labels[0]
    if name not in sweep.labels:
        choice = ", ".join(sweep.labels)
        raise UserError(f"--baseline {name} is not in {sweep.run_dir}: choose from {choice}")
    return name


def make_rows(sweep: Sweep, baseline: str) -> list[Row]:
    """All rows in the sweep's order, Holm's correction over those that have a p."""
    base = fold_means(sweep.accuracies(baseline), sweep.folds, sweep.seeds)
    rows = []
    for label in sweep.labels:
        cells, runs = sweep.accuracies(label), sweep.finished(label)
        versus = None
        if label != baseline:
            own = fold_means(cells, sweep.folds, sweep.seeds)
            versus = compare(own, base, test_ratio(runs))
        parameters = runs[0].results.get("parameters") if runs else None
        rows.append(Row(label, parameters, summarise(cells, sweep.folds, sweep.seeds), versus))
    adjusted = holm([row.versus.p if row.versus else None for row in rows])
    complete = [r.summary.mean for r in rows if not r.summary.missing]
    top = max(complete) if len(complete) > 1 else None
    return [
        replace(row, p_holm=p, best=not row.summary.missing and row.summary.mean == top)
        for row, p in zip(rows, adjusted, strict=True)
    ]


def test_ratio(runs: Sequence[Run]) -> float | None:
    """Test images / images trained on, over these runs; None where results do not say."""
    test = sum(run.results.get("test_images") or 0 for run in runs)
    train = sum(run.results.get("train_images") or 0 for run in runs)
    return test / train if test and train else None


def footnotes(sweep: Sweep, rows: Sequence[Row], baseline: str) -> list[str]:
    """What a reader must know to read the table: method, marks, what was kept apart."""
    unit = rows[0].summary.unit
    how = "seeds averaged within a fold" if unit == "folds" else "folds averaged within a seed"
    notes = [f"Test accuracy on {sweep.dataset}: mean ± std (ddof 1) over {unit}, {how}."]
    if any(row.summary.mean is not None and row.summary.std is None for row in rows):
        notes.append(f"± –: one of the {unit} only, which gives no std.")
    tests = sum(row.versus is not None and row.versus.p is not None for row in rows)
    if len(rows) > 1:
        notes.append(
            f"Difference: percentage points against {baseline}, paired by fold; "
            "W/T/L: folds won, tied, lost."
        )
        if tests:
            ratio = test_ratio(sweep.finished())
            notes.append(
                "95 % CI and p: Nadeau-Bengio corrected resampled t test (test images / images "
                f"trained on = {ratio:.2f}). p (Holm): corrected for {tests} "
                f"comparison{'s' * (tests != 1)}. p (sign-flip): exact permutation over folds, "
                "not corrected for the folds' overlap."
            )
        else:
            notes.append("Fewer than 3 complete folds in common: no interval and no p.")
    if any(row.summary.missing for row in rows):
        grid = f"{counted(len(sweep.folds), 'fold')} × {counted(len(sweep.seeds), 'seed')}"
        notes.append(
            f"† runs of {grid} that are not finished: the mean is over complete {unit} only, a "
            "difference over folds complete in both."
        )
    return notes + unlike_baseline(sweep, baseline) + sweep.notes


def unlike_baseline(sweep: Sweep, baseline: str) -> list[str]:
    """A note on each row whose runs are not the baseline's but for the network."""
    notes, base = [], {(r.fold, r.seed): r.results for r in sweep.finished(baseline)}
    for label in sweep.labels:
        pairs = [(r.results, base.get((r.fold, r.seed))) for r in sweep.finished(label)]
        pairs = [pair for pair in pairs if pair[1]]
        if label == baseline or not pairs:
            continue
        own, other = (settings_of(results) for results in pairs[0])
        changed = differences({**own, "weights": other["weights"]}, other)
        if changed:
            notes.append(f"Not a like comparison: {label} ran with {changed} in {baseline}.")
        data = [(data_of(a), data_of(b)) for a, b in pairs]
        if any(a and b and a != b for a, b in data):
            notes.append(f"Not a like comparison: {label} and {baseline} saw different images.")
    return notes


def best_label(rows: Sequence[Row]) -> str | None:
    """The row with the highest mean, complete rows first; None where no row has a mean."""
    found = [row for row in rows if row.summary.mean is not None]
    best = max(found, key=lambda row: (not row.summary.missing, row.summary.mean), default=None)
    return best.label if best else None


def counted(count: int, thing: str) -> str:
    """1 fold, 2 folds."""
    return f"{count} {thing}{'s' * (count != 1)}"
