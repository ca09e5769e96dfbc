"""Figures declared as data: records -> panels, which `draw` draws for print and the page on screen.

Every figure is one function with `@figure` (or one line of `TERMS` in `curves`); metrics and methods come from the
records.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from core.choices import NotRegistered, Registry
from core.records import SCORES, Axis, Metric, Record, axes_of
from reporting.families import Run
from reporting.tables import (
    Estimate,
    best_points,
    by_gap,
    cell_of,
    choose,
    chosen_in,
    classes_of,
    estimate,
    known,
    metrics_of,
    over_cells,
)

MOST_BARS = 20  # groups of bars, or blocks of a heat map's side: more are cut or joined, and the title says so
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
    if `signed`), with `ticks` its x axis has names.
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


def style_of(record: Record, method: str) -> int:
    """Choose a method's colour and marker by its place in the record, so that they are the same in every figure."""
    return list(record["labels"]).index(method)


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


def _with_limits(label: str, points: list[tuple[float, Estimate]], kind: str, style: int) -> Series:
    """Make a series, with a band where every point has limits."""
    found = [estimate for _, estimate in points]
    limits = [[one.low for one in found], [one.high for one in found]]
    low, high = limits if all(value is not None for side in limits for value in side) else (None, None)
    values = [one.value for one in found]
    return Series(label, [x for x, _ in points], values, kind, style, low, high)  # ty: ignore[invalid-argument-type]


def _lines(runs: Sequence[Run], method: str, metric: str, axis: Axis) -> list[Series]:
    """Plot a method over kappa (one line per top_k it depends on) or over top_k (at its chosen kappa)."""
    first = runs[0][0]
    style, label, axes = style_of(first, method), first["labels"][method], axes_of(first, method)
    places = sorted({record[axis] for run in runs for record in run})
    fixed: list[dict[Axis, int]] = [{}]
    if axis == "kappa" and "top_k" in axes:
        fixed = [{"top_k": k} for k in sorted({record["top_k"] for run in runs for record in run})]
    elif axis == "top_k" and "kappa" in axes:
        fixed = [{"kappa": choose(runs[0], method)["kappa"]}]
    found = []
    for number, rest in enumerate(fixed):
        points = [(x, _at(runs, method, metric, {axis: x, **rest})) for x in places]
        known = [(float(x), one) for x, one in points if one]
        name = label + "".join(f", {k} {v:,}" for k, v in rest.items())
        if known:
            found.append(_with_limits(name, known, "line", style + number * len(first["labels"])))
    return found


def over(runs: Sequence[Run], metric: str, axis: Axis) -> Panel:
    """Plot a metric over kappa or top_k; a method without that axis is a level, at its chosen point."""
    first, about, found = runs[0][0], metrics_of(runs)[metric], chosen_in(runs)
    series = []
    for method, points in found.items():
        if axis in axes_of(first, method):
            series += _lines(runs, method, metric, axis)
        elif level := estimate(points, metric):
            series.append(_with_limits(points[0].label, [(0.0, level)], "level", style_of(first, method)))
    series = [_within(one, *RANGES.get(about["unit"], (-math.inf, math.inf))) for one in series]
    values = [value for one in series for value in one.y]
    spread = bool(values) and min(values) > 0 and max(values) / min(values) > WIDE and about["unit"] != "probability"
    what = {"kappa": "kappa (weights switched off)", "top_k": "top_k (weights held to be important)"}[axis]
    alt = f"{metric.replace('_', ' ')} of {len(found)} methods over {axis}, {extent(series)}."
    return Panel(_name(about, metric), what, about["unit"], series, alt, y_log=spread)


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
            series.append(Series(retain.label, forget.y, retain.y, kind, retain.style, retain.low, retain.high))
        every += [] if method in ("retrain", "default") else pairs
    if front := pareto(every):
        series.append(Series("Pareto front", [x for x, _ in front], [y for _, y in front], "front", -1))
    alt = f"Retain score against forget score; the Pareto front has {len(front)} points. {extent(series)}."
    title = f"forgetting {classes_of(first)}: top left is best" if len(runs) == 1 else "trade-off: top left is best"
    x, y = (_name(about[metric], metric) for metric in SCORES)
    return [Panel(title, x, y, series, alt)]


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
    return [_with_limits(points[0].label, [(0.0, found)], "level", style_of(runs[0][0], method))] if found else []


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
            series.append(_with_limits(points[0].label, place, "points", style_of(first, method)))
    name = "Avg Gap to retrained [points], lower is better" if gap else "retain - forget score, higher is better"
    return [Panel("time against quality", "seconds to unlearn", name, series, f"{name}: {extent(series)}.", x_log=True)]


def _quality(values: dict[str, float], gap: bool) -> float | None:
    """Avg Gap, or retain minus forget score; None for a method that diverged."""
    forget, retain = (values.get(score) for score in SCORES)
    return values.get("avg_gap") if gap else retain - forget if known(forget) and known(retain) else None


# --- classes ----------------------------------------------------------------------------------------------


def class_scores(record: Record, method: str) -> list[float | None] | None:
    """Return every class's accuracy in percent (None: no images of it); None if the record has no such table."""
    table = record["confusion"][method]
    if table:
        return [100 * row[place] / sum(row) if sum(row) else None for place, row in enumerate(table)]
    return record["class_score"][method]


def taken_for(record: Record, method: str) -> list[float] | None:
    """Share of the forgotten test images that is taken for each class, percent."""
    table = record["confusion"][method]
    named = record["forget_class"]
    if table:
        counts = [sum(table[row][place] for row in named) for place in range(len(table))]
    else:
        counts = record["taken_for"][method]
    return [100 * count / sum(counts) for count in counts] if counts and sum(counts) else None


def _compared(record: Record) -> list[str]:
    """Untouched, answer, retrained: as far as they are measured."""
    return [name for name in ("default", record["answer"], "retrain") if name in record["labels"]]


def _bars(
    record: Record, of: dict[str, list], rank: Callable[[int], float], title: str, y_label: str, ranked: str = ""
) -> list[Panel]:
    """Bars by class; of many classes the forgotten ones and those with the largest `rank`.

    Args:
        ranked: what `rank` is, in a word, where it is not what the bars show.
    """
    count = len(next(iter(of.values())))
    named = record["forget_class"]
    order = sorted(range(count), key=lambda c: (c not in named, -rank(c)))[:MOST_BARS]
    chosen = sorted(order)
    if count > MOST_BARS:
        others = [rank(c) for c in range(count) if c not in order]
        title += f"\n({MOST_BARS} of {count} classes; the others' median{ranked}: {median(others):.2g})"
    series = [
        Series(record["labels"][name], [float(c) for c in range(len(chosen))], [values[c] or 0.0 for c in chosen],
               "bars", style_of(record, name))
        for name, values in of.items()
    ]  # fmt: skip
    ticks = [str(c) for c in chosen]
    return [Panel(title, "class", y_label, series, f"{title}. {extent(series)}.", ticks=ticks)]


@figure("accuracy_by_class", alone=True)
def per_class(runs: Sequence[Run]) -> list[Panel]:
    """Plot every class's accuracy before and after; of many classes those that change most."""
    record = choose(runs[0], runs[0][0]["answer"])
    of = {name: scores for name in _compared(record) if (scores := class_scores(record, name))}
    if not {"default", record["answer"]} <= set(of):
        return []

    def change(c: int) -> float:
        before, after = of["default"][c], of[record["answer"]][c]
        return abs((after or 0.0) - (before or 0.0))

    return _bars(record, of, change, "accuracy by class, test images", "accuracy [%]", " change")


def _blocks(table: Sequence[Sequence[int]], size: int) -> list[list[float]]:
    """Sum over blocks of `size` neighbouring rows and columns."""
    places = range(0, len(table), size)
    return [
        [math.fsum(value for row in table[r : r + size] for value in row[c : c + size]) for c in places] for r in places
    ]


@figure("confusion_difference", alone=True)
def confusion_difference(runs: Sequence[Run]) -> list[Panel]:
    """Plot the confusion matrix after minus before, each row in percent of its images."""
    record = choose(runs[0], runs[0][0]["answer"])
    tables = record["confusion"]
    before, after = tables.get("default"), tables.get(record["answer"])
    if not before or not after:
        return []
    size, count = math.ceil(len(before) / MOST_BARS), len(before)
    before, after = _blocks(before, size), _blocks(after, size)
    cells = [
        [100 * (b - a) / max(1, math.fsum(one)) for a, b in zip(one, two, strict=True)]
        for one, two in zip(before, after, strict=True)
    ]
    ticks = [str(i * size) if size == 1 else f"{i * size}-{i * size + size - 1}" for i in range(len(cells))]
    title = "confusion: after - before [% of a true class]"
    title += f"\n(blocks of {size} of {count} classes)" if size > 1 else ""
    alt = f"{title}; from {min(map(min, cells)):.3g} to {max(map(max, cells)):.3g}."
    return [Panel(title, "predicted class", "true class", alt=alt, ticks=ticks, cells=cells, signed=True)]


@figure("class_probability", alone=True)
def class_probability(runs: Sequence[Run]) -> list[Panel]:
    """Plot the mean probability of each class on forgotten images."""
    record = choose(runs[0], runs[0][0]["answer"])
    of = {name: values for name in _compared(record) if (values := record["class_probability"].get(name))}
    title = f"probability for images of {classes_of(record)}"
    if not of:
        return []
    return _bars(record, of, lambda c: max(values[c] for values in of.values()), title, "mean probability")


@figure("forgotten_taken_for", alone=True)
def forgotten_taken_for(runs: Sequence[Run]) -> list[Panel]:
    """Plot the classes that forgotten images are taken for."""
    record = choose(runs[0], runs[0][0]["answer"])
    of = {name: shares for name in _compared(record) if (shares := taken_for(record, name))}
    title = f"what images of {classes_of(record)} are taken for"
    if not of:
        return []
    return _bars(record, of, lambda c: max(values[c] for values in of.values()), title, "share of images [%]")


# --- masks and weights ------------------------------------------------------------------------------------


@figure("mask_map", alone=True)
def mask_map_panels(runs: Sequence[Run]) -> list[Panel]:
    """Plot where the answer's mask switches weights off, with sums of rows and columns; one panel per layer."""
    record = choose(runs[0], runs[0][0]["answer"])
    found = []
    for layer in record["mask_map"]:
        (m, n), cells = layer["shape"], layer["cells"]
        block = f"{math.ceil(m / len(cells))} x {math.ceil(n / len(cells[0]))}"
        title = f"switched off in {layer['layer']},\n{m} x {n}, kappa {record['kappa']:,}"
        title += f",\ncells of {block} weights" if block != "1 x 1" else ""
        rows, columns = [sum(row) for row in cells], [sum(column) for column in zip(*cells, strict=True)]
        alt = f"{title}. Most in one row of cells: {max(rows)}, in one column: {max(columns)} of {sum(rows)}."
        found.append(Panel(title, "input neuron", "output neuron", alt=alt, cells=cells, margins=True))
    return found


@figure("weight_histogram", alone=True)
def weight_histogram(runs: Sequence[Run]) -> list[Panel]:
    """Plot histograms of the weights that the answer's mask keeps and switches off."""
    record = choose(runs[0], runs[0][0]["answer"])
    data = record["weight_histogram"]
    parts = {"kept": data["kept"], "switched off": data["switched_off"]}
    series = [
        Series(name, data["edges"], [float(value) for value in values], "steps", place)
        for place, (name, values) in enumerate(parts.items())
    ]
    label = record["labels"].get(record["answer"], record["answer"])
    title = f"weights under the mask of {label}, kappa {record['kappa']:,}"
    return [Panel(title, "weight", "count", series, f"{title}. {extent(series)}.", y_log=True)]


# --- all figures of a run ---------------------------------------------------------------------------------


def figures_of(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Make every figure of a run, or of a family's runs: name -> panels.

    Metrics that are shown first have a figure of their own over each axis that is swept; the others share one.
    """
    axes: tuple[Axis, ...] = ("kappa", "top_k")
    swept = [axis for axis in axes if _varies(runs, axis)]
    first, found = metrics_of(runs, every=False), {}
    for axis in swept:
        found |= {f"{metric}_over_{axis}": [over(runs, metric, axis)] for metric in first}
        found[f"other_metrics_over_{axis}"] = [over(runs, m, axis) for m in metrics_of(runs) if m not in first]
    answered = len(runs) == 1 and runs[0][0]["answer"] in {best.method for best in best_points(runs[0])}
    found |= {name: panels(runs) for name, (panels, alone) in FIGURES.items() if answered or not alone}
    return {name: panels for name, panels in found.items() if panels}


def _varies(runs: Sequence[Run], axis: Axis) -> bool:
    """Return whether a method depends on an axis and that has several values (kappa: in any case)."""
    first, several = runs[0][0], len({record[axis] for run in runs for record in run}) > 1 or axis == "kappa"
    return several and any(axis in axes_of(first, method) for method in first["axes"])
