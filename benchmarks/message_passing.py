"""How fast is message passing over the graph of one layer, in closed form against an explicit edge list?

    uv run benchmarks/message_passing.py [--full] [--json PATH] [--plot PATH] [--docs]
    uv run benchmarks/message_passing.py --busy [--json PATH]
    uv run benchmarks/message_passing.py --whole [--json PATH] [--docs]

Forward + backward of `MaskingGCN` (3 rounds, width 32) on one graph, both forms in turn, in one process. The edge list
of 128 x 512 (41.8 million edges) takes over a minute and about 9 GB, so by default it is timed on 64 x 128 and scaled
by its number of edges (marked ~); --full times it once. The floor is what reading and writing the activations once per
round costs at the memory bandwidth, measured by copying arrays far larger than the caches. Then a classifier head of
1000 x 2048 from features to mask, and time and memory against the number of weights.

--busy asks something else: what a pass over 64 x 128 takes on an idle machine and beside as many busy loops as there
are cores, with OpenMP's own spin count and with the one that `main.py` sets, each in processes of their own.

--whole passes over all weights of a model, with the network of a default run (x added to each round's result): the MLP,
and ResNet-18 with its convolutions as matrices [out, in x taps]; then over single layers of 2^12 to 2^21 weights. Each
is a process of its own, in which the first pass tells the memory and later ones the seconds.
"""

import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    Tables,
    alternating,
    for_pages,
    keep,
    line,
    parser,
    peak_memory,
    publish_all,
    ratio,
    seconds,
)

import torch

from core.config import GCNConfig
from data import FEATURES
from graphs.edge_list import edge_index
from graphs.layout import WeightGraph, layer_graph
from graphs.subsets import hard_topk, sinkhorn_topk
from main import SPIN_COUNT
from model import HookedMLPClassifier, HookedResnet, MaskingGCN
from models.foreign import ForeignClassifier
from models.targets import find_targets
from reporting.write import as_text
from training.processes import reuse_freed_memory
from unlearn.masks import Mask

ROUNDS, WIDTH = 3, 32
SMALL, LARGE, HEAD = (64, 128), (128, 512), (1000, 2048)
COPIED = 2**27  # float32 values: 512 MB, beyond any cache
GROWTH = tuple(range(12, 22))
SPIN_COUNTS = {"OpenMP's own": "300000", "main.py's": SPIN_COUNT}
WIDTHS = (8, 16, 32)
WHOLE = {"MLP": HookedMLPClassifier, "ResNet-18": HookedResnet}
BUSY_PASSES = 25  # of each process, after the warm-up: few, because a single one may take a second


def closed_pass(gcn: MaskingGCN, m: int, n: int) -> Callable[[], None]:
    """Forward + backward in closed form."""
    features = torch.randn(1, m, n, gcn.num_node_features)

    def run() -> None:
        gcn.zero_grad(set_to_none=True)
        gcn(features).square().mean().backward()

    return run


def edge_pass(gcn: MaskingGCN, m: int, n: int) -> Callable[[], None]:
    """Forward + backward over the edge list, with the same parameters."""
    features, edges = torch.randn(m * n, gcn.num_node_features), edge_index(layer_graph(m, n))

    def run() -> None:
        gcn.zero_grad(set_to_none=True)
        gcn.forward_edges(features, edges).square().mean().backward()

    return run


def bandwidth() -> float:
    """Bytes per second of a plain copy, read and written bytes both counted."""
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    return 2 * 4 * COPIED / statistics.median(seconds(lambda: target.copy_(source), 5))


def resident() -> int:
    """Resident size of this process now, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def extra_memory(run: Callable[[], object]) -> int:
    """Largest resident size during a run above the size before it, bytes, sampled each half millisecond."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left in the allocator would hide what this one takes
    before, seen, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(resident() - before)
            time.sleep(5e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(seen)


def head_pass(gcn: MaskingGCN) -> Callable[[], Mask]:
    """A 1000 x 2048 layer: features, GCN, sampler, loss, backward, mask."""
    m, n = HEAD
    weight, h, delta = torch.randn(m, n), torch.rand(n), torch.randn(m)

    def run() -> Mask:
        features = torch.empty(1, m, n, len(FEATURES))
        for column, value in enumerate((h, (weight @ h)[:, None], weight, delta[:, None] * h)):
            features[0, ..., column] = (value - value.mean()) / value.std()
        theta = gcn(features)
        degrees = sinkhorn_topk(theta.flatten(1), m * n // 50, 0.25).view_as(theta)
        torch.nn.functional.cross_entropy(((1 - degrees[0]) * weight) @ h, torch.tensor(0)).backward()
        return Mask(~hard_topk(theta[0].detach(), m * n // 50), layer_graph(m, n))

    return run


def growth(gcn: MaskingGCN) -> dict:
    """Time and extra memory of a pass against N, with the exponents fitted on logarithmic axes."""
    sizes, times, memory = [], [], []
    for power in GROWTH:
        m, n = 2 ** (power // 2), 2 ** (power - power // 2)
        run = closed_pass(gcn, m, n)
        sizes.append(m * n)
        times.append(statistics.median(seconds(run, 5)))
        memory.append(extra_memory(run))
    return {"nodes": sizes, "seconds": times, "bytes": memory, "exponent": exponent(sizes, times)}


def exponent(x: list[int], y: list[float]) -> float:
    """Slope of log y over log x, by least squares."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def measure(full: bool) -> dict:
    """All results of the benchmark."""
    torch.manual_seed(0)
    gcn = MaskingGCN(num_message_passing_rounds=ROUNDS, hidden_dim=WIDTH)
    activation = 4 * WIDTH * math.prod(LARGE)
    extra = extra_memory(closed_pass(gcn, *LARGE)) / activation
    small, edges = alternating([closed_pass(gcn, *SMALL), edge_pass(gcn, *SMALL)], 5)
    large = seconds(closed_pass(gcn, *LARGE), 21)
    scale = layer_graph(*LARGE).num_edges / layer_graph(*SMALL).num_edges
    begun = time.perf_counter()
    head_pass(gcn)()
    head = time.perf_counter() - begun
    results = {
        "closed_small": small,
        "edges_small": edges,
        "closed_large": large,
        "extra_activations": extra,
        "head_seconds": head,
        "head_peak_bytes": peak_memory(),
        "bandwidth": bandwidth(),
        "growth": growth(gcn),
        "edges_large_is_scaled": not full,
    }
    results["floor_seconds"] = ROUNDS * 2 * activation / results["bandwidth"]
    if full:
        run, begun = edge_pass(gcn, *LARGE), time.perf_counter()
        run()
        return results | {"edges_large": [time.perf_counter() - begun]}
    return results | {"edges_large": [value * scale for value in edges]}


def show(results: dict) -> None:
    """A table for people."""
    mark, name = "~" if results["edges_large_is_scaled"] else " ", f"{LARGE[0]} x {LARGE[1]}"
    line(f"closed form, {SMALL[0]} x {SMALL[1]}", results["closed_small"])
    line(f"edge list,   {SMALL[0]} x {SMALL[1]}", results["edges_small"])
    line(f"closed form, {name}", results["closed_large"])
    line(f"edge list,   {name}", results["edges_large"], mark)
    closed, floor = statistics.median(results["closed_large"]), results["floor_seconds"]
    small = ratio(results["edges_small"], results["closed_small"])
    print(f"edge list / closed form, {SMALL[0]} x {SMALL[1]}: {small:.0f}")
    print(f"edge list / closed form, {name}: {mark}{statistics.median(results['edges_large']) / closed:.0f}")
    print(f"memory bandwidth {results['bandwidth'] / 1e9:.1f} GB/s: activations once per round {1e3 * floor:.2f} ms")
    print(f"closed form / floor: {closed / floor:.1f} (forward and backward each once: {closed / floor / 2:.1f})")
    print(f"extra memory: {results['extra_activations']:.1f} activations of {name} x {WIDTH}")
    head = f"{results['head_seconds']:.1f} s, peak of the process {results['head_peak_bytes'] / 1e9:.2f} GB"
    print(f"head {HEAD[0]} x {HEAD[1]}, features to mask: {head}")
    grown = results["growth"]
    for nodes, taken, size in zip(grown["nodes"], grown["seconds"], grown["bytes"], strict=True):
        print(f"N = {nodes:9,}: {1e3 * taken:9.2f} ms, {size / 1e6:8.1f} MB")
    print(f"time grows as N^{grown['exponent']:.2f}")


@contextmanager
def busy_loops(count: int) -> Generator[None]:
    """Processes that do nothing but compute, for the length of the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def pass_in_a_process(spin_count: str) -> list[float]:
    """Seconds of passes over 64 x 128 in a fresh process, where OpenMP reads its spin count anew."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    command = [sys.executable, __file__, "--one-process"]
    told = subprocess.run(command, env=own | {"GOMP_SPINCOUNT": spin_count}, capture_output=True, text=True, check=True)
    return json.loads(told.stdout)


def measure_busy(repeats: int = 3) -> dict:
    """Seconds of a pass, for each spin count, on the machine as it is and beside busy loops."""
    taken: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in SPIN_COUNTS}
    cores = len(os.sched_getaffinity(0))
    for _ in range(repeats):
        for name, count in SPIN_COUNTS.items():
            taken[name]["idle"] += pass_in_a_process(count)
        with busy_loops(cores):
            for name, count in SPIN_COUNTS.items():
                taken[name]["busy"] += pass_in_a_process(count)
    return taken


def show_busy(taken: dict) -> None:
    """A row for each spin count and load, then what the bounded count gains and costs."""
    for name, loads in taken.items():
        for load, values in loads.items():
            line(f"{load}, {name} spin count ({SPIN_COUNTS[name]})", values)
    # Means, because a run takes the sum: beside others a few passes take a hundred times as long as most.
    before, after = ({load: statistics.mean(taken[name][load]) for load in ("idle", "busy")} for name in SPIN_COUNTS)
    print(
        f"means, busy / idle: {before['busy'] / before['idle']:.1f} before, {after['busy'] / after['idle']:.1f} after"
    )
    print(f"means, idle, after / before: {after['idle'] / before['idle']:.2f}")


def whole_graph(name: str) -> WeightGraph:
    """The graph over all weights of a model of WHOLE, or over a single layer of 2^`name` weights."""
    if name not in WHOLE:
        return layer_graph(2 ** (int(name) // 2), 2 ** (int(name) - int(name) // 2))
    model = WHOLE[name](10, 1, 28).eval()
    if name == "MLP":
        return model.weight_graph(None)
    image = torch.zeros(1, 1, 28, 28)
    return ForeignClassifier(
        model, lambda logits: logits, image, 10, [one.name for one in find_targets(model, image)]
    ).weight_graph()


def one_whole(name: str, width: int) -> dict:
    """Memory of the first pass over a graph, and seconds of later ones, about ten seconds of them."""
    graph = whole_graph(name)
    gcn = MaskingGCN(num_message_passing_rounds=ROUNDS, hidden_dim=width, residual=GCNConfig().residual)
    features = torch.randn(1, graph.num_vertices, gcn.num_node_features)
    features = features.view(1, *graph.shape, -1)

    def run() -> None:
        gcn.zero_grad(set_to_none=True)
        gcn(features, graph).square().mean().backward()

    extra, processor, clock = extra_memory(run), [], []
    while len(clock) < 3 or (sum(clock) < 10 and len(clock) < 21):
        begun, used = time.perf_counter(), time.process_time()
        run()
        processor.append(time.process_time() - used)
        clock.append(time.perf_counter() - begun)
    taken = {"processor": statistics.median(processor), "clock": statistics.median(clock), "repeats": len(clock)}
    return taken | {"weights": graph.num_vertices, "extra_bytes": extra, "peak_bytes": peak_memory()}


def apart(name: str, width: int) -> dict[str, Any]:
    """`one_whole` in a process of its own."""
    command = [sys.executable, __file__, "--one-whole", name, str(width)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_whole() -> dict:
    """Passes over whole models at several widths, and the growth of the processor's time at the default one."""
    wholes: list[dict[str, Any]] = [
        {"model": name, "width": width} | apart(name, width) for name in WHOLE for width in WIDTHS
    ]
    layers = [apart(str(power), WIDTH) for power in GROWTH]
    ends = [one for one in wholes if one["width"] == WIDTH]
    exponents = [
        exponent([one["weights"] for one in ones], [one["processor"] for one in ones]) for ones in (ends, layers)
    ]
    found = {"between_models": exponents[0], "over_layers": exponents[1], "threads": torch.get_num_threads()}
    return found | {"wholes": wholes, "layers": layers}


def tables_whole(results: dict) -> Tables:
    """Return the table of docs/speed.md."""
    head = ["model", "weights", "width", "processor, s", "clock, s", "extra memory, GB", "peak of the process, GB"]
    rows = [
        [one["model"], f"{one['weights']:,}", str(one["width"])]
        + [f"{one[name]:.3g}" for name in ("processor", "clock")]
        + [f"{one[name] / 1e9:.2f}" for name in ("extra_bytes", "peak_bytes")]
        for one in results["wholes"]
    ]
    threads, repeats = results["threads"], [one["repeats"] for one in results["wholes"]]
    n = (
        f"medians of {min(repeats)} to {max(repeats)} passes, forward and backward, {threads} thread"
        f"{'s' * (threads > 1)}; the processor's time grows as N^{results['between_models']:.2f} between the models at "
        f"width {WIDTH}, as N^{results['over_layers']:.2f} over layers of 2^{GROWTH[0]} to 2^{GROWTH[-1]} weights"
    )
    return {"speed_whole_models": (n, [head, *rows])}


def tables(results: dict) -> Tables:
    """Return the table of docs/speed.md."""
    closed, name = statistics.median(results["closed_large"]), f"{LARGE[0]} x {LARGE[1]}"
    edges = statistics.median(results["edges_large"]) / closed
    scaled = " (the edge list scaled up from a smaller layer)" if results["edges_large_is_scaled"] else ""
    bandwidth = f"{results['bandwidth'] / 1e9:.0f} GB/s"
    head = f"a {HEAD[0]:,} x {HEAD[1]:,} head from features to mask (GCN forward + backward, sampler)"
    floor = f"its time / reading and writing its activations once per round, at the {bandwidth} measured beside it"
    rows = [
        ["what", "value"],
        [f"message passing over {name}, forward + backward: edge list / closed form", f"{edges:,.0f}{scaled}"],
        [floor, f"{closed / results['floor_seconds']:.1f}"],
        [f"its extra memory, in activations [{LARGE[0]}, {LARGE[1]}, {WIDTH}]", f"{results['extra_activations']:.1f}"],
        [head, f"{results['head_seconds']:.1f} s, {results['head_peak_bytes'] / 1e9:.1f} GB"],
        [
            f"growth of time with the number of weights, 2^{GROWTH[0]} to 2^{GROWTH[-1]}",
            f"N^{results['growth']['exponent']:.2f}",
        ],
    ]
    return {"speed_message_passing": ("medians of 5 to 21 repeats; the edge list of 128 x 512 and the head: 1", rows)}


def plot(results: dict, path: Path) -> None:
    """Time and memory against N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grown = results["growth"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.loglog(grown["nodes"], grown["seconds"], "o-", label=f"$N^{{{grown['exponent']:.2f}}}$")
    left.set(xlabel="weights N", ylabel="seconds, forward + backward")
    left.legend()
    right.loglog(grown["nodes"], [max(1, size) / 1e6 for size in grown["bytes"]], "s-", color="#E69F00")
    right.set(xlabel="weights N", ylabel="extra memory, MB")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse, measure, show."""
    made = parser(__doc__)
    made.add_argument("--full", action="store_true", help="time the edge list of 128 x 512 itself")
    made.add_argument("--plot", type=Path, help="draw time and memory against N into this file")
    made.add_argument("--busy", action="store_true", help="measure a pass beside busy processes instead")
    made.add_argument("--whole", action="store_true", help="measure passes over all weights of models instead")
    made.add_argument("--one-whole", nargs=2, metavar=("GRAPH", "WIDTH"), help="what --whole starts: one, as JSON")
    made.add_argument("--one-process", action="store_true", help="what --busy starts: the seconds of passes, as JSON")
    for_pages(made)
    arguments = made.parse_args()
    reuse_freed_memory()  # as every run does
    if arguments.one_process:
        gcn = MaskingGCN(num_message_passing_rounds=ROUNDS, hidden_dim=WIDTH)
        print(json.dumps(seconds(closed_pass(gcn, *SMALL), BUSY_PASSES)))
        return
    if arguments.one_whole:
        print(json.dumps(one_whole(arguments.one_whole[0], int(arguments.one_whole[1]))))
        return
    if arguments.whole:
        results = measure_whole()
        keep(arguments.json, results)
        for n, rows in tables_whole(results).values():
            print(as_text(rows) + n)
        publish_all(arguments.docs, tables_whole(results))
        return
    if arguments.busy:
        taken = measure_busy()
        show_busy(taken)
        keep(arguments.json, taken)
        return
    results = measure(arguments.full)
    show(results)
    keep(arguments.json, results)
    publish_all(arguments.docs, tables(results))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
