"""How fast is message passing over the graph of one layer, in closed form against an explicit edge list?

    uv run benchmarks/message_passing.py [--full] [--json PATH]

Forward + backward of `MaskingGCN` (3 rounds, width 32) on one graph, both forms in turn, in one process. The edge list
of 128 x 512 (41.8 million edges) takes over a minute and about 9 GB, so by default it is timed on a smaller layer and
scaled by its number of edges (marked ~); --full times it once. The floor is what reading and writing the activations
once per round costs at the bandwidth of a plain copy, measured in the same run.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from artifacts import provenance, write_json
from data import num_edges, rook_edges
from model import MaskingGCN

ROUNDS, WIDTH, REPEATS = 3, 32, 7
SMALL, LARGE = (32, 64), (128, 512)


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Wall seconds of each repeat, after one warm-up."""
    function()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return taken


def closed_pass(gcn: MaskingGCN, m: int, n: int) -> Callable[[], None]:
    """Forward + backward in closed form."""
    features = torch.randn(1, m, n, gcn.num_node_features)

    def run() -> None:
        gcn.zero_grad(set_to_none=True)
        gcn(features).square().mean().backward()

    return run


def edge_pass(gcn: MaskingGCN, m: int, n: int) -> Callable[[], None]:
    """Forward + backward over the edge list, with the same parameters."""
    features, edges = torch.randn(m * n, gcn.num_node_features), rook_edges(m, n)

    def run() -> None:
        gcn.zero_grad(set_to_none=True)
        gcn.forward_edges(features, edges).square().mean().backward()

    return run


def copy_floor(m: int, n: int) -> list[float]:
    """Seconds to read and write `ROUNDS` activations [m, n, WIDTH] once each, by plain copies."""
    source, target = torch.randn(m, n, WIDTH), torch.empty(m, n, WIDTH)

    def run() -> None:
        for _ in range(ROUNDS):
            target.copy_(source)

    return seconds(run)


def measure(full: bool) -> dict:
    """All figures of the benchmark."""
    torch.manual_seed(0)
    gcn = MaskingGCN(num_message_passing_rounds=ROUNDS, hidden_dim=WIDTH)
    closed_small, edges_small = seconds(closed_pass(gcn, *SMALL)), seconds(edge_pass(gcn, *SMALL))
    closed_large, floor = seconds(closed_pass(gcn, *LARGE), 15), copy_floor(*LARGE)
    scale = num_edges(*LARGE) / num_edges(*SMALL)
    edges_large = [value * scale for value in edges_small]
    if full:
        edges_large = seconds(edge_pass(gcn, *LARGE), 1)
    return {
        "closed_small": closed_small,
        "edges_small": edges_small,
        "closed_large": closed_large,
        "edges_large": edges_large,
        "edges_large_is_scaled": not full,
        "floor_large": floor,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def show(figures: dict) -> None:
    """A table for people: medians, spread, ratios."""

    def line(name: str, values: list[float], mark: str = "") -> None:
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:34} {mark}{1e3 * middle:12.2f} ms   ({1e3 * low:.2f} to {1e3 * high:.2f}, n = {len(values)})")

    mark = "~" if figures["edges_large_is_scaled"] else " "
    line(f"closed form, {SMALL[0]} x {SMALL[1]}", figures["closed_small"], " ")
    line(f"edge list,   {SMALL[0]} x {SMALL[1]}", figures["edges_small"], " ")
    line(f"closed form, {LARGE[0]} x {LARGE[1]}", figures["closed_large"], " ")
    line(f"edge list,   {LARGE[0]} x {LARGE[1]}", figures["edges_large"], mark)
    line("floor: copy activations, 3 rounds", figures["floor_large"], " ")
    median = {name: statistics.median(values) for name, values in figures.items() if isinstance(values, list)}
    print(
        f"edge list / closed form, {LARGE[0]} x {LARGE[1]}: {mark}{median['edges_large'] / median['closed_large']:.0f}"
    )
    print(f"closed form / floor: {median['closed_large'] / median['floor_large']:.1f}")


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="time the edge list of 128 x 512 itself")
    parser.add_argument("--json", type=Path, help="write the figures, machine and versions here")
    arguments = parser.parse_args()
    figures = measure(arguments.full)
    show(figures)
    if arguments.json:
        write_json(arguments.json, json.loads(json.dumps(figures | {"provenance": provenance()})))


if __name__ == "__main__":
    main()
