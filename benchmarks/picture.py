"""Draw the README's picture: forget score and retain score against kappa, from records of runs.

    uv run benchmarks/picture.py                     ten runs (Fashion-MNIST, MLP, one class each), about 3 minutes
    uv run benchmarks/picture.py --records DIR       the picture alone, from the records below an output folder
    [--out PATH] [--output-dir DIR]

The classifier is that of `benchmarks/comparison.py` (batch 128, 8 epochs, seed 0). The graph network is the shipped
one, which learned on other classifiers. Lines are means over the ten classes, each forgotten by itself; bands reach
from the class that is forgotten first to the one that is forgotten last. All scores are of test images.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.classifiers import Recipe
from benchmarks.common import parser
from benchmarks.unlearning_tables import SHIPPED

import numpy as np
from PIL import Image

from core.artifacts import write_bytes
from core.config import PROJECT_ROOT, EvalConfig
from core.records import Record, read_records
from pipeline import Pipeline
from training.processes import reuse_freed_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KAPPAS = (8, 16, 32, 64, 96, 128, 200, 256, 400)
LINES = {  # method -> label, colour (Okabe and Ito), marker
    "random": ("random mask", "#767676", "D"),
    "taylor_mask": ("signed Taylor", "#D55E00", "s"),
    "mimu": ("MIMU", "#0072B2", "o"),
}
METHODS = (*LINES, "retrain", "default")
BANDS = ("taylor_mask", "mimu")
UNNAMED = (96, 256)  # ticks whose numbers would run into their neighbours'
PANELS = (
    ("forget_score", "recognised, % of test images", "the forgotten class: lower is better", (-2, 101)),
    ("retain_score", "recognised, % of test images", "the other nine classes: higher is better", (84, 92)),
)
DPI, COLOURS = 150, 48  # sharp on a dense screen, and small


def measured(output_dir: Path) -> list[Record]:
    """Run the pipeline once for each class and return the records, one for each class and kappa."""
    base = Recipe(128, 0).config(output_dir)
    judged = EvalConfig(methods=METHODS, metrics=("core",), references=1)
    config = replace(base, kappa_list=KAPPAS, gcn_path=SHIPPED, eval=judged)
    return [record for label in range(10) for record in Pipeline(replace(config, forget_class=(label,))).eval()]


def values(records: Sequence[Record], method: str, metric: str) -> np.ndarray:
    """Return a metric of a method, [number of kappas, number of classes], percent."""
    kappas = sorted({record["kappa"] for record in records})
    return np.array([[r["methods"][method][metric] for r in records if r["kappa"] == kappa] for kappa in kappas])


def drawn(records: Sequence[Record]) -> bytes:
    """Draw both panels and return the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kappas = sorted({record["kappa"] for record in records})
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    for ax, (metric, label, title, limits) in zip(axes, PANELS, strict=True):
        for method, (name, colour, marker) in LINES.items():
            found = values(records, method, metric)
            if method in BANDS and metric == "forget_score":  # what is retained differs by class, not by method
                ax.fill_between(kappas, found.min(1), found.max(1), color=colour, alpha=0.12, linewidth=0)
            ax.plot(kappas, found.mean(1), marker=marker, color=colour, label=name, markersize=4.5, linewidth=1.8)
        end = kappas[-1] * 1.35
        untouched, retrained = (values(records, method, metric).mean() for method in ("default", "retrain"))
        ax.axhline(untouched, color="black", linestyle=":", linewidth=1.1, label="untouched", zorder=1)
        ax.axhline(retrained, color="black", linestyle="--", linewidth=0.8, zorder=1)
        star = {"color": "black", "markersize": 13, "clip_on": False, "zorder": 5, "linestyle": "none"}
        ax.plot(end, retrained, "*", label="retrained without the class", **star)
        ax.set_xscale("log", base=2)
        ax.set_xticks(kappas, ["" if kappa in UNNAMED else str(kappa) for kappa in kappas], minor=False)
        ax.set(xlabel="weights switched off (kappa), of 8,192", ylabel=label, xlim=(kappas[0] * 0.9, end), ylim=limits)
        ax.set_title(title, fontsize=10, loc="left")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return small_png(figure)


def small_png(figure: "Figure") -> bytes:
    """A figure as PNG of few colours."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, dpi=DPI)
    Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Parse, run what is missing, draw."""
    flags = parser(__doc__)
    flags.add_argument("--records", type=Path, help="an output folder whose records are drawn; nothing is run")
    flags.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs" / "picture.png")
    flags.add_argument("--output-dir", type=Path, default=PROJECT_ROOT, help="where the runs keep their results")
    given = flags.parse_args()
    reuse_freed_memory()
    records = read_records(given.records) if given.records else measured(given.output_dir)
    write_bytes(given.out, drawn(records))
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
