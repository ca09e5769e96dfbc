"""Is a plan right? What `main.py plan` foresees of default runs, beside what they take, stage by stage.

    uv run benchmarks/planned.py                          DIGITS, and generated trees of 10 and 100 classes
    uv run benchmarks/planned.py --classes 10 100 1000    the largest takes five minutes of a processor
    uv run benchmarks/planned.py --several                sweeps, libraries, and a training by two processes, as wholes

Plan and run are processes of their own, of one thread. Their processor seconds are compared, not those on the clock,
which say how busy a machine is. Trees are those of benchmarks/many_classes.py, below --root.
"""

import argparse
import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, for_pages, keep, parser, peak_memory, publish_all
from benchmarks.many_classes import EACH, SIDE, make_tree

import torch

from core.config import PROJECT_ROOT, PipelineConfig, SupportedDatasets
from core.observe import be_quiet
from pipeline import Pipeline
from planning.asking import Asked, foresee

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes whose parent has ended become this one's, and can be waited for
KAPPA, EPOCHS = "1%", 3
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
    return {
        one.name: {
            "seconds": one.cost.seconds,
            "processor": one.cost.processor,
            "memory": one.memory,
            "disk": one.disk,
        }
        for one in made
    }


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


# --- sweeps, libraries, several processes -----------------------------------------------------------------


def whole(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command and all processes that it starts; return seconds, processor seconds, peak bytes, bytes on disk."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    watched = [sys.executable, str(Path(__file__).resolve()), "--watched", *words]
    done = subprocess.run(watched, cwd=PROJECT_ROOT, env=variables, capture_output=True, text=True, check=True)
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return json.loads(done.stdout) | {"disk": disk}


def watch(words: Sequence[str]) -> dict[str, float]:
    """What `whole` starts, so that no earlier command is counted: wait for a command and all that descend from it."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    begun = time.perf_counter()
    subprocess.run(words, stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - begun
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "processor": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss * 1024}


def total_of(text: str) -> dict[str, float]:
    """What the last line of a plan's table says of all stages; of several processes, when the last of them ends."""
    (line,) = re.findall(r"^\| total .*$", text, re.MULTILINE)
    cells = [float(cell.replace(",", "")) for cell in line.strip("| ").split("|")[2:]]
    seconds, processor, memory, disk = cells
    ends = re.search(r"([\d,]+) s until the last ends", text)
    seconds = float(ends[1].replace(",", "")) if ends else seconds
    return {"seconds": seconds, "processor": processor, "memory": memory * 1e9, "disk": disk * 1e6}


def both(plan: Sequence[str], words: Sequence[str], folder: Path) -> dict:
    """Plan something, then do it, each by a command of main.py."""
    main_py = [sys.executable, str(PROJECT_ROOT / "main.py")]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run([*main_py, *plan], env=variables, capture_output=True, text=True, check=True).stdout
    return {"foreseen": total_of(said), "taken": whole([*main_py, *words], folder)}


def a_sweep(root: Path, workers: int) -> dict:
    """Two seeds and three classes of DIGITS."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        config, folder = Path(name, "sweep.yaml"), Path(name, "out")
        over = "{forget_class: [0, 1, 2], seed: [0, 1]}"
        lines = ["device: cpu", f"output_dir: {folder}", "sweep:", f"  over: {over}", "  executor: local"]
        config.write_text("\n".join([*lines, f"  workers: {workers}", ""]))
        return both(["plan", "--config", str(config)], ["sweep", "--config", str(config)], folder)


def a_training(root: Path) -> dict:
    """DIGITS' classifier by two processes; the plan is of a whole run, of which the first stages count."""
    plan = apart("foreseen-together", None)
    stages = [plan[name] for name in ("start", "images", "classifier")]
    joined = {"seconds": sum, "processor": sum, "memory": max, "disk": sum}
    with tempfile.TemporaryDirectory(dir=root) as name:
        words = [sys.executable, str(Path(__file__).resolve()), "--only", "trained", "--tree", name]
        real = whole(words, Path(name))
    return {"foreseen": {one: how(stage[one] for stage in stages) for one, how in joined.items()}, "taken": real}


def together() -> PipelineConfig:
    """The run on DIGITS with a classifier that two processes train."""
    config = configured(None)
    return replace(config, train=replace(config.train, use_ddp=True, num_workers=2))


def train(folder: Path) -> None:
    """What `a_training` starts."""
    run = Pipeline(replace(together(), output_dir=folder))
    run.prepare_process()
    run.run_vision_model_training()


def a_library(root: Path, workers: int) -> dict:
    """A mask for each of ten classes of 100 images, of torchvision's ResNet-18."""
    tree, file = make_tree(root, 10, 100), root / "resnet18.pt"
    if not file.exists():
        torch.save(trained_on(tree), file)
    spec, how = f"torchvision:resnet18@{file}", ["--size", str(SIDE), "--mean", "0.5", "--std", "0.25"]
    with tempfile.TemporaryDirectory(dir=root) as name:
        words = ["library", spec, "--images", str(tree), *how, "--kappa", KAPPA, "--out", name]
        words += ["--engine", "local", "--workers", str(workers)] if workers > 1 else []
        return both([*words, "--plan"], words, Path(name))


def trained_on(tree: Path) -> dict[str, torch.Tensor]:
    """Weights of a ResNet-18 that knows the classes of a tree."""
    from torchvision import datasets, models, transforms

    torch.manual_seed(0)
    steps = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    images = datasets.ImageFolder(str(tree), transforms.Compose(steps))
    model = models.resnet18(num_classes=len(images.classes))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for pixels, labels in torch.utils.data.DataLoader(images, 64, shuffle=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), labels).backward()
            optimiser.step()
    return model.state_dict()


def several(root: Path) -> dict[str, dict]:
    """All of these, by what the table calls them."""
    root.mkdir(parents=True, exist_ok=True)
    cases = {
        "sweep of DIGITS, 3 classes x 2 seeds, 1 worker": lambda: a_sweep(root, 1),
        "the same, 2 workers": lambda: a_sweep(root, 2),
        "training of DIGITS' classifier by 2 processes": lambda: a_training(root),
        "library, ResNet-18, ten classes x 100 images, 1 process": lambda: a_library(root, 1),
        "the same, 2 processes": lambda: a_library(root, 2),
    }
    found = {}
    for name, work in cases.items():
        found[name] = one = work()
        print(name, {side: {key: f"{value:.4g}" for key, value in one[side].items()} for side in one}, flush=True)
    return found


def tables_of_several(found: dict[str, dict]) -> Tables:
    """Return the second table of docs/scaling.md."""
    columns = {
        "seconds to the end: foreseen / taken": ("seconds", 1, 1),
        "processor seconds": ("processor", 1, 1),
        "peak memory of a process, GB": ("memory", 1e9, 2),
        "disk, MB": ("disk", 1e6, 1),
    }
    rows = [["what", *columns]]
    for name, one in found.items():
        pairs = [
            (one["foreseen"][key] / unit, one["taken"][key] / unit, digits) for key, unit, digits in columns.values()
        ]
        rows.append([name, *(f"{a:.{digits}f} / {b:.{digits}f} ({a / b:.2f})" for a, b, digits in pairs)])
    return {"scaling_planned_several": ("1 plan and 1 run each, processes of one thread; in brackets the ratio", rows)}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--root", type=Path, default=Path("/tmp/mimu-classes"))
    made.add_argument("--classes", type=int, nargs="*", default=(10, 100))
    made.add_argument("--only", choices=("foreseen", "foreseen-together", "taken", "trained"), help=argparse.SUPPRESS)
    made.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--watched", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    made.add_argument("--several", action="store_true", help="hold plans of several runs, masks or processes instead")
    for_pages(made)
    given: argparse.Namespace = made.parse_args()
    if given.watched:
        print(json.dumps(watch(given.watched)))
        return
    if given.only == "trained":
        be_quiet()
        train(given.tree)
        return
    if given.several:
        be_quiet()
        found = several(given.root)
        keep(given.json, {"several": found})
        publish_all(given.docs, tables_of_several(found))
        return
    if given.only:
        be_quiet()
        config = together() if given.only == "foreseen-together" else configured(given.tree)
        print(json.dumps((taken if given.only == "taken" else foreseen)(config)))
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
