"""What does one more (top_k, kappa) point of a sweep cost, against one full evaluation pass?

    uv run benchmarks/sweep.py [--json PATH] [--docs]

ResNet-18 on random images in Fashion-MNIST's shape: a point of `mimu` and of `random`, measured on test and validation
images through the prefix cache (mask, both sets, all metrics), against one pass of the whole network over the same
images.
"""

import statistics
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, line, random_data, run, seconds

import torch

from core.config import PipelineConfig
from eval import Eval
from model import HookedResnet
from unlearn.registry import Context, Point

IMAGES, BATCH, REPEATS = 4000, 256, 7


def measure() -> dict:
    """All results of the benchmark."""
    torch.manual_seed(0)
    data = random_data(IMAGES, BATCH)
    model, theta = HookedResnet(10, 1, 28).eval(), torch.randn(10, 128, 512)
    evaluation = Eval(Context(model, data, PipelineConfig(), torch.device("cpu"), lambda top_k: theta))
    sets = [(split, is_forget) for split in ("test", "val") for is_forget in (True, False)]

    def full() -> None:
        for split, is_forget in sets:
            evaluation.inference(model, evaluation.context.images(split, is_forget), is_forget, "full pass")

    for split, is_forget in sets:
        evaluation.prefix_activations(split, is_forget)
    kappas = count(100)
    points = {
        name: seconds(lambda name=name: evaluation.eval_unlearning(name, Point(500, next(kappas), 0)), REPEATS)
        for name in ("mimu", "random")
    }
    return {"full": seconds(full, 5), "points": points}


def show(results: dict) -> None:
    """A table for people."""
    line(f"full evaluation pass, {2 * IMAGES:,} images", results["full"])
    for name, values in results["points"].items():
        line(f"one more point of {name}", values)
        print(f"  {100 * statistics.median(values) / statistics.median(results['full']):.2f} % of a full pass")


def tables(results: dict) -> Tables:
    """Return the table of docs/speed.md."""
    shares = {
        name: f"{100 * statistics.median(values) / statistics.median(results['full']):.1f} %"
        for name, values in results["points"].items()
    }
    what = "one more point of mimu (random) / a full evaluation pass, ResNet-18"
    rows = [["what", "value"], [what, f"{shares['mimu']} ({shares['random']})"]]
    return {"speed_sweep": (f"medians of {REPEATS} repeats", rows)}


if __name__ == "__main__":
    run(__doc__, measure, show, tables)
