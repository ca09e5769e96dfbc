"""Is a plan right? What `main.py plan` foresees of default runs, beside what they take, stage by stage.

    uv run benchmarks/planned.py                          DIGITS, and generated trees of 10 and 100 classes
    uv run benchmarks/planned.py --classes 10 100 1000    the largest takes five minutes of a processor

Plan and run are processes of their own, of one thread. Their processor seconds are compared, not those on the clock,
which say how busy a machine is. Trees are those of benchmarks/many_classes.py, below --root.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, for_pages, keep, parser, peak_memory, publish_all
from benchmarks.many_classes import EACH, SIDE, make_tree

from core.config import PROJECT_ROOT, PipelineConfig, SupportedDatasets
from core.observe import be_quiet
from pipeline import Pipeline
from planning.asking import Asked, foresee

STAGES = ("start", "images", "classifier", "graphs", "gcn", "retrained", "evaluation")


def configured(tree: Path | None) -> PipelineConfig:
    """The default run, on DIGITS or on a tree."""
    base = PipelineConfig(device="cpu")
    if tree is None:
        return base
    data = replace(base.data, image_size=SIDE)
    return replace(base, vision_dataset=SupportedDatasets.FOLDER, dataset_path=tree, data=data)


def taken(config: PipelineConfig) -> dict[str, dict[str, float]]:
    """Carry out a run, stage by stage: processor seconds, peak bytes so far, and bytes that were added to the disk."""
    found = {"start": {"processor": time.process_time(), "memory": 0, "disk": 0}}
    with tempfile.TemporaryDirectory() as folder:
        run = Pipeline(replace(config, output_dir=Path(folder)))
        run.prepare_process()
        works = (
            lambda: run.stages.data,
            run.run_vision_model_training,
            run.run_gcn_graph_generation,
            lambda: run.run_gcn_training(config.topK_list[0]),
            lambda: run.stages.retrained(0),
            run.eval,
        )
        before = 0
        for name, work in zip(STAGES[1:], works, strict=True):
            used = time.process_time()
            work()
            used, size = (
                time.process_time() - used,
                sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()),
            )
            found[name], before = {"processor": used, "memory": peak_memory(), "disk": size - before}, size
    return found


def foreseen(config: PipelineConfig) -> dict[str, dict[str, float]]:
    """Plan the same run."""
    made = [stage for stage, _ in foresee(Asked([config])).forecast.stages]
    return {one.name: {"processor": one.cost.processor, "memory": one.memory, "disk": one.disk} for one in made}


def apart(which: str, tree: Path | None) -> dict:
    """Do one of the two in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", which, *(["--tree", str(tree)] if tree else [])]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def tables(results: dict) -> Tables:
    """Return the table of docs/scaling.md."""
    rows = [["stage", *(f"{name}: foreseen / taken" for name in results["runs"])]]
    for stage in STAGES:
        pairs = [
            (one["foreseen"][stage]["processor"], one["taken"][stage]["processor"]) for one in results["runs"].values()
        ]
        rows.append([stage, *(f"{a:.2f} / {b:.2f}" for a, b in pairs)])
    for title, unit, digits, joined in (("processor", 1, 1, sum), ("memory", 1e9, 2, max), ("disk", 1e6, 1, sum)):
        name = {"processor": "all, s", "memory": "peak memory, GB", "disk": "disk, MB"}[title]
        sums = [
            [joined(one[side][stage][title] for stage in STAGES) / unit for side in ("foreseen", "taken")]
            for one in results["runs"].values()
        ]
        rows.append([name, *(f"{a:.{digits}f} / {b:.{digits}f}" for a, b in sums)])
    return {"scaling_planned": ("1 plan and 1 run each; processor seconds of one thread", rows)}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--root", type=Path, default=Path("/tmp/mimu-classes"))
    made.add_argument("--classes", type=int, nargs="*", default=(10, 100))
    made.add_argument("--only", choices=("foreseen", "taken"), help=argparse.SUPPRESS)
    made.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    for_pages(made)
    given: argparse.Namespace = made.parse_args()
    if given.only:
        be_quiet()
        print(json.dumps((foreseen if given.only == "foreseen" else taken)(configured(given.tree))))
        return
    trees = {"DIGITS": None} | {f"{count:,} classes x {EACH}": make_tree(given.root, count) for count in given.classes}
    runs = {}
    for name, tree in trees.items():
        runs[name] = {which: apart(which, tree) for which in ("foreseen", "taken")}
        for stage in STAGES:
            a, b = (runs[name][which][stage]["processor"] for which in ("foreseen", "taken"))
            print(f"{name:20} {stage:12} foreseen {a:8.2f} s, taken {b:8.2f} s, {a / b if b else 0:.2f}", flush=True)
        keep(given.json, {"runs": runs})
    publish_all(given.docs, tables({"runs": runs}))


if __name__ == "__main__":
    main()
