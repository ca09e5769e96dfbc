"""Make tables and sentences of records: chosen points, intervals, which methods lead, one grid over all runs.

A *run* is a list of records that differ in top_k and kappa alone; a *family* is a list of runs that differ in the
seed and in the classes to forget alone. A cell of type `Lead` holds the best value, or one that cannot be told from it.
Everything is read from the records, so that a new method or metric appears without a change here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeGuard

from core.config import SupportedDatasets, SupportedVisionModels
from core.intervals import DUST, Cell, Cells, minus, over_seeds, same, within_seeds
from core.records import Limits, Metric, Record, axes_of
from reporting.families import Run, classes_of, dataset_of, labels_of, told_apart
from reporting.write import Lead

ARROWS = {"higher": "↑", "lower": "↓", "retrain": "→ retrained"}
REFERENCES = ("retrain", "default")  # what methods are held against: never the best themselves
MOST_NATS = 103.3  # -log of 2^-149, the smallest probability that float32 tells from 0
SPENT = {
    "once per classifier [s]": "seconds_offline",
    "one request alone [s]": "seconds_alone",
    "per request [s]": "seconds",
}
"""Columns of a table that say how long a method takes -> costs of a record (`measure.integrity.COSTS`)."""


@dataclass(frozen=True)
class Best:
    """A method's chosen point: top_k and kappa as far as it depends on them, and its test values."""

    method: str
    label: str
    top_k: int | None
    kappa: int | None
    values: dict[str, float]
    record: Record

    @property
    def verdicts(self) -> list[dict[str, str]]:
        """The record's verdicts on the method."""
        return self.record["verdicts"][self.method]

    def interval(self, metric: str) -> Limits | None:
        """Return the metric's own interval {value, low, high, n}, where the record has one."""
        return (self.record["intervals"][self.method] or {}).get(metric)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval (None: not known) and n, the number of seeds or images behind it."""

    value: float
    low: float | None
    high: float | None
    n: int


# --- runs and their chosen points -------------------------------------------------------------------------


def known(value: object) -> TypeGuard[float]:
    """Return whether a value can be compared: a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def two_digits(value: object) -> str | None:
    """Write a number with two digits, a large one without an exponent; None: not known."""
    return (f"{value:.2g}" if value < 100 else f"{value:,.0f}") if known(value) else None


def measurable(value: float, unit: str) -> bool:
    """Return whether a value is one that was measured: a larger loss than MOST_NATS is what a method wrote into a
    logit, such as the 10,000 nats of a logit that is dropped.
    """
    return unit != "nats" or abs(value) <= MOST_NATS


def by_gap(records: Iterable[Record]) -> bool:
    """Return whether points are chosen by Avg Gap: some method has one somewhere in the run."""
    return any(known(values.get("avg_gap")) for record in records for values in record["validation"].values())


def choose(records: Iterable[Record], method: str) -> Record:
    """Choose the record where a method does best on *validation* images.

    One criterion for the whole run: the smallest Avg Gap to retraining if any method has one anywhere in it, else
    (nothing was retrained) the largest retain minus forget score. A point without the value, e.g. because training
    diverged there, is the worst. Ties (but for rounding) go to the smaller kappa, then the smaller top_k.
    """
    run = list(records)
    gapped = by_gap(run)

    def lost(record: Record) -> float:
        values = record["validation"][method]
        gap, forget, retain = (values.get(name) for name in ("avg_gap", "forget_score", "retain_score"))
        if gapped:
            return gap if known(gap) else math.inf
        return forget - retain if known(forget) and known(retain) else math.inf

    candidates = [record for record in run if method in record["validation"]]
    least = min(map(lost, candidates))
    tied = [record for record in candidates if same(lost(record), least)]
    return min(tied, key=lambda record: (record["kappa"], record["top_k"]))


def best_points(records: Run) -> list[Best]:
    """Choose each method's point; methods in the order of the records."""
    names = dict.fromkeys(name for record in records for name in record["labels"])
    found = []
    for name in names:
        record = choose(records, name)
        axes = axes_of(record, name)
        top_k, kappa = (record[axis] if axis in axes else None for axis in ("top_k", "kappa"))
        found.append(Best(name, record["labels"][name], top_k, kappa, record["methods"][name], record))
    return found


def chosen_in(runs: Sequence[Run]) -> dict[str, list[Best]]:
    """method -> its chosen point in each run, for methods that every run has."""
    points = [{best.method: best for best in best_points(run)} for run in runs]
    return {name: [found[name] for found in points] for name in points[0] if all(name in found for found in points)}


# --- intervals --------------------------------------------------------------------------------------------


def cell_of(record: Record) -> Cell:
    """Return where the values of a record stand: its classifier, named by all that tells it from others, and classes.

    A classifier that was given is the same for all seeds; an interval over seeds then says what another seed of the
    run makes of this classifier.
    """
    classifier = (record["model"], record["images"], record["given"]["classifier"], record["seed"])
    return Cell(seed=classifier, classes=tuple(labels_of(record)))


def over_cells(cells: Cells) -> Estimate:
    """Average within each seed, then over seeds, with the t interval over seeds; none for a single seed."""
    means = within_seeds(cells)
    if len(means.values) < 2:
        return Estimate(means.mean, None, None, len(means.values))
    found = over_seeds(cells)
    return Estimate(found.value, found.low, found.high, found.n)


def estimate(points: Sequence[Best], metric: str) -> Estimate | None:
    """Average a metric over runs' chosen points; a single run keeps the interval of its record, if it has one."""
    cells = values_of(points, metric)
    if not cells:
        return None
    if len(points) == 1 and (own := points[0].interval(metric)):
        return Estimate(points[0].values[metric], own["low"], own["high"], own["n"])
    return over_cells(cells)


def values_of(points: Sequence[Best], metric: str) -> dict[Cell, float]:
    """Return a metric at every point; nothing if it is not known at one of them."""
    values = {cell_of(point.record): point.values.get(metric) for point in points}
    finite = {cell: value for cell, value in values.items() if known(value)}
    return finite if len(finite) == len(values) else {}


def losses_of(found: dict[str, list[Best]], metric: str, better: str) -> dict[str, dict[Cell, float]]:
    """method -> how far from the best possible it is in each cell; references, and methods without the value, are left
    out.
    """
    losses = {}
    for name, points in found.items():
        values = values_of(points, metric)
        unit = points[0].record["metrics"].get(metric, {}).get("unit", "")
        if name in REFERENCES or not values or not all(measurable(value, unit) for value in values.values()):
            continue
        if better == "retrain":
            targets = values_of(found.get("retrain", []), metric)
            if not targets:
                return {}
            losses[name] = {cell: abs(minus(value, targets[cell])) for cell, value in values.items()}
        else:
            losses[name] = {cell: -value if better == "higher" else value for cell, value in values.items()}
    return losses


def leaders(found: dict[str, list[Best]], metric: str, better: str) -> set[str]:
    """Find the best method, and those that cannot be told from it.

    Over several seeds: the 95 % t interval of the paired differences' means within the seeds reaches 0. In one run:
    the intervals overlap, if the record has some (which is cautious). Else, as in several runs of one seed, which share
    a classifier: the values are equal.
    """
    losses = losses_of(found, metric, better)
    if not losses:
        return set()
    means = {name: within_seeds(values).mean for name, values in losses.items()}
    first = min(means, key=lambda name: means[name])

    def tied(name: str) -> bool:
        if same(means[name], means[first]):
            return True
        differences = {cell: minus(value, losses[first][cell]) for cell, value in losses[name].items()}
        if len(differences) > 1:
            low = over_cells(differences).low
            return low is not None and low <= DUST
        mine, best = found[name][0].interval(metric), found[first][0].interval(metric)
        return bool(mine and best and mine["low"] <= best["high"] and best["low"] <= mine["high"])

    return {name for name in losses if tied(name)}


# --- tables -----------------------------------------------------------------------------------------------


def shown(found: Estimate | None) -> str:
    """ "12", "12 ± 3.1" over runs, "12 [9.2, 15.4]" where the interval is lopsided; "-" if there is none."""
    if found is None or not known(found.value):
        return "-"
    value = f"{0.0 if abs(found.value) < DUST else found.value:.4g}"
    if found.low is None or found.high is None:
        return value
    low, high = (0.0 if side < DUST else side for side in (found.value - found.low, found.high - found.value))
    if math.isclose(low, high, rel_tol=1e-6, abs_tol=DUST):
        return f"{value} ± {high:{'.2g' if high < 99.5 else '.0f'}}"
    return f"{value} [{found.low:.3g}, {found.high:.3g}]"


def metrics_of(runs: Sequence[Run], every: bool = True) -> dict[str, Metric]:
    """Return what the records say of their metrics: all of them, or those that are shown first."""
    found = {name: about for run in runs for name, about in run[0]["metrics"].items()}
    return {name: about for name, about in found.items() if every or about["first"]}


def budget(values: Sequence[int | None]) -> str:
    """Return numbers of weights as one text: "400", "100-400", or "-" where there are none."""
    given = [value for value in values if value is not None]
    if not given:
        return "-"
    return str(given[0]) if min(given) == max(given) else f"{min(given)}-{max(given)}"


def table(*runs: Run, every: bool = False) -> list[list[str]]:
    """Make a table's header and a row per method: chosen point and test values, of one run or a family's runs.

    Args:
        every: all metrics instead of those that are shown first.
    """
    metrics, found = metrics_of(runs, every), chosen_in(runs)
    head = [f"{name} [{about['unit']}, {ARROWS[about['better']]}]" for name, about in metrics.items()]
    bold = {name: leaders(found, name, about["better"]) for name, about in metrics.items()}
    judged = len(runs) == 1 and any(points[0].verdicts for points in found.values())
    rows = [["method", "top_k", "kappa", *head, "weights changed", *SPENT, *["verdict"] * judged]]
    for method, points in found.items():
        texts = {name: shown(estimate(points, name)) for name in metrics}
        marked = [Lead(text) if method in bold[name] else text for name, text in texts.items()]
        changed = budget([int(count) for count in values_of(points, "weights_changed").values()])
        spent = [values_of(points, name) for name in SPENT.values()]
        seconds = [f"{over_cells(one).value:.3f}" if one else "-" for one in spent]
        budgets = [budget([point.top_k for point in points]), budget([point.kappa for point in points])]
        said = [", ".join(one["key"] for one in points[0].verdicts) or "-"] * judged
        rows.append([points[0].label, *budgets, *marked, changed, *seconds, *said])
    return rows


def caption(*runs: Run, apart: str = "") -> str:
    """Caption a table: which runs its values are of; `apart`: what tells them from others of the same name."""
    first = runs[0][0]
    about = f"{first['model']} on {dataset_of(first)}" + (f" ({apart})" if apart else "")
    if len(runs) == 1:
        what = f"{about}, forgetting {classes_of(first)}, seed {first['seed']}: test values, one run"
        return f"{what}, [95 % interval over test images]" if any(first["intervals"].values()) else what
    classes = sorted({tuple(labels_of(run[0])) for run in runs})
    seeds = sorted({run[0]["seed"] for run in runs})
    named = f"classes {', '.join('+'.join(map(str, labels)) for labels in classes)}; seeds {', '.join(map(str, seeds))}"
    said = (
        "mean ± 95 % interval over the seeds" if len(seeds) > 1 else "mean; one classifier, so no interval over seeds"
    )
    return f"{about}: test values, {said}, n = {len(runs)} runs ({named})"


def grid(groups: Sequence[list[Run]], metric: str) -> list[list[str]]:
    """Make a table of one metric: a row for each family, a column for each method."""
    labels = {name: label for runs in groups for run in runs for name, label in run[0]["labels"].items()}
    apart = told_apart(groups)
    rows = [["model", "dataset", *["apart by"] * any(apart), "runs", *labels.values()]]
    order = sorted(zip(groups, apart, strict=True), key=lambda one: (one[0][0][0]["model"], dataset_of(one[0][0][0])))
    for runs, differs in order:
        first, found = runs[0][0], chosen_in(runs)
        better = first["metrics"].get(metric, {}).get("better", "lower")
        bold = leaders(found, metric, better)
        cells = [shown(estimate(found[name], metric)) if name in found else "-" for name in labels]
        marked = [Lead(cell) if name in bold else cell for name, cell in zip(labels, cells, strict=True)]
        told = [differs or "-"] * any(apart)
        rows.append([first["model"], dataset_of(first), *told, str(len(runs)), *marked])
    return rows


def without_records(groups: Sequence[list[Run]]) -> list[str]:
    """Return the combinations of model and dataset that no record is of."""
    seen = {(runs[0][0]["model"], runs[0][0]["dataset"]) for runs in groups}
    every = ((model, data) for model in SupportedVisionModels.built_in for data in SupportedDatasets.built_in)
    return [f"{model} on {data}" for model, data in every if (model, data) not in seen]


def as_json(records: Run) -> list[dict]:
    """Return the run's table as objects: names as in the records, numbers as numbers."""
    return [
        {"method": best.method, "label": best.label, "top_k": best.top_k, "kappa": best.kappa, **best.values}
        | {"intervals": best.record["intervals"][best.method], "verdicts": best.verdicts}
        for best in best_points(records)
    ]


def over_seeds_as_json(runs: Sequence[Run]) -> list[dict]:
    """Return the table of a family's runs as objects: method -> metric -> {value, low, high, n}; low and high are the
    95 % interval over n seeds, null for one.
    """
    objects = []
    for name, points in chosen_in(runs).items():
        found = {metric: values_of(points, metric) for metric in (*metrics_of(runs), "weights_changed", "seconds")}
        measured = {metric: asdict(over_cells(cells)) for metric, cells in found.items() if cells}
        objects.append({"method": name, "label": points[0].label, **measured})
    return objects
