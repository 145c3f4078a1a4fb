"""What models do class by class: confusion, its worst pairs and their images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sweeps.grid import Sweep
from sweeps.results import Run


@dataclass(frozen=True)
class Pair:
    """Two classes taken for one another; indices into the class names, counts of predictions."""

    a: int
    b: int
    a_as_b: int
    b_as_a: int
    share: float  # of all tests of images of both classes


def confusion(runs: Sequence[Run]) -> tuple[list[str], np.ndarray] | None:
    """Class names and the summed confusion, (C, C), true class by predicted class; None without."""
    classes, total = None, None
    for run in runs:
        names = run.results.get("classes")
        counts = np.array(run.results.get("confusion") or [], dtype=object)
        if not names or counts.shape != (len(names), len(names)):
            continue
        if classes is None:
            classes, total = names, np.zeros(counts.shape, dtype=np.int64)
        if names == classes:
            total += counts.astype(np.int64)
    return None if classes is None else ([str(name) for name in classes], total)


def class_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Percent of each true class that is predicted right; NaN for a class without images."""
    seen = matrix.sum(axis=1)
    return np.where(seen > 0, 100 * matrix.diagonal() / np.maximum(seen, 1), np.nan)


def class_differences(
    sweep: Sweep, label: str, baseline: str
) -> tuple[list[str], np.ndarray] | None:
    """Accuracy a class minus the baseline's, percentage points, over runs finished in both."""
    own, base = sweep.accuracies(label), sweep.accuracies(baseline)
    both = own.keys() & base.keys()
    pair = [
        confusion([run for run in sweep.finished(name) if (run.fold, run.seed) in both])
        for name in (label, baseline)
    ]
    if None in pair or pair[0][0] != pair[1][0]:
        return None
    return pair[0][0], class_accuracy(pair[0][1]) - class_accuracy(pair[1][1])


def confused_pairs(matrix: np.ndarray, count: int = 5) -> list[Pair]:
    """The pairs of classes with the largest share of their tests taken for one another."""
    seen = matrix.sum(axis=1)
    pairs = []
    for a in range(len(matrix)):
        for b in range(a + 1, len(matrix)):
            there, back = int(matrix[a, b]), int(matrix[b, a])
            if there + back:
                pairs.append(Pair(a, b, there, back, (there + back) / int(seen[a] + seen[b])))
    return sorted(pairs, key=lambda pair: -pair.share)[:count]


def mistaken_images(
    runs: Sequence[Run], true: int, predicted: int, count: int = 4
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
    return [(str(file), times[file], tests[file]) for file in worst[:count]]
