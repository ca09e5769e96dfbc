"""Do intervals and tests over seeds keep what they promise, and what do the published means of seeds show?

    uv run benchmarks/statistics_check.py                    a minute
    [--trials N] [--json PATH] [--docs]

The simulation draws the difference of two methods, of which neither is better: a part that all classes of a seed share
(they share a classifier) and a part of each cell, with variances that sum to 1. `core.intervals` averages within each
seed first; the rule before it took class x seed cells as independent, by a t interval over cells and Wilcoxon's
signed-rank test. The other tables are paired t tests of the means of each seed that docs/results/comparison_mlp.json
keeps.
"""

import math
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

from core.intervals import Cell, Test, against, paired
from reporting.write import as_text

CLASSES, TRIALS = 10, 10_000
SEEDS, SHARES = (3, 5, 10), (0.2, 0.5)
LEVEL = 0.05
SHIFT = 1.0  # of a real difference, in standard deviations of a cell
OURS = "MIMU refined (ours)"
LEFT = {"probe gap": "retrained", "relearn 10": "untouched"}  # what is left of a class -> beside which row
LEAST_SHOWN = 0.0001


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


# --- what the published means of seeds show ---------------------------------------------------------------


def against_ours(table: dict, column: str, ours: str = OURS) -> dict[str, Test]:
    """Every method against `ours` in one column of a published table, by the seeds' means that its file keeps."""
    values = {
        method: {Cell(seed=seed, classes=()): value for seed, value in means[column].items()}
        for method, means in table["seeds"].items()
        if column in means
    }
    return against(values, ours)


def shown_p(p: float) -> str:
    """Return a p with two digits; "-" where no test was made."""
    return "-" if math.isnan(p) else f"{p:.2g}" if p >= LEAST_SHOWN else f"<{LEAST_SHOWN}"


def compared(table: dict, columns: Sequence[str], ours: str = OURS) -> list[list[str]]:
    """A row a method: difference with its interval, p, p after Holm's correction, and whether that is below 5 %."""
    found = {column: against_ours(table, column, ours) for column in columns}
    parts = ("minus ours" if ours == OURS else f"minus {ours}", "p", "p (Holm)", "says")
    rows = [["method", *(f"{column}: {part}" for column in columns for part in parts)]]
    for method in (row[0] for row in table["rows"] if row[0] in found[columns[0]]):
        tests = [found[column].get(method) for column in columns]
        rows.append([method, *(cell for test in tests for cell in (cells_of(test) if test else ["-"] * len(parts)))])
    return rows


def cells_of(test: Test) -> list[str]:
    """The cells of one test."""
    says = "apart" if test.p_holm < LEVEL else "not told apart"
    apart = f"{test.difference:+.3g} ± {test.high - test.difference:.2g}"
    return [apart, shown_p(test.p), shown_p(test.p_holm), says]


def counted(table: dict) -> str:
    """Say over what the second table is taken."""
    return f"{table['n'].partition(' (')[0]}: paired t tests of the seeds' means"


def main() -> None:
    """Parse, simulate, read what is published, print all tables, two of which stand on a page."""
    flags = parser(__doc__)
    flags.add_argument("--trials", type=int, default=TRIALS, help="draws for each row")
    for_pages(flags)
    arguments = flags.parse_args()
    published = load("comparison_mlp")
    simulated = simulation_table(arguments.trials)
    shown = compared(published, ("Avg Gap", "retain %"))
    left = [compared(published, [column], ours) for column, ours in LEFT.items()]
    print("\n\n".join(map(as_text, (simulated, shown, *left))))
    tables: Tables = {
        "statistics_check": (f"{arguments.trials:,} trials a row, {CLASSES} classes a seed; percent", simulated),
        "statistics_comparison": (counted(published), shown),
    }
    keep(arguments.json, {name: rows for name, (_, rows) in tables.items()})
    publish_all(arguments.docs, tables)


if __name__ == "__main__":
    main()
