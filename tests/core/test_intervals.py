"""Intervals and tests against textbook values, hand computation, scipy and coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from core.config import UserError
from core.intervals import (
    MOST_FLIPPED,
    Cell,
    Interval,
    against,
    bootstrap_mean,
    difference,
    holm,
    over_seeds,
    paired,
    paired_difference,
    wilson,
    within_seeds,
)


def test_wilson_textbook_values():
    """0/10: (0, z^2 / (10 + z^2)) = (0, .2775); 5/10: .2366 to .7634 (Newcombe 1998 and any table)."""
    none, half, full = wilson(0, 10), wilson(5, 10), wilson(10, 10)
    assert (none.value, none.low, none.n) == (0, 0, 10)
    assert none.high == pytest.approx(0.2775, abs=5e-5)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=5e-5)
    assert (full.low, full.high) == pytest.approx((1 - none.high, 1))


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 17, 0.95), (81, 263, 0.95), (15, 148, 0.9), (1, 29, 0.99)])
def test_wilson_agrees_with_scipy(successes, n, level):
    ends = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (wilson(successes, n, level).low, wilson(successes, n, level).high) == pytest.approx((ends.low, ends.high))


def test_difference_of_shares_textbook_value():
    """56/70 - 48/80 = .2, .0524 to .3339 (Newcombe 1998, table II a, method 10); turned round, signs turn."""
    a, b = wilson(56, 70), wilson(48, 80)
    assert (difference(a, b).low, difference(a, b).high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert (difference(b, a).low, difference(b, a).high) == pytest.approx((-0.3339, -0.0524), abs=5e-5)


def test_paired_difference_by_hand():
    """Half an image in each of the four cells: variance of (loses - gains) over 102 pseudo-images."""
    z, drop, n = stats.norm.ppf(0.975), (5.5 - 2.5) / 102, 102
    variance = (5.5 * (1 - drop) ** 2 + 2.5 * (-1 - drop) ** 2 + 94 * drop**2) / n
    found = paired_difference(5, 2, 100)
    assert (found.value, found.n) == (0.03, 100)
    assert (found.low, found.high) == pytest.approx(
        (drop - z * math.sqrt(variance / n), drop + z * math.sqrt(variance / n))
    )
    turned = paired_difference(2, 5, 100)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert paired_difference(0, 0, 100).high > 0  # no change at all is no certainty
    assert paired_difference(5, 2, 100, 0.99).low < found.low


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (3, 3, 5), (0, 0, 0)])
def test_paired_difference_of_counts_that_cannot_be(counts):
    with pytest.raises(UserError, match="cannot be"):
        paired_difference(*counts)


@pytest.mark.parametrize(("share", "count"), [(0.01, 600), (0.05, 200), (0.5, 60)])
def test_upper_ends_cover(share, count):
    """Simulated: the upper ends lie above the truth about 97.5 % of the time."""
    generator = np.random.default_rng(0)
    drawn = generator.binomial(count, share, 2000).tolist()
    assert sum(wilson(x, count).high >= share for x in drawn) / 2000 >= 0.94
    kinds = generator.random((2000, count))
    lost, gained = (kinds < share / 2).sum(1), (kinds > 1 - share / 4).sum(1)
    pairs = zip(lost.tolist(), gained.tolist(), strict=True)
    assert sum(paired_difference(a, b, count).high >= share / 4 for a, b in pairs) / 2000 >= 0.94


def test_times_changes_the_unit():
    assert Interval(0.5, 0.25, 0.75, 9).times(100) == Interval(50, 25, 75, 9)


def by_seed(*seeds: list[float]) -> dict[Cell, float]:
    """Values of the classes of each seed, by cell."""
    return {
        Cell(seed=seed, classes=(label,)): value
        for seed, values in enumerate(seeds)
        for label, value in enumerate(values)
    }


def test_interval_over_seeds_by_hand():
    """1, 2, 3: s = 1, t_2(.975) = 4.3027, half = 4.3027 / sqrt(3) = 2.4841."""
    found = over_seeds(by_seed([1], [2], [3]))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert found.n == 3
    assert over_seeds(by_seed([1], [2], [3]), 0.9).high == pytest.approx(2 + 2.91999 / math.sqrt(3), abs=1e-5)


def test_classes_of_a_seed_are_averaged_first():
    """Means 1, 2 and 3 of two classes each: as three values, however the classes differ, and not as six."""
    cells = by_seed([0, 2], [-3, 7], [3, 3])
    assert within_seeds(cells).values == (1, 2, 3)
    assert within_seeds(cells).cells == 6
    assert over_seeds(cells) == over_seeds(by_seed([1], [2], [3]))
    more = by_seed(
        [0, 2] * 50, [-3, 7] * 50, [3, 3] * 50
    )  # more classes of the same classifiers tell no more of others
    assert over_seeds(more) == over_seeds(cells)
    uneven = by_seed([1], [1, 2, 3], [3, 3])  # every seed has the same weight
    assert over_seeds(uneven) == over_seeds(cells)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], {0: 1.0, 1: 2.0}, {(0, 1): 1.0, (1, 1): 2.0}])
def test_values_that_do_not_say_their_classifier_are_refused(values):
    for function in (over_seeds, within_seeds, paired):
        with pytest.raises(TypeError, match="give values by Cell"):
            function(values)


def test_a_cell_cannot_be_written_the_wrong_way_round():
    with pytest.raises(TypeError):
        Cell(0, (1,))  # ty: ignore[too-many-positional-arguments, missing-argument]


def test_bootstrap_is_near_the_normal_interval_and_repeatable():
    values = np.random.default_rng(3).exponential(size=400)
    found = bootstrap_mean(values, 0)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.25 * half)
    assert bootstrap_mean(values, 0) == found != bootstrap_mean(values, 1)
    assert bootstrap_mean([0.25] * 5, 0) == Interval(0.25, 0.25, 0.25, 5)


def test_bootstrap_of_two_values_by_enumeration():
    """Of 0 and 1 the mean of a resample is 0, .5, 1 with probability 1/4, 1/2, 1/4: 60 % lies between 0 and 1."""
    found = bootstrap_mean([0, 1], 0, level=0.6)
    assert (found.low, found.high) == (0, 1)
    inner = bootstrap_mean([0, 1], 0, level=0.3)
    assert (inner.low, inner.high) == (0.5, 0.5)


def test_holm_by_hand():
    """.01 .04 .03: 3 x .01, then 2 x .03, then max(.06, 1 x .04)."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([0.02, math.nan, 0.01])[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(holm([0.02, math.nan, 0.01])[1])


def test_flipped_signs_by_enumeration():
    """Exact p: the share of the 2^n signings of whole seeds whose mean is as far from 0 as the one found."""
    means = [1.0, 2.0, -0.5, 4.0, 3.0, -1.5, 6.0]
    found = paired(by_seed(*([mean - 1, mean + 1] for mean in means)))
    sums = [sum(np.multiply(signs, means)) for signs in itertools.product([1, -1], repeat=len(means))]
    assert found.p_flips == np.mean(np.abs(sums) >= sum(means))
    whole = stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.p_flips == pytest.approx(whole.pvalue)
    assert (found.seeds, found.cells) == (7, 14)


def test_paired_is_the_t_test_of_the_seeds_means():
    means = [1.0, 2.0, -0.5, 4.0]
    found, student = paired(by_seed(*([mean - 1, mean + 1] for mean in means))), stats.ttest_1samp(means, 0)
    assert (found.difference, found.p) == pytest.approx((np.mean(means), student.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(student.confidence_interval()))


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (10, 2 / 1024)])
def test_the_smallest_p_that_flipped_signs_can_give(seeds, least):
    found = paired(by_seed(*([1.0 + seed] for seed in range(seeds))))
    assert (found.p_flips, found.least) == (least, least)


def test_tests_that_cannot_be_made():
    none, one, alike, nothing = (paired(by_seed(*seeds)) for seeds in ([], [[3.0, 4]], [[2.0]] * 3, [[0.0, 0]] * 3))
    assert (none.seeds, none.cells) == (0, 0)
    assert all(map(math.isnan, (none.difference, none.low, none.p, none.p_flips, none.least)))
    assert (one.difference, one.seeds, one.cells, one.p_flips, one.least) == (3.5, 1, 2, 1, 1)
    assert all(map(math.isnan, (one.low, one.high, one.p)))
    assert math.isnan(alike.p)  # no spread at all: t would be infinite
    assert alike.p_flips == 0.25
    assert (nothing.p, nothing.p_flips) == (1, 1)
    assert math.isnan(paired(by_seed(*([1.0 + seed] for seed in range(MOST_FLIPPED + 1)))).p_flips)


def test_against_pairs_cells_and_corrects():
    cells = [Cell(seed=seed, classes=(label,)) for seed in range(4) for label in range(2)]
    ours = dict.fromkeys(cells, 1.0)
    worse = {cell: 2.0 + place / 10 for place, cell in enumerate(cells)}
    mixed = {cell: 1.0 + (-1) ** (place // 2) * (1 + place / 10) for place, cell in enumerate(cells)}
    lacking = {**worse, cells[0]: None, Cell(seed=9, classes=(9,)): 50.0}
    tests = against({"ours": ours, "worse": worse, "mixed": mixed, "lacking": lacking}, "ours")
    assert list(tests) == ["worse", "mixed", "lacking"]
    expected = {
        "worse": [1.05, 1.25, 1.45, 1.65],
        "mixed": [1.05, -1.25, 1.45, -1.65],
        "lacking": [1.1, 1.25, 1.45, 1.65],
    }
    p = {name: stats.ttest_1samp(means, 0).pvalue for name, means in expected.items()}
    for name, test in tests.items():
        assert (test.difference, test.p) == pytest.approx((np.mean(expected[name]), p[name]))
        assert (test.seeds, test.cells) == (4, 7 if name == "lacking" else 8)
    assert [test.p_holm for test in tests.values()] == pytest.approx(holm(list(p.values())))
    assert p["mixed"] > 0.5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wilson(1, 0), "1 of 0 is no share"),
        (lambda: wilson(0, 0), "0 of 0 is no share"),
        (lambda: wilson(3, 2), "3 of 2 is no share"),
        (lambda: wilson(-1, 2), "-1 of 2 is no share"),
        (lambda: wilson(1, 2, 95), "level is 95"),
        (lambda: over_seeds(by_seed([1, 2, 3])), "needs at least 2 seeds, found 1: values of one share a classifier"),
        (lambda: over_seeds(by_seed([1], [math.nan])), "the value of Cell.seed=1, classes=.0,.. is nan"),
        (lambda: bootstrap_mean([], 0), "at least 1 finite"),
        (lambda: against({"a": {}}, "b"), "no values of 'b': choose from a"),
    ],
)
def test_wrong_input_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
