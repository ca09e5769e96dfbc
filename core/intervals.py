"""Intervals for what is measured, and paired tests between methods. No torch: numpy, and scipy where a table is needed.

One run is uncertain by its finite set of images (Wilson for shares, bootstrap for means of other values); repeats are
uncertain by the training seed (t intervals over seeds). Shares are in [0, 1]; `Interval.times(100)` gives percent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from core.config import UserError

FEWEST_CELLS = 6  # with n pairs the smallest two-sided p of the exact signed-rank test is 2 / 2^n: .0625 for 5
UNIT = "class x seed"
CLOSE, DUST = 1e-9, 1e-12  # values that differ by less, as a share of them or at all, differ by rounding alone
RESAMPLED = 2**17  # values drawn at a time: they stay in the processor's cache
ClassAndSeed = tuple[int, int]
Values = Mapping[str, Mapping[ClassAndSeed, float | None]]


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


@dataclass(frozen=True)
class Test:
    """A method against ours: mean of (its value minus ours) over n paired units; nan where no test can be made."""

    __test__ = False  # for pytest: this is no test class

    difference: float
    n: int
    unit: str
    test: str
    p: float
    p_holm: float = math.nan


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


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Mean +- t_{n-1} s / sqrt(n) over independent repeats, s the standard deviation with n - 1 (Student 1908).

    Args:
        values: one value per training seed (means over classes, say), at least two.
    """
    from scipy.stats import t

    array = _finite(values, 2, "t_interval")
    n, mean = len(array), float(array.mean())
    half = float(t.ppf((1 + _level(level)) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


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


def paired(differences: Sequence[float]) -> Test:
    """Two-sided Wilcoxon signed-rank test over cells, pairs without a difference left out (Wilcoxon 1945).

    Cells of one training seed share a classifier, so they are less independent than the test takes them to be; with
    fewer than FEWEST_CELLS no difference could reach p < .05, and none is tested.
    """
    from scipy.stats import wilcoxon

    n = len(differences)
    mean = float(np.mean(differences)) if n else math.nan
    if n < FEWEST_CELLS:
        return Test(mean, n, UNIT, f"none: fewer than {FEWEST_CELLS} cells", math.nan)
    p = float(wilcoxon(differences).pvalue) if any(differences) else 1.0  # no difference at all: nothing to rank
    return Test(mean, n, UNIT, "Wilcoxon signed-rank", p)


def against(values: Values, ours: str) -> dict[str, Test]:
    """Every other method against `ours` on one metric, paired over the cells that both have, Holm-corrected.

    Args:
        values: {method: {(class, seed): value}}; None where a value cannot be said.

    Raises:
        UserError: `ours` is not among the methods.
    """
    if ours not in values:
        raise UserError(f"there are no values of {ours!r}: choose from {', '.join(values)}")
    base, tests = values[ours], {}
    for name, cells in values.items():
        pairs = [(value, base.get(cell)) for cell, value in cells.items()]
        if name != ours:
            tests[name] = paired([a - b for a, b in pairs if a is not None and b is not None])
    corrected = holm([test.p for test in tests.values()])
    return {name: replace(test, p_holm=p) for (name, test), p in zip(tests.items(), corrected, strict=True)}
