"""Statistics of a sweep: what reshuffles of one dataset can say, and what they cannot.

Folds that reshuffle the same images are not independent, and seeds within a fold even less. So
seeds are averaged within their fold, and folds are compared in pairs, with the variance corrected
for their overlap. Accuracies are in percent, differences in percentage points.

Intervals and p values need scipy (pip install scipy); means and deviations do not.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product

import numpy as np

from common.errors import UserError
from common.optional import import_optional

MIN_FOLDS = 3  # fewer give no interval and no p
MAX_SIGN_FLIP = 15  # 2^15 sign patterns are enumerated exactly; with more folds there is no p
SAME = 1e-9  # percentage points below which two accuracies are the same count of images

Key = tuple[int, int]  # (fold, seed)
Accuracies = Mapping[Key, float]


@dataclass(frozen=True)
class Summary:
    """Mean and std (ddof 1, None for one value) over `unit`: complete folds, or complete seeds."""

    mean: float | None
    std: float | None
    unit: str  # "folds" or "seeds"
    folds: int  # folds in the mean
    seeds: int  # seeds in the mean
    averaged: int  # runs in the mean
    left_out: int  # finished runs that are not in it, of folds or seeds that are not complete
    missing: int  # runs of the table that this row does not have
    runs: int  # runs that a row of the table can have


@dataclass(frozen=True)
class Comparison:
    """A model against the baseline, paired by the folds that are complete in both."""

    folds: int
    difference: float
    ratio: float | None  # test images / images trained on, in the folds compared
    low: float | None  # 95 % interval
    high: float | None
    p: float | None  # corrected t test, two-sided
    sign_flip_p: float | None
    wins: int
    ties: int
    losses: int
    untested: str | None = None  # why there is no interval or no p, for a footnote


def fold_means(accuracies: Accuracies, expected: Set[Key]) -> dict[int, float]:
    """Mean over seeds of each fold in which all expected runs are finished; other folds: none."""
    means = {}
    for fold in sorted({fold for fold, _ in expected}):
        seeds = sorted(seed for other, seed in expected if other == fold)
        if all((fold, seed) in accuracies for seed in seeds):
            means[fold] = float(np.mean([accuracies[fold, seed] for seed in seeds]))
    return means


def summarise(accuracies: Accuracies, expected: Set[Key], everything: Set[Key]) -> Summary:
    """Mean ± std of a row over its folds, or over seeds in a table of fewer than three folds.

    Args:
        accuracies: of the finished runs of the row.
        expected: (fold, seed) of the runs that the row should have; a fold counts if all are there.
        everything: (fold, seed) of all runs in the table.
    """
    folds, seeds = {fold for fold, _ in everything}, {seed for _, seed in everything}
    if len(folds) >= MIN_FOLDS:
        means, unit = fold_means(accuracies, expected), "folds"
        used = [key for key in expected if key[0] in means]
        num_folds, num_seeds = len(means), len({seed for _, seed in used} or seeds)
    else:
        # folds differ more than seeds do: a seed counts only if it has all folds of the row
        pairs = product({seed for _, seed in expected}, {fold for fold, _ in expected})
        swapped = {(seed, fold): value for (fold, seed), value in accuracies.items()}
        means, unit = fold_means(swapped, set(pairs)), "seeds"
        used = [key for key in expected if key[1] in means]
        num_folds, num_seeds = len({fold for fold, _ in used} or folds), len(means)
    values = list(means.values())
    return Summary(
        mean=float(np.mean(values)) if values else None,
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        unit=unit,
        folds=num_folds,
        seeds=num_seeds,
        averaged=len(used),
        left_out=len(accuracies) - len(used),
        missing=len(everything - accuracies.keys()),
        runs=len(everything),
    )


def compare(
    model: Mapping[int, float],
    baseline: Mapping[int, float],
    ratio: float | None,
    *,
    test: bool = True,
) -> Comparison | None:
    """Compare the means of the folds that both have; None if they have none in common.

    Args:
        model, baseline: fold → mean accuracy.
        ratio: test images / images trained on, for the correction; None if unknown.
        test: also compute the interval and the p values, for which scipy must be installed.
    """
    common = sorted(model.keys() & baseline.keys())
    if not common:
        return None
    differences = np.array([model[fold] - baseline[fold] for fold in common])
    differences[abs(differences) < SAME] = 0.0

    low = high = p = flip = untested = None
    if len(common) < MIN_FOLDS:
        untested = "no interval and no p, with fewer than 3 complete folds in common"
    elif test:
        flip = sign_flip_p(differences)
        if ratio is None:
            untested = "no interval and no p, as the results do not count their images"
        else:
            low, high, p = corrected_t(differences, ratio)
            if p is None:
                untested = "no interval and no p, as all differences are equal"
            elif low is None:
                untested = "no interval, as all differences are 0"

    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return Comparison(
        folds=len(common),
        difference=float(differences.mean()),
        ratio=ratio,
        low=low,
        high=high,
        p=p,
        sign_flip_p=flip,
        wins=wins,
        ties=len(common) - wins - losses,
        losses=losses,
        untested=untested,
    )


def corrected_t(
    differences: Sequence[float], ratio: float
) -> tuple[float | None, float | None, float | None]:
    """95 % interval and two-sided p of a mean difference, as (low, high, p).

    Corrected resampled t test: the variance of the mean is (1/n + n_test/n_train) s² in place of
    s²/n, with n - 1 degrees of freedom (C. Nadeau and Y. Bengio, Inference for the Generalization
    Error, Machine Learning 52, 2003). Differences without any spread have neither; if all are 0,
    p is 1.
    """
    d = np.asarray(differences, dtype=float)
    n, mean, variance = len(d), float(d.mean()), float(d.var(ddof=1))
    if math.sqrt(variance) < SAME:
        return None, None, 1.0 if abs(mean) < SAME else None
    student_t = _scipy_stats().t(df=n - 1)
    error = math.sqrt((1 / n + ratio) * variance)
    half = float(student_t.ppf(0.975)) * error
    return mean - half, mean + half, 2 * float(student_t.sf(abs(mean) / error))


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of the mean under all 2^n changes of sign; None above MAX_SIGN_FLIP."""
    if len(differences) > MAX_SIGN_FLIP:
        return None

    def rounded_sum(values, axis):  # sums that are equal but for rounding errors must be equal
        return np.round(np.sum(values, axis=axis), 6)

    result = _scipy_stats().permutation_test(
        (np.asarray(differences, dtype=float),),
        rounded_sum,
        vectorized=True,
        permutation_type="samples",
        n_resamples=np.inf,
        batch=2**14,
    )
    return float(result.pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Step-down adjustment of p values for their number; a None is not a test and stays None.

    Source: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal
    of Statistics 6, 1979.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def why_no_tests() -> str | None:
    """What to do to get intervals and p values; None where scipy is installed and works."""
    try:
        _scipy_stats()
    except UserError as error:
        return str(error)
    return None


def _scipy_stats():
    return import_optional("scipy.stats", purpose="computing them")
