"""Models compared: the rows of the table, class by class, and what a reader must be told."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.errors import UserError
from sweeps.runs import PLAN, Run, Sweep, data_of, describe_settings, some
from sweeps.statistics import (
    SAME,
    Comparison,
    Summary,
    compare,
    fold_means,
    holm,
    summarise,
    why_no_tests,
)


@dataclass(frozen=True)
class Row:
    """One line of the table. `versus` is None for the baseline and where no fold is in both."""

    label: str
    parameters: int | None
    gmacs: float | None  # multiply-adds per image, in billions
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
    """All rows in the sweep's order, with Holm's correction over the rows that have a p."""
    test = why_no_tests() is None
    rows = []
    for label in sweep.labels:
        runs, versus = sweep.finished(label), None
        if label != baseline:
            own, base = paired_means(sweep, label, baseline)
            pairs = [*runs, *sweep.finished(baseline)]
            paired = [run for run in pairs if run.fold in own.keys() & base.keys()]
            versus = compare(own, base, resampling_ratio(paired), test=test)
        first = runs[0].results if runs else {}
        summary = summarise(sweep.accuracies(label), sweep.expected(label), sweep.all_expected)
        rows.append(Row(label, first.get("parameters"), first.get("gmacs"), summary, versus))
    adjusted = holm([row.versus.p if row.versus else None for row in rows])
    complete = [row for row in rows if row.summary.mean is not None and not row.summary.missing]
    highest = max(row.summary.mean for row in complete) if len(complete) > 1 else math.inf
    return [
        replace(row, p_holm=p, best=row in complete and highest - row.summary.mean < SAME)
        for row, p in zip(rows, adjusted, strict=True)
    ]


def paired_means(sweep: Sweep, label: str, baseline: str) -> tuple[dict, dict]:
    """Fold → mean accuracy of a row and of the baseline, over the seeds that both should have."""
    expected = sweep.expected(label) & sweep.expected(baseline)
    return (
        fold_means(sweep.accuracies(label), expected),
        fold_means(sweep.accuracies(baseline), expected),
    )


def resampling_ratio(runs: Sequence[Run]) -> float | None:
    """Test images / images trained on, over these runs; None where any result does not say."""
    counts = [run.results.get(f"{split}_images") for run in runs for split in ("test", "train")]
    return sum(counts[::2]) / sum(counts[1::2]) if counts and all(counts) else None


def best_label(rows: Sequence[Row]) -> str | None:
    """The row with the highest mean, complete rows first; None where no row has a mean."""
    found = [row for row in rows if row.summary.mean is not None]
    best = max(found, key=lambda row: (not row.summary.missing, row.summary.mean), default=None)
    return best.label if best else None


# ---------------------------------------------------------------- footnotes


def footnotes(sweep: Sweep, rows: Sequence[Row], baseline: str) -> list[str]:
    """What a reader must know to read the table: method, marks, what was kept apart."""
    unit = rows[0].summary.unit
    how = "seeds averaged within a fold" if unit == "folds" else "folds averaged within a seed"
    notes = [f"Test accuracy on {sweep.dataset}: mean ± std (ddof 1) over {unit}, {how}."]
    if any(row.summary.mean is not None and row.summary.std is None for row in rows):
        notes.append(f"± –: no std, because only one {unit[:-1]} is in the mean.")
    if len(rows) > 1:
        notes.append(
            f"Difference: percentage points against {baseline}, paired by fold; "
            "W/T/L: folds won, tied, lost."
        )
        notes += describe_tests(sweep, rows)
    if any(row.summary.missing for row in rows):
        notes.append(
            f"† runs that are missing, of the {rows[0].summary.runs} (fold, seed) that were "
            f"planned or that another row has. A mean is over complete {unit} only, a difference "
            "over folds complete in both."
        )
    for row in rows:
        own, base = sweep.expected(row.label), sweep.expected(baseline)
        if own != base:
            notes.append(
                f"{row.label}: planned or run with other folds or seeds than {baseline}; its "
                f"difference is over the {count(len(own & base), 'run')} that both have."
            )
        if row.summary.left_out and not row.summary.missing:
            runs = count(row.summary.left_out, "finished run")
            notes.append(f"{row.label}: {runs} not in the mean, which is over complete {unit}.")
    empty = [row.label for row in rows if row.summary.mean is None and sweep.finished(row.label)]
    if empty:
        advice = "Run the others of these folds and seeds"
        if any(sweep.expected(label) - sweep.accuracies(label).keys() for label in empty):
            advice += f", or remove what will not be run from {sweep.run_dir / PLAN}"
        notes.append(
            f"{', '.join(empty)}: no mean, because no {unit[:-1]} has all of its runs. {advice}."
        )
    notes += describe_weights(sweep) + describe_differences(sweep, baseline)
    return notes + describe_versions(sweep) + sweep.notes


def describe_tests(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """How the intervals and p values of the table were computed, and why others are absent."""
    compared = [row for row in rows if row.versus]
    notes = []
    ratios = {row.label: f"{row.versus.ratio:.2f}" for row in compared if row.versus.p is not None}
    if ratios:
        used = min(ratios.values())
        if len(set(ratios.values())) > 1:
            used = ", ".join(f"{ratio} ({label})" for label, ratio in ratios.items())
        interval = "95 % CI and p" if any(row.versus.low is not None for row in compared) else "p"
        notes.append(
            f"{interval}: corrected resampled t test (Nadeau and Bengio, 2003), with test images "
            f"/ images trained on = {used}."
        )
    tests = sum(row.versus.p is not None for row in compared)
    if tests:
        flips = ""
        if any(row.versus.sign_flip_p is not None for row in compared):
            flips = ", and an exact sign-flip p, which does not correct for the folds' overlap"
        notes.append(
            f"p (Holm): corrected for {count(tests, 'comparison')} (Holm, 1979). table.csv also "
            f"has the uncorrected p{flips}."
        )
    problem = why_no_tests()
    if problem and any(row.versus.folds >= 3 for row in compared):
        notes.append(f"No intervals and no p values: {problem}.")
    for reason in dict.fromkeys(row.versus.untested for row in compared if row.versus.untested):
        labels = [row.label for row in compared if row.versus.untested == reason]
        notes.append(f"{', '.join(labels)}: {reason}.")
    return notes


def describe_weights(sweep: Sweep) -> list[str]:
    """A note on what each row started from, and how many tensors of it were loaded."""
    parts = []
    for label in sweep.labels:
        weights = next((run.results.get("weights") for run in sweep.finished(label)), None) or {}
        if weights.get("source") == "none":
            parts.append(f"{label} random")
        elif weights.get("source"):
            loaded = weights.get("tensors_loaded")
            details = [count(loaded, "tensor") if loaded else None, weights.get("pretraining")]
            details = ", ".join(filter(None, details))
            parts.append(f"{label} {weights['source']}" + (f" ({details})" if details else ""))
    return [f"Initial weights: {'; '.join(parts)}."] if parts else []


def describe_differences(sweep: Sweep, baseline: str) -> list[str]:
    """A note on each row whose runs differ from the baseline's in more than the network."""
    notes, base = [], {run.key: run.results for run in sweep.finished(baseline)}
    for label in sweep.labels:
        own = sweep.finished(label)
        pairs = [(run.results, base[run.key]) for run in own if run.key in base]
        if label == baseline or not pairs:
            continue
        changes = describe_settings(*pairs[0], ignore=("weights",))
        if changes:
            notes.append(f"Not like for like: {label} ran with {changes} in {baseline}.")
        origins = [origin_of(results) for results in pairs[0]]
        if len(set(origins)) > 1:
            own, other = (origin or "weights of unknown pretraining" for origin in origins)
            how = f"{label} started from {own}, {baseline} from {other}"
            notes.append(f"Not like for like: {how}.")
        data = [(data_of(a), data_of(b)) for a, b in pairs]
        data += [
            (a.get(f"{split}_images"), b.get(f"{split}_images"))
            for a, b in pairs
            for split in ("train", "test")
        ]
        if any(a and b and a != b for a, b in data):
            notes.append(f"Not like for like: {label} and {baseline} saw different images.")
    return notes


def origin_of(results: dict) -> str | None:
    """What pretraining a run's weights come from; None where its results do not say."""
    weights = results.get("weights") or {}
    if weights.get("source") == "none":
        return "random weights"
    published = None if weights.get("sha256") else weights.get("source")
    return weights.get("pretraining") or published


def describe_versions(sweep: Sweep) -> list[str]:
    """A note on each of this code and torch of which the table has runs of several versions."""
    results = [run.results for run in sweep.finished()]
    commits = {shorten_commit(str(each["commit"])) for each in results if each.get("commit")}
    versions = {str((each.get("versions") or {}).get("torch") or "") for each in results} - {""}
    return [
        f"The runs are of {len(found)} versions of {what}: {some(sorted(found))}."
        for what, found in (("this code", commits), ("torch", versions))
        if len(found) > 1
    ]


def shorten_commit(commit: str) -> str:
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def count(number: int, thing: str) -> str:
    """1 fold, 2 folds."""
    return f"{number} {thing}{'s' * (number != 1)}"


# ---------------------------------------------------------------- class by class


@dataclass(frozen=True)
class ClassPair:
    """Two classes taken for one another; indices into the class names, counts of predictions."""

    a: int
    b: int
    a_as_b: int
    b_as_a: int
    share: float  # of all tests of images of both classes


def confusion(runs: Sequence[Run]) -> tuple[list[str], np.ndarray] | None:
    """Class names, and the confusion summed over runs: [C, C], true class by predicted class.

    None where no run has a confusion. Runs of other classes than the first one are left out.
    """
    classes, total = None, None
    for run in runs:
        names, counts = run.results.get("classes"), run.results.get("confusion")
        if names and counts and names == (classes or names):
            classes, total = names, np.array(counts) + (0 if total is None else total)
    return None if classes is None else (classes, total)


def class_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Percent of each true class that is predicted right, [C]; NaN for a class without images."""
    seen = matrix.sum(axis=1)
    return np.where(seen > 0, 100 * matrix.diagonal() / np.maximum(seen, 1), np.nan)


def class_differences(
    sweep: Sweep, label: str, baseline: str
) -> tuple[list[str], np.ndarray] | None:
    """Accuracy per class minus the baseline's, percentage points, over runs finished in both."""
    both = sweep.accuracies(label).keys() & sweep.accuracies(baseline).keys()
    own, base = (
        confusion([run for run in sweep.finished(name) if run.key in both])
        for name in (label, baseline)
    )
    if own is None or base is None or own[0] != base[0]:
        return None
    return own[0], class_accuracy(own[1]) - class_accuracy(base[1])


def confused_pairs(matrix: np.ndarray, most: int = 5) -> list[ClassPair]:
    """The pairs of classes with the largest share of their tests taken for one another."""
    seen = matrix.sum(axis=1)
    pairs = []
    for a in range(len(matrix)):
        for b in range(a + 1, len(matrix)):
            there, back = int(matrix[a, b]), int(matrix[b, a])
            if there + back:
                pairs.append(ClassPair(a, b, there, back, (there + back) / int(seen[a] + seen[b])))
    return sorted(pairs, key=lambda pair: -pair.share)[:most]


def mistaken_images(
    runs: Sequence[Run], true: int, predicted: int, most: int = 4
) -> list[tuple[str, int, int]]:
    """Test images of class `true` taken most often for `predicted`: (file, times, tests)."""
    times, tests = Counter(), Counter()
    for run in runs:
        columns = [run.results.get(f"test_{name}") for name in ("files", "labels", "predictions")]
        if not all(columns):
            continue
        for file, label, prediction in zip(*columns, strict=False):
            if label == true:
                tests[file] += 1
                times[file] += prediction == predicted
    worst = sorted((file for file in times if times[file]), key=lambda f: (-times[f], f))
    return [(str(file), times[file], tests[file]) for file in worst[:most]]
