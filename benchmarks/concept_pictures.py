"""Draw the three pictures of docs/concepts.md: the graph of weights, the exact budget, and the prefix.

    uv run benchmarks/concept_pictures.py [--out FOLDER]

The budget's curves are those of the sampler itself, on scores that are drawn with seed 0; the other two are sketches.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import parser
from benchmarks.picture import small_png

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from core.artifacts import write_bytes
from core.config import PROJECT_ROOT
from graphs.subsets import sinkhorn_topk

BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#767676", "#E4EDF4"
ROWS, COLUMNS, CHOSEN = 4, 5, (1, 3)  # output neurons, input neurons, and the weight that is looked at
WEIGHTS, KAPPA = 60, 12


def _bare(ax: Any, title: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()


def graph_of_weights() -> Figure:
    """A layer as neurons, as a matrix, and as the neighbours of one weight."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    layer, matrix = figure.subplots(1, 2)
    row, column = CHOSEN
    left, right = np.linspace(1, 0, COLUMNS), np.linspace(0.9, 0.1, ROWS)  # first at the top, as in the matrix
    for i in range(ROWS):
        for j in range(COLUMNS):
            near = (i == row) != (j == column)
            colour = ORANGE if (i, j) == CHOSEN else BLUE if near else "#CCCCCC"
            layer.plot((0, 1), (left[j], right[i]), color=colour, linewidth=2.2 if near or (i, j) == CHOSEN else 0.8)
            face = ORANGE if (i, j) == CHOSEN else BLUE if near else PALE
            matrix.add_patch(
                FancyBboxPatch((j + 0.1, i + 0.1), 0.8, 0.8, "round,pad=0,rounding_size=.12", fc=face, ec="none")
            )
            if near:
                bend = 0.35 if abs(i - row) + abs(j - column) > 1 else 0.0
                ends = (column + 0.5, row + 0.5), (j + 0.5, i + 0.5)
                matrix.add_patch(FancyArrowPatch(*ends, connectionstyle=f"arc3,rad={bend}", arrowstyle="-", lw=1))
    layer.scatter(np.zeros(COLUMNS), left, s=70, color="white", edgecolors="black", zorder=3)
    layer.scatter(np.ones(ROWS), right, s=70, color="white", edgecolors="black", zorder=3)
    layer.text(-0.06, 0.5, "inputs h", rotation=90, va="center", ha="right")
    layer.text(1.06, 0.5, "outputs z", rotation=270, va="center", ha="left")
    layer.set_xlim(-0.2, 1.2)
    matrix.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), aspect="equal")
    _bare(layer, "a layer: a line for each weight")
    _bare(matrix, "its graph: a node for each (row: output, column: input)")
    return figure


def exact_budget() -> Figure:
    """Degrees of switching off at three temperatures, in the order of the scores."""
    theta = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    ax = figure.subplots()
    for temperature, colour, marker in ((1.0, GREY, "D"), (0.3, BLUE, "o"), (0.02, ORANGE, "s")):
        degrees = sinkhorn_topk(theta, KAPPA, temperature)
        label = f"temperature {temperature:g}: the degrees sum to {float(degrees.sum()):.4f}"
        ax.plot(range(1, WEIGHTS + 1), degrees, marker=marker, markersize=3.5, color=colour, label=label)
    ax.axvline(KAPPA + 0.5, color="black", linestyle=":", linewidth=1)
    ax.text(KAPPA + 1, 1.02, f"kappa = {KAPPA}: the mask for use switches off what is left of this line", va="bottom")
    ax.set(xlabel=f"{WEIGHTS} weights, the largest theta first", ylabel="degree of switching off", ylim=(-0.03, 1.15))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center right")
    return figure


def prefix() -> Figure:
    """What runs once for all requests, and what runs in each step of one."""
    figure = Figure(figsize=(9, 2.1), layout="constrained")
    ax = figure.subplots()
    boxes = (
        (0.0, 1.1, "images", "white", "black"),
        (1.6, 2.3, "layers before\nthe masked one", PALE, BLUE),
        (4.4, 1.5, "stored\nrows h", "white", "black"),
        (6.4, 1.6, "masked\nlayer", "#FBE9DD", ORANGE),
        (8.5, 1.6, "layers\nbehind it", "#FBE9DD", ORANGE),
        (10.6, 1.1, "logits", "white", "black"),
    )
    for x, width, text, face, edge in boxes:
        ax.add_patch(FancyBboxPatch((x, 0), width, 1, "round,pad=0,rounding_size=.12", fc=face, ec=edge, lw=1.5))
        ax.text(x + width / 2, 0.5, text, ha="center", va="center")
    for (x, width, *_), (after, *_) in pairwise(boxes):
        ax.add_patch(
            FancyArrowPatch((x + width, 0.5), (after, 0.5), arrowstyle="-|>", mutation_scale=12, color="black")
        )
    for begin, end, text, colour in (
        (0.0, 5.9, "once for all requests: no mask changes it", BLUE),
        (6.4, 11.7, "in each step of a request", ORANGE),
    ):
        ax.plot((begin, begin, end, end), (-0.15, -0.3, -0.3, -0.15), color=colour, linewidth=1.5)
        ax.text((begin + end) / 2, -0.42, text, ha="center", va="top", color=colour)
    ax.set(xlim=(-0.2, 11.9), ylim=(-0.7, 1.15))
    ax.set_axis_off()
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "concepts-graph.png": graph_of_weights,
    "concepts-budget.png": exact_budget,
    "concepts-prefix.png": prefix,
}


def main() -> None:
    """Draw all three."""
    flags = parser(__doc__)
    flags.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs")
    folder = flags.parse_args().out
    for name, draw in PICTURES.items():
        write_bytes(folder / name, small_png(draw()))
        print(folder / name)


if __name__ == "__main__":
    main()
