"""Training curves declared as data: the histories of classifiers and graph networks -> panels."""

import math
from collections.abc import Sequence

from reporting.panels import Panel, Series, extent

MOST_POINTS = 400  # of a training curve
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
