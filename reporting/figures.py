"""Figures of a single run: its classes, mask, weights and training; and which figures a run or a family has."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from core.records import Axis, Record, axes_of
from reporting.families import Run, classes_of
from reporting.panels import FIGURES, Panel, Series, extent, figure, over, style_of, with_limits
from reporting.tables import Best, best_points, cell_of, choose, chosen_in, known, metrics_of, over_cells

FEATURES = ("probes", "relearning")  # figures of what is left inside a model
LEAST = 20  # points that an axis of percentages spans, where several are compared
MOST_BARS = 20  # groups of bars, or blocks of a heat map's side: more are cut or joined, and the title says so
MOST_POINTS = 400  # of a training curve
SHOTS = ("1", "10", "50")
RELEARNED = {
    "relearn": "relearned",
    "relearn_area": "relearned, mean over learning rates",
    "fresh_head": "relearned with a fresh last layer",
}
"""Beginning of the names of metrics, which SHOTS end -> what they are."""
Look = Callable[[Best, str], float | None]
TERMS = {
    "classifier": ("loss", "val_loss", "val_score", "grad_norm", "images_per_second"),
    "gcn": (
        "loss",
        "nll",
        "kl",
        "forget",
        "retain",
        "grad_norm",
        "temperature",
        "requests_per_second",
        "samples_per_second",
    ),
}


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
    """Bars by class; of many classes the forgotten ones and those with the largest `rank`, as far as that is not 0.

    Args:
        ranked: what `rank` is, in a word, where it is not what the bars show.
    """
    count = len(next(iter(of.values())))
    named = record["forget_class"]
    order = sorted(range(count), key=lambda c: (c not in named, -rank(c)))[:MOST_BARS]
    chosen = sorted(order if count <= MOST_BARS else (c for c in order if c in named or rank(c)))
    if count > MOST_BARS:
        others = [rank(c) for c in range(count) if c not in chosen]
        title += f"\n({len(chosen)} of {count} classes; the others' median{ranked}: {median(others):.2g})"
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


# --- training ---------------------------------------------------------------------------------------------


def training(history: Sequence[dict], kind: str, name: str) -> list[Panel]:
    """Pick a training history's known terms, at most MOST_POINTS values of each."""
    found = []
    for term in TERMS[kind]:
        points = [(entry["step"], entry[term]) for entry in history if entry.get(term) is not None]
        points = points[:: math.ceil(len(points) / MOST_POINTS) or 1]
        if points:
            series = [Series(term, [float(x) for x, _ in points], [y for _, y in points])]
            title = f"{name}: {term.replace('_', ' ')}"
            found.append(Panel(title, "step", term.replace("_", " "), series, f"{title}, {extent(series)}."))
    return found


# --- what is left inside a model --------------------------------------------------------------------------


def _compared_at(points: Mapping[str, Sequence[Best]], labels: Sequence[str], value: Look) -> list[Series]:
    """Make a line for each method through its values at some places, with a band over several seeds.

    Args:
        labels: names of the places. value: of a chosen point at a place; None: it has none there.
    """
    found = []
    for name, chosen in points.items():
        places = []
        for number, label in enumerate(labels):
            values = [(cell_of(point.record), value(point, label)) for point in chosen]
            cells = {cell: one for cell, one in values if known(one)}
            if len(cells) == len(chosen):
                places.append((float(number), over_cells(cells)))
        if places:
            found.append(with_limits(chosen[0].label, places, "line", style_of(chosen[0].record, name)))
    return found


def _alike(panels: list[Panel]) -> list[Panel]:
    """Give panels of one unit the same y axis (of percentages at least LEAST points), so that they can be compared."""
    found = []
    for panel in panels:
        values = [y for other in panels if other.y_label == panel.y_label for one in other.series for y in one.y]
        low, high = min(values), max(values)
        found.append(replace(panel, y_range=(min(low, high - LEAST) if panel.y_label == "%" else low, high)))
    return found


@figure("probes")
def probes(runs: Sequence[Run]) -> list[Panel]:
    """Plot what features tell of the forgotten classes, stage by stage; at each method's chosen point."""
    points, first = chosen_in(runs), runs[0][0]
    held = [point.record["by_stage"].get(name) or {} for name, chosen in points.items() for point in chosen]
    found = []
    for metric in dict.fromkeys(name for one in held for name in one):
        stages = list(dict.fromkeys(stage for one in held for stage in one.get(metric, {})))

        def at(point: Best, stage: str, metric: str = metric) -> float | None:
            return (point.record["by_stage"][point.method] or {}).get(metric, {}).get(stage)

        unit = first["metrics"][metric]["unit"]
        title = f"{metric.replace('_', ' ')} [{unit}], best as retrained"
        series = _compared_at(points, stages, at)
        found.append(Panel(title, "what this layer reads", unit, series, f"{title}: {extent(series)}.", ticks=stages))
    return _alike(found)


@figure("relearning")
def relearning(runs: Sequence[Run]) -> list[Panel]:
    """Plot how much of the forgotten classes comes back after training on a few images of every class."""
    points, metrics, found = chosen_in(runs), metrics_of(runs), []
    for kind, what in RELEARNED.items():
        shots = [count for count in SHOTS if f"{kind}_{count}" in metrics]

        def at(point: Best, count: str, kind: str = kind) -> float | None:
            return point.values.get(f"{kind}_{count}")

        series = _compared_at(points, shots, at)
        if series:
            title = f"{what} [%], best as retrained"
            about = f"{title}: {extent(series)}."
            found.append(Panel(title, "training images of every class", "%", series, about, ticks=shots))
    return _alike(found)


# --- all figures of a run ---------------------------------------------------------------------------------


def figures_of(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Make every figure of a run, or of a family's runs: name -> panels.

    Metrics that are shown first have a figure of their own over each axis that is swept; the others share one. A metric
    of which nothing is known has no panel.
    """
    axes: tuple[Axis, ...] = ("kappa", "top_k")
    swept = [axis for axis in axes if _varies(runs, axis)]
    first, found = metrics_of(runs, every=False), {}
    for axis in swept:
        drawn = {metric: panel for metric in metrics_of(runs) if (panel := over(runs, metric, axis)).series}
        found |= {f"{metric}_over_{axis}": [panel] for metric, panel in drawn.items() if metric in first}
        found[f"other_metrics_over_{axis}"] = [panel for metric, panel in drawn.items() if metric not in first]
    answered = len(runs) == 1 and runs[0][0]["answer"] in {best.method for best in best_points(runs[0])}
    found |= {name: panels(runs) for name, (panels, alone) in FIGURES.items() if answered or not alone}
    return {name: panels for name, panels in found.items() if panels}


def _varies(runs: Sequence[Run], axis: Axis) -> bool:
    """Return whether a method depends on an axis that has several values."""
    first, several = runs[0][0], len({record[axis] for run in runs for record in run}) > 1
    return several and any(axis in axes_of(first, method) for method in first["axes"])
