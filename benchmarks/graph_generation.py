"""How fast are graphs made, and how small are they?

    uv run benchmarks/graph_generation.py [--json PATH] [--docs]

On the MLP at Fashion-MNIST's size with random images: one batched pass against autograd one sample at a time, against
a plain forward + backward of the same batch, and the whole of `GraphGenerator.generate` (reading, capture, writing).
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, alternating, line, peak_memory, random_data, ratio, run

import torch
from torch.nn import functional

from core.config import GraphConfig
from data import FEATURES, GraphGenerator
from model import HookedMLPClassifier, capture

BATCH, SINGLES, STORED, REPEATS = 1024, 256, 100_000, 15


def one_by_one(model: HookedMLPClassifier, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Dense gradients of the target layer by autograd, a sample at a time."""

    def run() -> None:
        target = model.target(-2)
        for image, label in zip(images[:SINGLES], labels[:SINGLES], strict=True):
            with capture(target) as record:
                loss = functional.cross_entropy(model(image[None]), label[None])
                record.take()
                torch.autograd.grad(loss, target.weight)

    return run


def plain(model: HookedMLPClassifier, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a batch, as in training."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()

    return run


def measure() -> dict:
    """All results of the benchmark."""
    torch.manual_seed(0)
    model, data = HookedMLPClassifier(10, 1, 28).eval(), random_data(STORED, BATCH)
    images, labels = data.splits["train"].batch(slice(0, BATCH))
    generator = GraphGenerator(model, data, -2, GraphConfig(num_samples=STORED, batch_size=BATCH))
    batched, single, training = alternating(
        [
            lambda: generator.capture_batch(images, labels),
            one_by_one(model, images, labels),
            plain(model, images, labels),
        ],
        REPEATS,
    )
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        (whole,) = alternating([lambda: generator.generate(Path(folder))], 1)
        stored = sum(file.stat().st_size for file in Path(folder).iterdir())
    dense = {f"{m} x {n}": 4 * len(FEATURES) * m * n / (4 * (2 * m + n)) for m, n in ((64, 128), (128, 512))}
    return {
        "batched": batched,
        "one_by_one": single,
        "plain": training,
        "speed_up": ratio(single, batched) * BATCH / SINGLES,
        "share_of_plain": ratio(training, batched),
        "generate_seconds_per_batch": statistics.median(whole) * BATCH / STORED,
        "stored_bytes_per_sample": stored / STORED,
        "memory_growth_bytes": peak_memory() - before - data.splits["train"].pixels.nbytes,
        "stored_bytes": stored,
        "times_smaller": dense,
    }


def show(results: dict) -> None:
    """A table for people."""
    line(f"capture of a batch of {BATCH}", results["batched"])
    line(f"autograd, {SINGLES} samples one at a time", results["one_by_one"])
    line(f"plain forward + backward of the batch, {BATCH}", results["plain"])
    rate = BATCH / statistics.median(results["batched"])
    print(f"capture: {rate:,.0f} samples/s, {results['speed_up']:.0f} times one at a time,")
    print(f"         {100 * results['share_of_plain']:.0f} % of plain forward + backward")
    whole = statistics.median(results["plain"]) / results["generate_seconds_per_batch"]
    print(f"reading, capture and writing together: {100 * whole:.0f} % of plain forward + backward")
    for name, times in results["times_smaller"].items():
        print(f"stored graphs of {name}: {times:.0f} times smaller than dense features")
    grown, stored = results["memory_growth_bytes"] / 1e6, results["stored_bytes"] / 1e6
    print(
        f"{STORED:,} graphs, {stored:.0f} MB, were written; beyond a copy of their images memory grew by {grown:.0f} MB"
    )


def tables(results: dict) -> Tables:
    """Return the table of docs/speed.md."""
    whole = statistics.median(results["plain"]) / results["generate_seconds_per_batch"]
    share = f"{100 * results['share_of_plain']:.0f} % of its rate"
    rows = [
        ["what", "value"],
        ["graphs of a batch / autograd one sample at a time, MLP", f"{results['speed_up']:.0f} times faster"],
        [
            "graphs of a batch / its plain forward + backward",
            f"{share}; with reading images and writing graphs {100 * whole:.0f} %",
        ],
        ["dense features / stored graph, 128 x 512", f"{results['times_smaller']['128 x 512']:.0f}"],
    ]
    return {"speed_graph_generation": (f"medians of {REPEATS} repeats", rows)}


if __name__ == "__main__":
    run(__doc__, measure, show, tables)
