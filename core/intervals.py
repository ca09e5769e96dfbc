"""Intervals for what is measured, and paired tests between methods. No torch: numpy, and scipy where a table is needed.

One run is uncertain by its finite set of images (Wilson for shares, bootstrap for means of other values); repeats are
uncertain by the training seed. Values of several classes of one seed share a classifier, so they are averaged first,
and every interval and test over repeats takes these averages alone: `over_seeds` and `against` want values by `Cell`,
and no function here takes repeats as a plain list. Shares are in [0, 1]; `Interval.times(100)` gives percent.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

import numpy as np

from core.config import UserError

MOST_FLIPPED = 20  # seeds whose 2^(n - 1) signings are enumerated
CLOSE, DUST = 1e-9, 1e-12  # values that differ by less, as a share of them or at all, differ by rounding alone
RESAMPLED = 2**17  # values drawn at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Interval:
    """A value with its interval; n: how many images (or seeds) it rests on."""

    value: float
    low: float
    high: float
    n: int

    def times(self, factor: float) -> "Interval":
        """The same in another unit; factor > 0."""
        return replace(self, value=factor * self.value, low=factor * self.low, high=factor * self.high)


def same(a: float, b: float) -> bool:
    """Whether two values are equal but for rounding: the one rule for every choice and comparison."""
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=DUST)


def minus(a: float, b: float) -> float:
    """a - b; 0 where they are equal but for rounding."""
    return 0.0 if same(a, b) else a - b


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"level is {level}: give the share of intervals that hold the true value, e.g. 0.95")
    return level


def normal_quantile(level: float) -> float:
    """z with which a two-sided normal interval holds `level`: 1.95996 for .95."""
    return NormalDist().inv_cdf((1 + _level(level)) / 2)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a share: all p with |share - p| <= z sqrt(p (1 - p) / n) (Wilson 1927, JASA 22:209).

    Raises:
        UserError: n < 1, or not 0 <= successes <= n.
    """
    if not 0 <= successes <= n or n < 1:
        raise UserError(f"{successes} of {n} is no share: give 0 <= successes <= n and n >= 1")
    z2 = normal_quantile(level) ** 2
    share = successes / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if successes == 0 else middle - half  # exact at the ends, where rounding would leave 1e-18
    return Interval(share, low, 1.0 if successes == n else middle + half, n)


def difference(a: Interval, b: Interval) -> Interval:
    """a - b of two shares with their Wilson intervals (Newcombe 1998, Statistics in Medicine 17:873, method 10).

    low = d - sqrt((a - a_low)^2 + (b_high - b)^2), high = d + sqrt((a_high - a)^2 + (b - b_low)^2). For shares of
    different images: of the same ones, `paired_difference`.
    """
    d = a.value - b.value
    low = d - math.hypot(a.value - a.low, b.high - b.value)
    high = d + math.hypot(a.high - a.value, b.value - b.low)
    return Interval(d, low, high, min(a.n, b.n))


def paired_difference(lost: int, gained: int, n: int, level: float = 0.95) -> Interval:
    """(lost - gained) / n with its interval, for two models judged on the same n images.

    Half an image is added to each of the four cells (Agresti and Min 2005, Statistics in Medicine 24:729), so that no
    change at all does not pass for certainty. Images that both get right, or both wrong, tell nothing about a
    difference, so this is narrower than `difference` where the models agree on most.

    Args:
        lost: images that the first model recognises and the second does not. gained: the other way round.

    Raises:
        UserError: there cannot be as many.
    """
    if min(lost, gained) < 0 or lost + gained > n or n < 1:
        raise UserError(f"{lost} lost and {gained} gained of {n} images cannot be: give counts that sum to n at most")
    cells, total = (lost + gained + 1) / (n + 2), n + 2
    shift = (lost - gained) / total
    half = normal_quantile(level) * math.sqrt(max(0.0, cells - shift * shift) / total)
    return Interval((lost - gained) / n, shift - half, shift + half, n)


def _finite(values: Sequence[float] | np.ndarray, fewest: int, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < fewest or not np.isfinite(array).all():
        raise UserError(f"{what} needs a list of at least {fewest} finite values, found shape {array.shape}")
    return array


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int, level: float = 0.95, draws: int = 1000) -> Interval:
    """Percentile interval of a mean: quantiles of the means of `draws` resamples with replacement (Efron 1979).

    Args:
        values: one value per image [S]. seed: of the resampling; the same gives the same interval.
    """
    array, generator = _finite(values, 1, "bootstrap_mean"), np.random.default_rng(seed)
    rows = max(1, RESAMPLED // len(array))  # a thousand small calls take longer than what they do
    sizes = [min(rows, draws - first) for first in range(0, draws, rows)]
    means = [array[generator.integers(len(array), size=(size, len(array)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - _level(level)) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high), len(array))


# --- over seeds -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Where a value was measured: a classifier and the classes that it was to forget.

    Args:
        seed: what names the classifier: its training seed, or that with whatever else tells it from the others.
        classes: the classes to forget, in order.
    """

    seed: Hashable
    classes: tuple[int, ...]


Cells = Mapping[Cell, float]


@dataclass(frozen=True)
class SeedMeans:
    """One value a seed, the mean over its classes: what intervals and tests over repeats are computed from.

    Seeds are independent of one another, classes of one seed are not. `within_seeds` makes these.
    """

    values: tuple[float, ...]
    cells: int

    @cached_property
    def mean(self) -> float:
        """The mean over seeds, each with the same weight; nan without any."""
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @cached_property
    def error(self) -> float:
        """Standard error of the mean, s / sqrt(n) with s of n - 1; nan for fewer than two seeds."""
        n, mean = len(self.values), self.mean
        if n < 2:
            return math.nan
        squares = math.fsum((value - mean) ** 2 for value in self.values)
        return math.sqrt(squares / (n - 1) / n)


def within_seeds(cells: Cells) -> SeedMeans:
    """Average the values of each seed over its classes.

    Where seeds have different classes, what the classes differ by counts as a difference between seeds.

    Raises:
        TypeError: values that are not by `Cell`.
        UserError: a value is not finite.
    """
    if not isinstance(cells, Mapping) or not all(isinstance(cell, Cell) for cell in cells):
        raise TypeError("give values by Cell: of a list nobody knows which of its values share a classifier")
    seeds: dict[Hashable, list[float]] = {}
    for cell, value in cells.items():
        if not math.isfinite(value):
            raise UserError(f"the value of {cell} is {value}: leave it out, or name what has no value")
        seeds.setdefault(cell.seed, []).append(value)
    return SeedMeans(tuple(math.fsum(values) / len(values) for values in seeds.values()), len(cells))


def over_seeds(cells: Cells, level: float = 0.95) -> Interval:
    """Mean +- t_{n-1} s / sqrt(n) over the n seeds' means, s their standard deviation with n - 1 (Student 1908).

    Raises:
        UserError: there are fewer than two seeds, so that nothing is known about another one.
    """
    means = within_seeds(cells)
    n = len(means.values)
    if n < 2:
        raise UserError(f"an interval over seeds needs at least 2 seeds, found {n}: values of one share a classifier")
    return _interval(means, level)


def _interval(means: SeedMeans, level: float = 0.95) -> Interval:
    """Student's interval of seeds' means; ends of nan for fewer than two seeds."""
    from scipy.special import stdtrit

    n, mean = len(means.values), means.mean
    half = float(stdtrit(n - 1, (1 + _level(level)) / 2)) * means.error
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Test:
    """A method against ours: the mean over seeds of (its value minus ours). A p is nan where no test can be made.

    Args:
        difference, low, high: the mean with its 95 % t interval over seeds (`over_seeds`).
        seeds, cells: how many classifiers it rests on, and how many values.
        p: two-sided t test of the seeds' mean differences; p < .05 where the interval excludes 0.
        p_holm: p corrected for the number of methods.
        p_flips: two-sided permutation test, which flips the signs of whole seeds; exact for every distribution, if
            the two methods can be exchanged for one another under the null hypothesis.
        least: the smallest p_flips that so many seeds can give: .25 for 3, .0625 for 5, .03125 for 6.
    """

    __test__ = False  # for pytest: this is no test class

    difference: float
    low: float
    high: float
    seeds: int
    cells: int
    p: float
    p_flips: float
    least: float
    p_holm: float = math.nan


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number m: running maximum of (m - rank) p, rank from 0 (Holm 1979, Scand. J. Stat.).

    nan (no test was made) stays nan and does not count.
    """
    order = sorted((place for place, value in enumerate(p) if not math.isnan(value)), key=lambda place: p[place])
    corrected, so_far = [math.nan] * len(p), 0.0
    for rank, place in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p[place]))
        corrected[place] = so_far
    return corrected


def _flipped(means: SeedMeans) -> float:
    """Share of the 2^n signings of the seeds' means whose sum is as far from 0 as the one found (Fisher 1935).

    A signing and its opposite are equally far, so the first sign stands. nan: none, or too many to enumerate.
    """
    if not 1 <= len(means.values) <= MOST_FLIPPED:
        return math.nan
    sums = np.array(means.values[:1])
    for value in means.values[1:]:
        sums = np.concatenate((sums + value, sums - value))
    rounding = CLOSE * math.fsum(map(abs, means.values))
    return float((np.abs(sums) >= abs(math.fsum(means.values)) - rounding).mean())


def _student(means: SeedMeans) -> float:
    """Two-sided p of the t test that the seeds' means are of mean 0; 1 where all are 0, nan where none spreads."""
    from scipy.special import stdtr

    if len(means.values) > 1 and not any(means.values):
        return 1.0
    if not means.error > CLOSE * abs(means.mean):  # fewer than two seeds, or all alike: t would be infinite
        return math.nan
    return 2 * float(stdtr(len(means.values) - 1, -abs(means.mean) / means.error))


def paired(differences: Cells) -> Test:
    """Test whether a mean difference is 0, by one value a seed.

    Args:
        differences: by cell, of two methods' values there.
    """
    means = within_seeds(differences)
    found, n = _interval(means), len(means.values)
    least = 0.5 ** (n - 1) if n else math.nan
    return Test(means.mean, found.low, found.high, n, means.cells, _student(means), _flipped(means), least)


def against(values: Mapping[str, Mapping[Cell, float | None]], ours: str) -> dict[str, Test]:
    """Every other method against `ours` on one metric, paired over the cells that both have, Holm-corrected.

    Args:
        values: {method: {cell: value}}; None where a value cannot be said.

    Raises:
        UserError: `ours` is not among the methods.
    """
    if ours not in values:
        raise UserError(f"there are no values of {ours!r}: choose from {', '.join(values)}")
    base, tests = values[ours], {}
    for name, cells in values.items():
        pairs = {cell: (value, base.get(cell)) for cell, value in cells.items()}
        known = {cell: minus(a, b) for cell, (a, b) in pairs.items() if a is not None and b is not None}
        if name != ours:
            tests[name] = paired(known)
    corrected = holm([test.p for test in tests.values()])
    return {name: replace(test, p_holm=p) for (name, test), p in zip(tests.items(), corrected, strict=True)}
