"""sweeps/statistics.py, against numbers worked out by hand."""

import math
from itertools import product

import numpy as np
import pytest

from sweeps.statistics import (
    compare,
    corrected_t,
    fold_means,
    holm,
    sign_flip_p,
    summarise,
)


def grid(folds, seeds):
    """What a row should have, and what the table has: the same folds × seeds."""
    return (set(product(folds, seeds)),) * 2


def test_seeds_are_averaged_within_a_fold_and_folds_counted_once():
    cells = {
        (1, 42): 60.0,
        (1, 43): 62.0,
        (2, 42): 64.0,
        (2, 43): 66.0,
        (3, 42): 69.0,
        (3, 43): 69.0,
    }
    assert fold_means(cells, set(product([1, 2, 3], [42, 43]))) == {1: 61.0, 2: 65.0, 3: 69.0}
    summary = summarise(cells, *grid([1, 2, 3], [42, 43]))
    assert (summary.mean, summary.std) == (65.0, 4.0)  # std of 61, 65, 69 with ddof 1
    assert (summary.unit, summary.folds, summary.seeds, summary.missing) == ("folds", 3, 2, 0)


def test_a_fold_with_a_missing_seed_is_left_out_and_counted():
    cells = {(1, 42): 60.0, (1, 43): 62.0, (2, 42): 99.0, (3, 42): 67.0, (3, 43): 67.0}
    summary = summarise(cells, *grid([1, 2, 3], [42, 43]))
    assert (summary.mean, summary.folds, summary.missing, summary.runs) == (64.0, 2, 1, 6)
    nothing = summarise({(1, 42): 60.0}, *grid([1, 2, 3], [42, 43]))
    assert (nothing.mean, nothing.std, nothing.missing) == (None, None, 5)


def test_with_two_folds_mean_and_std_are_over_seeds():
    cells = {(1, 42): 60.0, (2, 42): 70.0, (1, 43): 62.0, (2, 43): 72.0, (1, 44): 90.0}
    summary = summarise(cells, *grid([1, 2], [42, 43, 44]))
    assert (summary.unit, summary.seeds, summary.missing) == ("seeds", 2, 1)
    assert summary.mean == 66.0  # of 65 and 67
    assert summary.std == pytest.approx(math.sqrt(2))
    assert summarise({(1, 42): 60.0}, *grid([1], [42])).std is None


def test_corrected_t_by_hand():
    # mean 2, s² = 1, error = sqrt(1/3 + 1) = 1.1547, t = √3; with 2 degrees of freedom
    # P(|T| > t) = 1 - t / sqrt(2 + t²) = 1 - √(3/5), and the 97.5 % quantile is 4.302653
    low, high, p = corrected_t([1.0, 2.0, 3.0], ratio=1.0)
    assert p == pytest.approx(1 - math.sqrt(0.6), abs=1e-12)
    assert (low, high) == pytest.approx((2 - 4.968276, 2 + 4.968276), abs=2e-6)


def test_a_larger_test_share_widens_the_interval():
    narrow, wide = (corrected_t([1.0, 2.0, 4.0, 3.0], ratio) for ratio in (0.0, 1.0))
    assert wide[0] < narrow[0] < narrow[1] < wide[1] and wide[2] > narrow[2]


def test_differences_without_spread_have_no_interval_and_no_p():
    assert corrected_t([0.0] * 5, 1.0) == (None, None, 1.0)
    assert corrected_t([2.0] * 5, 1.0) == (None, None, None)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only +++ and --- reach |6|
        ([1.0, -2.0, 3.0], 6 / 8),  # |sums| of 1, 2, 3: 6, 4, 2, 0, each twice; 2 or more: 6
        ([0.0, 0.0], 1.0),
        ([0.1] * 10, 2 / 1024),  # equal up to rounding of the sums
        ([0.1, 0.2, 0.3], 2 / 8),  # 0.1 + 0.2 - 0.3 is not quite 0
        ([0.1, 0.2, -0.3], 1.0),
    ],
)
def test_sign_flip_by_hand(differences, p):
    assert sign_flip_p(differences) == p


def test_sign_flip_has_no_p_for_more_than_15_folds():
    assert sign_flip_p([1.0] * 15) == 2 / 2**15
    assert sign_flip_p([1.0] * 16) is None


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 × 0.01; 2 × 0.03; 0.04 may not be below it
        ([0.02, None, 0.03], [0.04, None, 0.04]),
        ([0.7, 0.6], [1.0, 1.0]),
        ([None], [None]),
    ],
)
def test_holm_by_hand(ps, adjusted):
    assert holm(ps) == pytest.approx(adjusted)


def test_more_seeds_in_one_fold_leave_the_other_folds_as_they_are():
    cells = {(1, 42): 60.0, (2, 42): 64.0, (3, 42): 68.0}
    before = summarise(cells, *grid([1, 2, 3], [42]))
    more = {**cells, (1, 43): 62.0}
    after = summarise(more, more.keys(), more.keys())
    assert (before.mean, after.mean) == (64.0, 193 / 3)  # of 61, 64 and 68
    assert (after.folds, after.seeds, after.averaged, after.missing) == (3, 2, 4, 0)
    # a row that was never to have the new run keeps its mean, and is told to lack it
    other = summarise(cells, cells.keys(), more.keys())
    assert (other.mean, other.missing, other.runs) == (64.0, 1, 4)


def test_compare_pairs_only_folds_that_both_have():
    found = compare({1: 61.0, 2: 65.0, 3: 69.0, 9: 0.0}, {1: 60.0, 2: 63.0, 3: 66.0, 8: 0.0}, 1.0)
    assert (found.folds, found.difference, found.sign_flip_p) == (3, 2.0, 0.25)
    assert found.p == pytest.approx(1 - math.sqrt(0.6))


def test_compare_counts_wins_ties_and_losses():
    found = compare({1: 2.0, 2: 0.1 + 0.2, 3: 1.0, 4: 5.0}, {1: 1.0, 2: 0.3, 3: 3.0, 4: 4.0}, 1.0)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)


def test_fewer_than_three_folds_have_no_interval_and_no_p():
    found = compare({1: 61.0, 2: 65.0}, {1: 60.0, 2: 63.0}, 1.0)
    assert (found.difference, found.wins) == (1.5, 2)
    assert found.low is found.high is found.p is found.sign_flip_p is None
    assert compare({1: 61.0}, {2: 60.0}, 1.0) is None


def test_the_reason_for_a_missing_interval_is_the_one_that_holds():
    three, equal = {1: 2.0, 2: 3.0, 3: 4.0}, {1: 1.0, 2: 2.0, 3: 3.0}
    assert compare(three, {1: 1.0, 2: 1.0, 3: 1.0}, 1.0).untested is None
    assert "fewer than 3" in compare({1: 2.0, 2: 3.0}, equal, 1.0).untested
    assert "do not count their images" in compare(three, equal, None).untested
    found = compare(three, equal, 1.0)
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.untested == "no interval and no p, as all differences are equal"
    assert compare(three, three, 1.0).untested == "no interval, as all differences are 0"  # p is 1


def test_an_unknown_ratio_gives_no_interval_but_a_permutation():
    found = compare({1: 2.0, 2: 3.0, 3: 4.0}, {1: 1.0, 2: 1.0, 3: 1.0}, None)
    assert found.p is found.low is None and found.sign_flip_p == 0.25


def test_without_overlap_the_corrected_test_is_the_t_test():
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    for n in (3, 5, 10):
        d = np.random.default_rng(n).normal(0.5, 1.0, n)
        plain = stats.ttest_1samp(d, 0.0)  # what the correction is without overlap
        interval = plain.confidence_interval(0.95)
        expected = (interval.low, interval.high, plain.pvalue)
        assert corrected_t(d, ratio=0.0) == pytest.approx(expected, rel=1e-9)
        error = math.sqrt((1 / n + 0.25) * d.var(ddof=1))
        p = 2 * stats.t.sf(abs(d.mean()) / error, n - 1)
        assert corrected_t(d, ratio=0.25)[2] == pytest.approx(p, rel=1e-9)
