"""What the benchmarks share: warm-up and repeats, medians and spread, the machine, JSON."""

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.docs_tables import publish

import torch

from core.artifacts import write_json
from core.config import SupportedDatasets
from core.hashes import provenance
from utils_data import Images, UnlearningDataset


def seconds(function: Callable[[], object], repeats: int = 7) -> list[float]:
    """Wall seconds of each repeat, after one warm-up."""
    return alternating([function], repeats)[0]


def alternating(functions: Sequence[Callable[[], object]], repeats: int = 7) -> list[list[float]]:
    """Wall seconds of several functions, in turn, so that a drifting machine meets all of them alike."""
    for function in functions:
        function()
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, taken, strict=True):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return taken


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the pairwise ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def line(name: str, values: Sequence[float], mark: str = " ") -> None:
    """One row for people: median and spread in milliseconds."""
    low, middle, high = (1e3 * value for value in (min(values), statistics.median(values), max(values)))
    print(f"{name:46} {mark}{middle:11.2f} ms   ({low:.2f} to {high:.2f}, n = {len(values)})")


def random_data(count: int, batch_size: int) -> UnlearningDataset:
    """Random images in Fashion-MNIST's shape, the same in every split."""
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    images = Images(pixels, torch.arange(count) % 10, torch.full((1, 1, 1), 73.0), torch.full((1, 1, 1), 90.0))
    splits = dict.fromkeys(("train", "val", "test"), images)
    return UnlearningDataset(SupportedDatasets.FASHION_MNIST, splits, batch_size, 0, 0)


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flag that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the results, the machine and the versions here")
    return made


def keep(path: Path | None, results: dict) -> None:
    """Write the results with machine and versions, if a path was given."""
    if path is not None:
        machine = {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
        write_json(path, results | {"machine": machine, "provenance": provenance()})


def for_pages(flags: argparse.ArgumentParser) -> None:
    """Add the flag of the benchmarks whose tables stand in docs/."""
    flags.add_argument("--docs", action="store_true", help="write the tables to docs/results/ and into the pages")


Tables = Mapping[str, tuple[str, Sequence[Sequence[str]]]]
"""By name: over what the values are taken, and head and body."""


def publish_all(wanted: bool, tables: Tables, seeds: dict | None = None) -> None:
    """Write tables to docs/results/ and into the pages that show them, if `--docs` was given; `seeds`: as `publish`."""
    for name, (n, rows) in tables.items() if wanted else ():
        publish(name, rows, n, seeds)


def run(
    description: str | None, measure: Callable[[], dict], show: Callable[[dict], None], tables: Callable[[dict], Tables]
) -> None:
    """Run a benchmark that has no flags of its own: parse, measure, show, keep, write the pages' tables."""
    flags = parser(description)
    for_pages(flags)
    arguments = flags.parse_args()
    results = measure()
    show(results)
    keep(arguments.json, results)
    publish_all(arguments.docs, tables(results))
