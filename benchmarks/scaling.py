"""How far do several processes carry: one training on several, and many jobs on many workers?

    uv run benchmarks/scaling.py [--json PATH] [--docs]

Measured: the second launch of a parallel training in a process; its rate against one process with the same cores; the
stages, memory and files of one job (DIGITS, MLP). Simulated from these: jobs/hour on 1 to 64 workers, where a stage
that several jobs share is made by the first that needs it while the others wait, as under the sweep's lock.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, peak_memory, random_data, run

import torch

from core.config import EvalConfig, PipelineConfig, Trackers, TrainConfig
from core.observe import Tracker
from model import HookedMLPClassifier, HookedModel, HookedResnet
from pipeline import Pipeline
from planning.forecast import SimulatedJob, simulate
from trainer import VisionModelTrainer
from training.distributed import Group, launch
from training.processes import reuse_freed_memory

CPU = torch.device("cpu")
WORKERS = (1, 2, 4, 8, 16, 32, 64)
SEEDS, CLASSES = 16, 10
REPEATS = 3
METHODS = ("mimu", "taylor_mask", "random", "default")


def nothing(group: Group, device: torch.device) -> dict:
    """A launch without work."""
    return {}


def launches() -> list[float]:
    """Seconds of launching two processes that do nothing, the first with the start of the fork server."""
    taken = []
    for _ in range(4):
        begun = time.perf_counter()
        launch(nothing, (), workers=2, device=CPU, seconds=60, restarts=0)
        taken.append(time.perf_counter() - begun)
    return taken


def rate(
    kind: Callable[[int, int, int], HookedModel], images: int, epochs: int, batch_size: int, workers: int
) -> float:
    """Images/s of a training, the first epoch (warm-up) left out."""
    data = random_data(images, batch_size)
    train = TrainConfig(epochs=epochs, batch_size=batch_size, use_ddp=workers > 1, num_workers=max(1, workers))
    tracker = Tracker(Trackers.none, "", {})
    with tempfile.TemporaryDirectory() as folder:
        VisionModelTrainer(kind(10, 1, 28), data, train, CPU, tracker).train(Path(folder))
    rates = [entry["images_per_second"] for entry in tracker.history if "images_per_second" in entry]
    return statistics.median(rates[1:])


def throughput() -> dict:
    """Rates of one process with one thread, one with two, and two with one each, in turn.

    On a machine that others use too, two threads that wait for each other can be slower than one alone; two processes
    are therefore held against the better of the two, not only against the same number of threads.
    """
    found = {}
    cases = (
        ("MLP, batch 512", HookedMLPClassifier, (20000, 5, 512)),
        ("MLP, batch 8,192", HookedMLPClassifier, (65536, 5, 8192)),
        ("ResNet-18, batch 64", HookedResnet, (256, 2, 64)),
        ("ResNet-18, batch 256", HookedResnet, (1024, 2, 256)),
    )
    for name, kind, sizes in cases:
        rows = []
        for _ in range(REPEATS):
            row = {}
            for label, threads, workers in (("1 x 1", 1, 1), ("1 x 2", 2, 1), ("2 x 1", 2, 2)):
                torch.set_num_threads(threads)
                row[label] = rate(kind, *sizes, workers)
            rows.append(row)
        found[name] = rows
    return found


def one_job() -> dict:
    """Stage seconds, peak memory and bytes of one DIGITS job (one thread, as in a sweep), and of one that finds them.

    In 30 epochs and 100 steps, the shipped configuration's.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = PipelineConfig(output_dir=Path(name), device="cpu", kappa_list=(50, 100, 200, 400))
        train, gcn = replace(base.train, epochs=30, batch_size=32), replace(base.gcn, steps=100)
        config = replace(base, train=train, gcn=gcn, eval=EvalConfig(METHODS, ("core",), references=0))
        first = Pipeline(config)
        begun = time.perf_counter()
        first.eval()
        whole = time.perf_counter() - begun
        stages = {stage: first.stages.seconds[stage] for stage in ("classifier", "graphs", "gcn")}
        begun = time.perf_counter()
        Pipeline(replace(config, forget_class=(1,))).eval()
        own = time.perf_counter() - begun
        shared = [p for folder in ("checkpoints", "datasets") for p in Path(name, folder).rglob("*") if p.is_file()]
        files = [p for p in Path(name, "eval").rglob("*") if p.is_file()]
        sizes = {"shared": sum(p.stat().st_size for p in shared), "own": sum(p.stat().st_size for p in files) // 2}
        count = {"shared": len(shared), "own": len(files) // 2}
    return {"stages": stages, "whole": whole, "own": own, "bytes": sizes, "files": count, "memory": peak_memory()}


def simulated(job: dict, starting: float) -> dict:
    """Jobs/hour for each number of workers, jobs of one classifier listed together and listed in turn."""

    def made(seed: int) -> SimulatedJob:
        return SimulatedJob(tuple((f"{stage}-{seed}", s) for stage, s in job["stages"].items()), job["own"])

    together = [made(seed) for seed in range(SEEDS) for _ in range(CLASSES)]
    in_turn = [made(seed) for _ in range(CLASSES) for seed in range(SEEDS)]
    return {
        name: {workers: 3600 * len(jobs) / simulate(jobs, workers, starting) for workers in WORKERS}
        for name, jobs in (("together", together), ("in turn", in_turn))
    }


def measure() -> dict:
    """All results of the benchmark."""
    reuse_freed_memory()  # as a run does
    job = one_job()
    found = {"launches": launches(), "throughput": throughput(), "job": job}
    return found | {"simulated": simulated(job, found["launches"][0])}


def show(results: dict) -> None:
    """Tables for people."""
    first, *later = results["launches"]
    print(f"launch of 2 processes: first {first:.1f} s, later {statistics.median(later):.2f} s (n = {len(later)})")
    for name, rows in results["throughput"].items():
        same = [row["2 x 1"] / row["1 x 2"] for row in rows]
        best = [row["2 x 1"] / max(row["1 x 1"], row["1 x 2"]) for row in rows]
        for label, ratios in (("1 x 2", same), ("the better of 1 x 1 and 1 x 2", best)):
            spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name}: 2 processes x 1 thread / {label}: {statistics.median(ratios):.2f} ({spread})")
        idle = [row["1 x 2"] / row["1 x 1"] for row in rows]
        print(f"  1 x 2 / 1 x 1: {statistics.median(idle):.2f} (well below 1: the machine is busy, the first is void)")
    job = results["job"]
    print("stages of a job, s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in job["stages"].items()))
    print(f"whole job {job['whole']:.1f} s, one that finds its stages {job['own']:.1f} s")
    print(f"memory {job['memory'] / 2**20:.0f} MB; files {job['files']}, bytes {job['bytes']}")
    print(f"simulated, {SEEDS} classifiers x {CLASSES} classes, jobs/hour:")
    for workers in WORKERS:
        row = ", ".join(f"{name} {values[workers]:.0f}" for name, values in results["simulated"].items())
        print(f"  {workers:2} workers: {row}")


def tables(results: dict) -> Tables:
    """Return the tables of docs/scaling.md."""
    first, *later = results["launches"]
    rows = [
        ["measured", "value"],
        ["launch of 2 processes, the first in a process", f"{first:.1f} s"],
        ["launch of 2 processes, later ones", f"{statistics.median(later):.2f} s"],
    ]
    what = "images/s of 2 processes x 1 thread / of 1 process x 2 threads"
    for name, repeats in results["throughput"].items():
        ratios = [row["2 x 1"] / row["1 x 2"] for row in repeats]
        spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        label = f"{what}: {name}" if len(rows) == 3 else f"the same, {name}"
        rows.append([label, f"{statistics.median(ratios):.2f} ({spread})"])
    jobs = [["workers", "jobs of one classifier together", "classifiers in turn"]]
    jobs += [
        [str(workers), *(f"{results['simulated'][order][workers]:,.0f}" for order in ("together", "in turn"))]
        for workers in WORKERS
    ]
    repeated = f"{len(later)} launches after the first; {REPEATS} repeats for each ratio, all of them in brackets"
    simulation = f"a simulation of {SEEDS * CLASSES} jobs ({SEEDS} classifiers x {CLASSES} classes)"
    return {"scaling_processes": (repeated, rows), "scaling_jobs": (simulation, jobs)}


if __name__ == "__main__":
    run(__doc__, measure, show, tables)
