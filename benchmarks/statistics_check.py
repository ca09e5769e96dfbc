"""Do intervals and tests over seeds keep what they promise, and what do the published means allow to say?

    uv run benchmarks/statistics_check.py                    a minute
    [--trials N] [--json PATH] [--docs]

The simulation draws the difference of two methods, of which neither is better: a part that all classes of a seed share
(they share a classifier) and a part of each cell, with variances that sum to 1. `core.intervals` averages within each
seed first; the rule before it took class x seed cells as independent, by a t interval over cells and Wilcoxon's
signed-rank test. The other tables are computed from docs/results/comparison_mlp.json. Where that file keeps the mean
of each seed, p is the paired t test's; where it keeps means and intervals over seeds alone, the interval of a
difference is known between two limits, and so is its p.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, for_pages, keep, parser, publish_all
from benchmarks.docs_tables import load

import numpy as np
from scipy.stats import t as student
from scipy.stats import wilcoxon

from core.intervals import Cell, Test, against, holm, paired
from reporting.write import as_text

CLASSES, TRIALS = 10, 10_000
SEEDS, SHARES = (3, 5, 10), (0.2, 0.5)
LEVEL = 0.05
SHIFT = 1.0  # of a real difference, in standard deviations of a cell
OURS = "MIMU refined (ours)"
LEFT = {"probe gap": "retrained", "relearn 10": "untouched"}  # what is left of a class -> beside which row
HALF_A_DIGIT = 0.5


# --- the simulation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is drawn: the number of seeds, the share of the variance between them, and the shape of that part."""

    seeds: int
    share: float
    skewed: bool = False

    def draw(self, trials: int, generator: np.random.Generator) -> np.ndarray:
        """Differences of mean 0 and variance 1 [trials, seeds, classes]; skewed: seeds' parts are exponential."""
        shape = (trials, self.seeds, 1)
        between = generator.exponential(size=shape) - 1 if self.skewed else generator.normal(size=shape)
        within = generator.normal(size=(trials, self.seeds, CLASSES))
        return math.sqrt(self.share) * between + math.sqrt(1 - self.share) * within


@dataclass(frozen=True)
class Shares:
    """Shares of trials: whose interval covers 0, and whose tests reject it at 5 %; with cells as independent, too."""

    covers: float
    rejects: float
    flips_reject: float
    cells_cover: float
    cells_reject: float


def tested(drawn: np.ndarray) -> list[Test]:
    """Test each trial of [trials, seeds, classes] by one value a seed."""
    _, seeds, classes = drawn.shape
    cells = [Cell(seed=seed, classes=(label,)) for seed in range(seeds) for label in range(classes)]
    return [paired(dict(zip(cells, trial, strict=True))) for trial in drawn.reshape(len(drawn), -1).tolist()]


def cells_as_independent(values: np.ndarray) -> tuple[float, float]:
    """Shares that the old rule covers and rejects, of values [trials, seeds, classes]."""
    flat = values.reshape(len(values), -1)
    n = flat.shape[1]
    half = student.ppf(0.975, n - 1) * flat.std(1, ddof=1) / math.sqrt(n)
    return float((np.abs(flat.mean(1)) <= half).mean()), float((wilcoxon(flat, axis=1).pvalue < LEVEL).mean())


def simulate(setting: Setting, trials: int, seed: int = 0) -> Shares:
    """Draw trials whose true difference is 0, and judge them by both rules."""
    drawn = setting.draw(trials, np.random.default_rng(seed))
    tests = tested(drawn)
    covers = np.mean([test.low <= 0 <= test.high for test in tests])
    return Shares(float(covers), *rejected(tests), *cells_as_independent(drawn))


def rejected(tests: Sequence[Test]) -> tuple[float, float]:
    """Shares of trials that the t test and the flipped signs reject at 5 %."""
    both = np.mean([(test.p < LEVEL, test.p_flips < LEVEL) for test in tests], axis=0)
    return float(both[0]), float(both[1])


def found(setting: Setting, trials: int, seed: int = 0) -> tuple[float, float]:
    """The same shares where there is a difference of SHIFT."""
    return rejected(tested(setting.draw(trials, np.random.default_rng(seed)) + SHIFT))


def settings() -> list[Setting]:
    """Every setting of the table."""
    normal = [Setting(seeds, share) for share in SHARES for seeds in SEEDS]
    return [*normal, *(Setting(seeds, SHARES[-1], skewed=True) for seeds in SEEDS)]


def simulation_table(trials: int) -> list[list[str]]:
    """A row a setting, shares in percent."""
    head = ["between seeds, %", "seeds", "interval covers", "t test rejects", "flips reject", "least p of flips"]
    rows = [[*head, "t test finds", "flips find", "cells: interval covers", "cells: Wilcoxon rejects"]]
    for setting in settings():
        shares = simulate(setting, trials)
        name = f"{100 * setting.share:.0f}" + (", skewed" if setting.skewed else "")
        over_seeds = [shares.covers, shares.rejects, shares.flips_reject]
        rest = [*found(setting, trials), shares.cells_cover, shares.cells_reject]
        first, second = ([f"{100 * value:.1f}" for value in values] for values in (over_seeds, rest))
        rows.append([name, str(setting.seeds), *first, f"{0.5 ** (setting.seeds - 1):.3g}", *second])
    return rows


# --- what the published means allow -----------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A mean with the half width of its t interval, and by how much rounding may have moved each."""

    mean: float
    half: float
    mean_off: float
    half_off: float


def last_digit(text: str) -> float:
    """Half a unit of a number's last digit: .0005 of "0.141"."""
    digits = re.fullmatch(r"-?[\d,]*\.?(\d*)(e-\d+)?", text)
    assert digits, text
    return HALF_A_DIGIT * 10.0 ** (-len(digits[1])) * float("1" + (digits[2] or ""))


def published(text: str) -> Published:
    """Read "0.141 ± 0.013"."""
    mean, half = text.split(" ± ")
    return Published(float(mean), float(half), last_digit(mean), last_digit(half))


def limits_of_p(one: Published, ours: Published, seeds: int) -> tuple[float, float]:
    """Least and largest p of the paired t test over seeds that means and intervals of both methods leave open.

    The standard deviation of a difference lies between the difference and the sum of both standard deviations, and
    half widths of the same number of seeds are in the same proportion.
    """
    apart, off = abs(one.mean - ours.mean), one.mean_off + ours.mean_off
    rounding = one.half_off + ours.half_off
    narrow, wide = max(0.0, abs(one.half - ours.half) - rounding), one.half + ours.half + rounding
    quantile = student.ppf(0.975, seeds - 1)

    def p(difference: float, half: float) -> float:
        return 2 * float(student.sf(quantile * difference / half, seeds - 1)) if half else 0.0 if difference else 1.0

    return p(apart + off, narrow), p(max(0.0, apart - off), wide)


def verdict(least: float, most: float) -> str:
    """Say what is known of a p from its limits."""
    return "apart" if most < LEVEL else "not told apart" if least >= LEVEL else "open"


def between(least: float, most: float) -> str:
    """Limits of a p in words."""
    shown = [f"{value:.2g}" if value >= 0.0001 else "<.0001" for value in (least, most)]
    return shown[0] if shown[0] == shown[1] else " to ".join(shown)


def column_of(table: dict, column: str) -> dict[str, Published]:
    """Method -> its published value; methods without an interval are left out."""
    place = table["columns"].index(column)
    return {row[0]: published(row[place]) for row in table["rows"] if " ± " in row[place]}


def known_p(table: dict, column: str, ours: str) -> dict[str, tuple[float, float]]:
    """Method -> p of the paired t test over the seeds' means that the file keeps, as both limits."""
    kept = {method: columns[column] for method, columns in table["seeds"].items()}
    values = {
        method: {Cell(seed=seed, classes=()): value for seed, value in means.items()} for method, means in kept.items()
    }
    return {method: (test.p, test.p) for method, test in against(values, ours).items()}


Judged = dict[str, tuple[float, tuple[float, float], tuple[float, float]]]


def judged(table: dict, column: str, seeds: int, ours: str = OURS) -> Judged:
    """Method -> its mean minus that of `ours`, limits of p, and limits of p after Holm's correction."""
    values = column_of(table, column)
    base = values.pop(ours)
    known = known_p(table, column, ours) if "seeds" in table else {}
    limits = [known.get(name) or limits_of_p(value, base, seeds) for name, value in values.items()]
    corrected = zip(*(holm([pair[side] for pair in limits]) for side in (0, 1)), strict=True)
    rest = zip(values.items(), limits, corrected, strict=True)
    return {name: (value.mean - base.mean, pair, held) for (name, value), pair, held in rest}


def allowed_table(table: dict, columns: Sequence[str], ours: str = OURS) -> list[list[str]]:
    """A row a method: difference to one of them, limits of p before and after Holm, and what that says."""
    seeds = int(re.findall(r"x (\d+) classifiers", table["n"])[0])
    found = {column: judged(table, column, seeds, ours) for column in columns}
    parts = ("minus ours" if ours == OURS else f"minus {ours}", "p", "p (Holm)", "says")
    rows = [["method", *(f"{column}: {part}" for column in columns for part in parts)]]
    for method in found[columns[0]]:
        row = [method]
        for column in columns:
            apart, plain, held = found[column][method]
            row += [f"{apart:+.3g}", between(*plain), between(*held), verdict(*held)]
        rows.append(row)
    return rows


def counted(table: dict) -> str:
    """Say over what the second table is taken."""
    kept = "the mean of each seed" if "seeds" in table else "means and intervals; single cells were not kept"
    return f"{table['n'].partition(' (')[0]}: {kept}"


def main() -> None:
    """Parse, simulate, read what is published, print all tables, two of which stand on a page."""
    flags = parser(__doc__)
    flags.add_argument("--trials", type=int, default=TRIALS, help="draws for each row")
    for_pages(flags)
    arguments = flags.parse_args()
    published_table = load("comparison_mlp")
    simulated = simulation_table(arguments.trials)
    allowed = allowed_table(published_table, ("Avg Gap", "retain %"))
    left = [allowed_table(published_table, [column], ours) for column, ours in LEFT.items()]
    print("\n\n".join(map(as_text, (simulated, allowed, *left))))
    tables: Tables = {
        "statistics_check": (f"{arguments.trials:,} trials a row, {CLASSES} classes a seed; percent", simulated),
        "statistics_comparison": (counted(published_table), allowed),
    }
    keep(arguments.json, {name: rows for name, (_, rows) in tables.items()})
    publish_all(arguments.docs, tables)


if __name__ == "__main__":
    main()
