"""Statistics of a sweep: what reshuffles of one data set can say, and what they cannot.

Folds that reshuffle the same images are not independent, and seeds within a fold even less: seeds
are averaged within their fold, and folds are compared in pairs with the variance corrected for
their overlap. All in numpy and math; accuracies are percent, differences are percentage points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_FOLDS = 3  # fewer give no interval and no p
MAX_SIGN_FLIP = 20  # 2^20 sign patterns are enumerated exactly; above it there is no p
SAME = 1e-9  # percentage points below which two accuracies are the same count of images


@dataclass(frozen=True)
class Summary:
    """Mean and std (ddof 1, None for one value) over `unit`: complete folds, or complete seeds."""

    mean: float | None
    std: float | None
    unit: str  # "folds" or "seeds"
    folds: int  # folds in the mean
    seeds: int  # seeds in the mean
    missing: int  # runs of the grid without a result
    runs: int  # runs of the grid


@dataclass(frozen=True)
class Comparison:
    """A model against the baseline, paired by the folds that are complete in both."""

    folds: int
    difference: float
    low: float | None  # 95 % interval
    high: float | None
    p: float | None  # corrected t test, two-sided
    sign_flip_p: float | None
    wins: int
    ties: int
    losses: int


Cells = Mapping[tuple[int, int], float]  # (fold, seed) → accuracy


def fold_means(cells: Cells, folds: Sequence[int], seeds: Sequence[int]) -> dict[int, float]:
    """Mean over seeds of each fold that has all its seeds; a fold with a hole is left out."""
    return {
        fold: float(np.mean([cells[fold, seed] for seed in seeds]))
        for fold in folds
        if all((fold, seed) in cells for seed in seeds)
    }


def summarise(cells: Cells, folds: Sequence[int], seeds: Sequence[int]) -> Summary:
    """Mean ± std over folds, or over seeds where the grid has fewer than three folds."""
    missing = sum((fold, seed) not in cells for fold in folds for seed in seeds)
    if len(folds) >= MIN_FOLDS:
        values = list(fold_means(cells, folds, seeds).values())
        unit, counts = "folds", (len(values), len(seeds))
    else:
        swapped = {(seed, fold): value for (fold, seed), value in cells.items()}
        values = list(fold_means(swapped, seeds, folds).values())
        unit, counts = "seeds", (len(folds), len(values))
    mean = float(np.mean(values)) if values else None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(mean, std, unit, *counts, missing, len(folds) * len(seeds))


def compare(
    model: Mapping[int, float], baseline: Mapping[int, float], ratio: float | None
) -> Comparison | None:
    """Compare fold means; `ratio` = test images / images trained on. None without a common fold."""
    common = sorted(model.keys() & baseline.keys())
    if not common:
        return None
    differences = np.array([model[fold] - baseline[fold] for fold in common])
    differences[abs(differences) < SAME] = 0.0
    low = high = p = flip = None
    if len(common) >= MIN_FOLDS:
        flip = sign_flip_p(differences)
        if ratio is not None:
            low, high, p = corrected_t(differences, ratio)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    ties = len(common) - wins - losses
    mean = float(differences.mean())
    return Comparison(len(common), mean, low, high, p, flip, wins, ties, losses)


def corrected_t(differences: Sequence[float], ratio: float) -> tuple[float, float, float | None]:
    """95 % interval and two-sided p of a mean difference, as (low, high, p).

    Corrected resampled t test: the variance of the mean is (1/n + n_test/n_train) s² in place of
    s²/n (Nadeau and Bengio, Inference for the Generalization Error, 2003), with n - 1 degrees of
    freedom. Differences without any spread have no p, unless all are 0 (p = 1).
    """
    d = np.asarray(differences, dtype=float)
    n, mean, variance = len(d), float(d.mean()), float(d.var(ddof=1))
    if math.sqrt(variance) < SAME:
        return mean, mean, 1.0 if abs(mean) < SAME else None
    error = math.sqrt((1 / n + ratio) * variance)
    half = student_t_quantile(0.975, n - 1) * error
    return mean - half, mean + half, 2 * student_t_cdf(-abs(mean) / error, n - 1)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of the mean under all 2^n changes of sign; None above MAX_SIGN_FLIP."""
    if len(differences) > MAX_SIGN_FLIP:
        return None
    sums = np.zeros(1)
    for d in differences:
        sums = np.concatenate([sums + d, sums - d])
    return float((np.abs(sums) >= abs(sum(differences)) - SAME).mean())


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; a None is no test: it stays None and is not counted."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def student_t_cdf(t: float, df: float) -> float:
    """P(T ≤ t) of Student's t distribution."""
    tail = 0.5 * regularised_beta(df / (df + t * t), df / 2, 0.5)
    return tail if t < 0 else 1 - tail


def student_t_quantile(q: float, df: float) -> float:
    """The t with P(T ≤ t) = q, for 0 < q < 1, by bisection."""
    if q < 0.5:
        return -student_t_quantile(1 - q, df)
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < q:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, df) < q else (low, middle)
    return (low + high) / 2


def regularised_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8), for 0 ≤ x ≤ 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - regularised_beta(1 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(front + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):  # modified Lentz, an even and an odd term a round
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction
