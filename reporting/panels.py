"""Figures declared as data: records -> panels, which `draw` draws for print and the page on screen.

Every figure is one function with `@figure` (or one line of `TERMS` in `figures`); metrics and methods come from the
records. Here are those that hold methods against each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from core.choices import NotRegistered, Registry
from core.records import SCORES, Axis, Metric, Record, axes_of
from reporting.families import Run, classes_of
from reporting.tables import (
    REFERENCES,
    Estimate,
    by_gap,
    cell_of,
    choose,
    chosen_in,
    estimate,
    known,
    measurable,
    metrics_of,
    over_cells,
)

AHEAD = 6  # methods whose colour comes before those of the references
FAR = 6  # times the range of what is shown: a value further away than that is named at the edge of the axis
SLIGHT = 0.01  # share of a value that counts as a range: what lies closer together than that is not crushed
MOST_NAMES = 4  # at an edge
WIDE = 1e3  # largest / smallest value from which an axis is logarithmic
BETTER = {"higher": "higher is better", "lower": "lower is better", "retrain": "best as retrained"}
RANGES = {"%": (0.0, 100.0), "probability": (0.0, 1.0)}  # a band is drawn no further, though a t interval knows no end


@dataclass(frozen=True)
class Series:
    """One thing drawn. `kind`: line, points, star, front (stairs through the best), level (a horizontal line; y[0]),
    bars or steps (x holds one edge more than y). `style` numbers colour and marker; low and high are 95 % limits.
    """

    label: str
    x: list[float]
    y: list[float]
    kind: str = "line"
    style: int = 0
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes. With `cells` [R][C] it is a heat map (with the sums of rows and columns if `margins`; about 0
    if `signed`), with `ticks` its x axis has names. With `y_range` the y axis ends there, and what lies outside is
    named in `above` and `below`.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    alt: str = ""
    ticks: list[str] | None = None
    x_log: bool = False
    y_log: bool = False
    cells: Sequence[Sequence[float]] | None = None
    margins: bool = False
    signed: bool = False
    y_range: tuple[float, float] | None = None
    above: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)


def in_style(record: Record) -> list[str]:
    """List the methods in the order of their colours and markers, which are the same in every figure of a run.

    Of more methods than colours some share one. The answer, the retrained and the untouched classifier are bars beside
    each other, so that they stand among the first, which have a colour each.
    """
    others = [name for name in record["labels"] if name not in REFERENCES]
    if record["answer"] in others[AHEAD:]:
        others = [record["answer"], *(name for name in others if name != record["answer"])]
    references = [name for name in REFERENCES if name in record["labels"]]
    return [*others[:AHEAD], *references, *others[AHEAD:]]


def style_of(record: Record, method: str) -> int:
    """Choose a method's colour and marker by its place among all methods of the record."""
    return in_style(record).index(method)


# --- the registry -----------------------------------------------------------------------------------------

Draw = Callable[[Sequence[Run]], list[Panel]]
FIGURES: Registry[tuple[Draw, bool]] = Registry("figure")
"""Name -> its function, and whether the figure is of a single run alone."""


def figure(name: str, *, alone: bool = False) -> Callable[[Draw], Draw]:
    """Register a function from runs to panels as a figure; no panels: the figure is left out.

    Args:
        name: of its files. alone: the figure is of a single run; it is left out for several runs, and where the run's
            answer has no values.

    Raises:
        ValueError: the name is taken, or is one of those that a metric's figure or a training curve may have.
    """
    if "_over_" in name or name.startswith("training"):
        raise NotRegistered(
            f"a figure cannot be called {name!r}: metrics over an axis and training curves are called so"
        )

    def register(function: Draw) -> Draw:
        FIGURES.add(name, (function, alone), function.__module__)
        return function

    return register


# --- outliers ---------------------------------------------------------------------------------------------


def shown_range(values: Sequence[float], kept: Sequence[float]) -> tuple[float, float]:
    """Choose which part of an axis to show: all of `kept`, and of the rest what does not crush it.

    On each side the range grows from value to value, up to the first that is further away than FAR times the range so
    far (at least SLIGHT of the values' size).
    """
    low, high = min(kept), max(kept)

    def far(distance: float) -> bool:
        return distance > FAR * max(high - low, SLIGHT * max(abs(low), abs(high)))

    for value in sorted(values):
        if value > high:
            if far(value - high):
                break
            high = value
    for value in sorted(values, reverse=True):
        if value < low:
            if far(low - value):
                break
            low = value
    return low, high


def within_range(panel: Panel, record: Record, nats: bool = False) -> Panel:
    """End a panel's y axis before values that would crush the rest, and name these at the edge.

    The answer's, the untouched and the retrained classifier's values are always shown; on a logarithmic axis all are.

    Args:
        panel: its series' styles are those of `style_of`, or by whole multiples of the methods' number larger.
        record: names the methods.
        nats: values are losses: those that are no measurement (`tables.measurable`) are left out in any case.
    """
    series = [one for one in panel.series if one.kind != "front"]
    whole = {style_of(record, name) for name in (record["answer"], *REFERENCES) if name in record["labels"]}
    fine = [[y for y in one.y if measurable(y, "nats" if nats else "")] for one in series]
    count = len(record["labels"])
    kept = [y for one, ys in zip(series, fine, strict=True) if one.style % count in whole for y in ys]
    every = [y for ys in fine for y in ys]
    if not kept:
        return panel
    low, high = (min(every), max(every)) if panel.y_log else shown_range(every, kept)
    beyond = [{one.label: worst for one in series if (worst := of(one.y)) * sign > bound * sign}
              for of, bound, sign in ((max, high, 1), (min, low, -1))]  # fmt: skip
    if not any(beyond):
        return panel
    ends = [end for one in series for y, *limits in _with_ends(one) if low <= y <= high for end in limits]
    ends = [end for end in ends if end > 0 or not panel.y_log]
    shown = (min([low, *ends]), max([high, *ends]))
    above, below = (_named(one) for one in beyond)
    return replace(panel, y_range=shown, above=above, below=below)


def _with_ends(one: Series) -> Iterator[tuple[float, ...]]:
    """Yield each value of a series with the ends of its interval, if it has one."""
    return zip(one.y, one.low, one.high, strict=True) if one.low and one.high else ((y,) for y in one.y)


def _named(values: Mapping[str, float]) -> list[str]:
    """Name values that are not shown, of many the first few: "SFT randomisation 40.9"."""
    said = [f"{label} {value:.3g}" for label, value in values.items()]
    return said if len(said) <= MOST_NAMES else [*said[:MOST_NAMES], f"and {len(said) - MOST_NAMES} more"]


# --- metrics over the sweep -------------------------------------------------------------------------------


def _name(about: Metric, metric: str) -> str:
    return f"{metric.replace('_', ' ')} [{about['unit']}], {BETTER[about['better']]}"


def _at(runs: Sequence[Run], method: str, metric: str, place: Mapping[Axis, int]) -> Estimate | None:
    """Return a method's value over the runs at a place such as kappa 400; None unless some run has it there."""
    found = [next((r for r in run if all(r[key] == value for key, value in place.items())), None) for run in runs]
    records = [record for record in found if record and known(record["methods"].get(method, {}).get(metric))]
    if not records:
        return None
    own = (records[0]["intervals"][method] or {}).get(metric)
    if len(records) == 1 and own:
        return Estimate(own["value"], own["low"], own["high"], own["n"])
    return over_cells({cell_of(record): record["methods"][method][metric] for record in records})


def with_limits(label: str, points: list[tuple[float, Estimate]], kind: str, style: int) -> Series:
    """Make a series, with a band where every point has limits."""
    found = [estimate for _, estimate in points]
    limits = [[one.low for one in found], [one.high for one in found]]
    low, high = limits if all(value is not None for side in limits for value in side) else (None, None)
    values = [one.value for one in found]
    return Series(label, [x for x, _ in points], values, kind, style, low, high)  # ty: ignore[invalid-argument-type]


def _lines(runs: Sequence[Run], method: str, metric: str, axis: Axis) -> list[Series]:
    """Plot a method over kappa (of several top_k, a line each) or over top_k (at its chosen kappa)."""
    first = runs[0][0]
    style, label, axes = style_of(first, method), first["labels"][method], axes_of(first, method)
    places = sorted({record[axis] for run in runs for record in run})
    fixed: list[dict[Axis, int]] = [{}]
    budgets = sorted({record["top_k"] for run in runs for record in run})
    if axis == "kappa" and "top_k" in axes and len(budgets) > 1:
        fixed = [{"top_k": k} for k in budgets]
    elif axis == "top_k" and "kappa" in axes:
        fixed = [{"kappa": choose(runs[0], method)["kappa"]}]
    found = []
    for number, rest in enumerate(fixed):
        points = [(x, _at(runs, method, metric, {axis: x, **rest})) for x in places]
        known = [(float(x), one) for x, one in points if one]
        name = label + "".join(f", {k} {v:,}" for k, v in rest.items())
        if known:
            found.append(with_limits(name, known, "line", style + number * len(first["labels"])))
    return found


def over(runs: Sequence[Run], metric: str, axis: Axis) -> Panel:
    """Plot a metric over kappa or top_k; a method without that axis is a level, at its chosen point."""
    first, about, found = runs[0][0], metrics_of(runs)[metric], chosen_in(runs)
    series = []
    for method, points in found.items():
        if axis in axes_of(first, method):
            series += _lines(runs, method, metric, axis)
        elif level := estimate(points, metric):
            series.append(with_limits(points[0].label, [(0.0, level)], "level", style_of(first, method)))
    series = [_within(one, *RANGES.get(about["unit"], (-math.inf, math.inf))) for one in series]
    nats = about["unit"] == "nats"
    values = [value for one in series for value in one.y if measurable(value, about["unit"])]
    spread = bool(values) and min(values) > 0 and max(values) / min(values) > WIDE and about["unit"] != "probability"
    what = {"kappa": "kappa (weights switched off)", "top_k": "top_k (weights held to be important)"}[axis]
    alt = f"{metric.replace('_', ' ')} of {len(found)} methods over {axis}, {extent(series)}."
    return within_range(Panel(_name(about, metric), what, about["unit"], series, alt, y_log=spread), first, nats)


def _within(series: Series, least: float, most: float) -> Series:
    """Cut a series' band at the ends of what its unit allows."""
    if series.low is None or series.high is None:
        return series
    low, high = ([min(max(value, least), most) for value in side] for side in (series.low, series.high))
    return replace(series, low=low, high=high)


def extent(series: Sequence[Series]) -> str:
    """Describe what a drawing shows, for those who do not see it."""
    return "; ".join(f"{s.label}: {min(s.y):.4g} to {max(s.y):.4g}" for s in series if s.y and s.kind != "front")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (forget score, retain score) those that no other is at least as good as in both, by forget score."""
    front: list[tuple[float, float]] = []
    for forget, retain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or retain > front[-1][1]:
            front.append((forget, retain))
    return front


@figure("trade_off")
def trade_off(runs: Sequence[Run]) -> list[Panel]:
    """Plot forget against retain score, with the methods' Pareto front and the retrained model as a star."""
    first, about, series, every = runs[0][0], metrics_of(runs), [], []
    for method in chosen_in(runs):
        pairs = []
        forgets, retains = (_or_level(runs, method, metric) for metric in SCORES)
        for forget, retain in _both(forgets, retains):
            pairs += list(zip(forget.y, retain.y, strict=True))
            kind = "star" if method == "retrain" else "line" if len(forget.y) > 1 else "points"
            limits = (retain.low, retain.high) if len(runs) > 1 or kind != "line" else (None, None)
            series.append(Series(retain.label, forget.y, retain.y, kind, retain.style, *limits))
        every += [] if method in ("retrain", "default") else pairs
    if front := pareto(every):
        series.append(Series("Pareto front", [x for x, _ in front], [y for _, y in front], "front", -1))
    alt = f"Retain score against forget score; the Pareto front has {len(front)} points. {extent(series)}."
    title = f"forgetting {classes_of(first)}: top left is best" if len(runs) == 1 else "trade-off: top left is best"
    x, y = (_name(about[metric], metric) for metric in SCORES)
    return [within_range(Panel(title, x, y, series, alt), first)]


def _both(ours: Sequence[Series], theirs: Sequence[Series]) -> Iterator[tuple[Series, Series]]:
    """Series of the same label, at the places that both have."""
    others = {one.label: one for one in theirs}
    for one in ours:
        if other := others.get(one.label):
            shared = set(one.x) & set(other.x)
            yield _only(one, shared), _only(other, shared)


def _only(series: Series, places: set[float]) -> Series:
    """Return a series at some places."""
    kept = [place for place, x in enumerate(series.x) if x in places]
    sides = {name: getattr(series, name) for name in ("x", "y", "low", "high")}
    return replace(series, **{name: side and [side[place] for place in kept] for name, side in sides.items()})


def _or_level(runs: Sequence[Run], method: str, metric: str) -> list[Series]:
    if "kappa" in axes_of(runs[0][0], method):
        return _lines(runs, method, metric, "kappa")
    points = chosen_in(runs)[method]
    found = estimate(points, metric)
    return [with_limits(points[0].label, [(0.0, found)], "level", style_of(runs[0][0], method))] if found else []


@figure("time_against_quality")
def time_against_quality(runs: Sequence[Run]) -> list[Panel]:
    """Plot seconds (log axis) against Avg Gap, or retain minus forget score where nothing was retrained."""
    first, gap = runs[0][0], by_gap(record for run in runs for record in run)
    series = []
    for method, points in chosen_in(runs).items():
        times = {cell_of(point.record): point.values["seconds"] for point in points}
        found = {cell_of(one.record): quality for one in points if known(quality := _quality(one.values, gap))}
        if len(found) < len(points) or not all(map(known, times.values())):  # it diverged somewhere
            continue
        seconds = over_cells(times).value
        if seconds > 0:
            place = [(seconds, over_cells(found))]
            series.append(with_limits(points[0].label, place, "points", style_of(first, method)))
    name = "Avg Gap to retrained [points], lower is better" if gap else "retain - forget score, higher is better"
    return [Panel("time against quality", "seconds to unlearn", name, series, f"{name}: {extent(series)}.", x_log=True)]


def _quality(values: dict[str, float], gap: bool) -> float | None:
    """Avg Gap, or retain minus forget score; None for a method that diverged."""
    forget, retain = (values.get(score) for score in SCORES)
    return values.get("avg_gap") if gap else retain - forget if known(forget) and known(retain) else None
