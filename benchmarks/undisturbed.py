"""What command lines do on the disk and leave behind when nothing disturbs them, and how a disturbed run is compared.

Each runs in a child of one process that has everything imported, so that a trial takes a second.
"""

import csv
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.disk import (
    WRITES,
    Operation,
    watch,
)

import numpy as np
import torch
from PIL import Image

import main as program
import reporter
from commands.sweep import Job, SweepConfig, run_job
from core.artifacts import read_tensors
from core.config import UserError
from core.hashes import code_key, provenance, sha256_arrays
from core.store import RUNS
from core.yaml_files import load_config
from reporting.families import Run
from reporting.panels import Panel
from reporting.tables import SPENT
from training.engines import EXECUTORS

PIPELINE = """
device: cpu
topK_list: [300]
kappa_list: [100, 400]
train: {epochs: 2, batch_size: 64, save_seconds: 0}
graph: {num_samples: 640}
gcn: {objective: elbo, steps: 3, batch_size: 4, hidden_dim: 8}
eval: {methods: [mimu, random, retrain, default], metrics: [core, retrain], references: 1}
reporter: {formats: [svg]}
"""
TREE = """
vision_dataset: FOLDER
forget_class: cat
train: {batch_size: 8}
data: {image_size: 8}
graph: {num_samples: 48}
"""
SWEEP = "reporter: {formats: [svg]}\nsweep: {over: {forget_class: [[0], [1]]}, executor: local, workers: 1}\n"
CLOCK = re.compile(r"seconds|started$|made$|provenance$|per_second$|resume$|digest$|sha256$")
CACHES = re.compile(r"\.pixels$|\.rows\.safetensors$")  # that may be filled late, in another order
STATES = "checkpoints/resume/*.safetensors"
SECONDS = 240.0  # for one child; more is a hang
Arm = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (a signal's number below 0, None: it hung) and what it said."""

    code: int | None
    said: str


def begin(words: list[str], arm: Arm) -> tuple[int, int]:
    """Start the command line `words` in a child; `arm` comes first. Returns its number and the end of its output."""
    sys.stdout.flush()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours
    code = 70
    try:
        os.setsid()
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)
        os.close(ours)
        os.close(theirs)
        # Streams that were opened on a file would seek in the pipe that has taken its place.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        arm()
        code = program.main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: tuple[int, int], seconds: float = SECONDS) -> Ended:
    """Wait for a child."""
    (pid, output), said, last = child, b"", time.monotonic() + seconds
    while select.select([output], [], [], max(0, last - time.monotonic()))[0]:
        if not (part := os.read(output, 1 << 16)):
            break
        said += part
    hung = time.monotonic() >= last
    if hung:
        os.killpg(pid, signal.SIGKILL)
    os.close(output)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(None if hung else code, said.decode(errors="replace"))


def nothing() -> None:
    """No fault."""


def untimed(value: object) -> object:
    """JSON without what a clock says, nor digests of it."""
    if isinstance(value, dict):
        kept = {key: untimed(item) for key, item in value.items() if not CLOCK.search(str(key))}
        if isinstance(files := kept.get("files"), dict):  # a manifest; the hash of curves is a hash of speeds
            kept["files"] = {name: digest for name, digest in files.items() if name != "history.json"}
        return kept
    return [untimed(item) for item in value] if isinstance(value, list) else value


def contents(path: Path) -> bytes:
    """A file's bytes, or what is in it without what a clock says."""
    data = path.read_bytes()
    try:
        if path.suffix == ".csv":
            head, *rows = csv.reader(data.decode().splitlines())
            kept = [place for place, name in enumerate(head) if name not in SPENT and not CLOCK.search(name)]
            return json.dumps([[row[place] for place in kept] for row in (head, *rows)]).encode()
        if path.suffix in (".md", ".tex"):  # the cells of the .csv beside it
            return re.sub(rb"[-\d.e ]+", b"#", data)
        if path.suffix == ".json":
            return json.dumps(untimed(json.loads(data)), sort_keys=True).encode()
        if path.parent.name == "index":  # says when it was made
            arrays, facts = read_tensors(path)
            return json.dumps([untimed(facts), {name: sha256_arrays([arrays[name]]) for name in arrays}]).encode()
    except (ValueError, UserError):
        return b"damaged: " + data
    return data


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: path -> contents; without finished runs, which list the stages that each needed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not CACHES.search(path.name)]
    files = [path for path in files if path.parent != folder / RUNS]
    return {str(path.relative_to(folder)): contents(path) for path in files}


def leftovers(folder: Path) -> list[str]:
    """Files and folders that only a run at work may have."""
    unfinished = [path for path in folder.rglob("*") if path.name.startswith(".")]
    return sorted(str(path.relative_to(folder)) for path in [*unfinished, *folder.glob(STATES)])


@dataclass
class Plan:
    """One command line, what it leaves undisturbed, and what it does on the way.

    Attributes:
        timed: files that hold what a clock says, so that two undisturbed runs differ in them.
        lines: what it says when it begins with nothing, and when everything is there.
    """

    name: str
    words: list[str]
    left: dict[str, bytes] = field(default_factory=dict)
    timed: set[str] = field(default_factory=set)
    operations: list[Operation] = field(default_factory=list)
    reads: list[Operation] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)
    seconds: float = 0.0
    folder: Path = Path()

    def command(self, out: Path, resume: bool = False) -> list[str]:
        """The command line that writes below `out`; a sweep's folder stands in a file beside it."""
        if self.words[0] != "sweep":
            return [*self.words, "--output-dir", str(out), *(["--resume"] if resume else [])]
        place = out.with_suffix(".yaml")
        place.write_text(f"output_dir: {out}\n")
        return [*self.words, "--config", str(place)]

    def run(self, out: Path, arm: Arm = nothing, resume: bool = False) -> Ended:
        """Run it in a child."""
        return end(begin(self.command(out, resume), arm))

    def differences(self, out: Path) -> list[str]:
        """How what lies in `out` differs from what undisturbed runs left."""
        found = snapshot(out)
        said = [f"missing: {name}" for name in self.left.keys() - found.keys()]
        said += [f"left over: {name}" for name in {*(found.keys() - self.left.keys()), *leftovers(out)}]
        for name in self.left.keys() & found.keys():
            if name in self.timed:
                said += [f"empty: {name}"] if not found[name] else []
                said += [f"cut off: {name}"] if name.endswith(".svg") and b"</svg>" not in found[name][-20:] else []
            elif found[name] != self.left[name]:
                said.append(f"different: {name}")
        return sorted(said)

    def rerun(self, out: Path, resume: bool = False) -> tuple[list[str], str]:
        """Run it again without a fault: what is wrong then, and what it said."""
        ended = self.run(out, resume=resume)
        ill = [] if ended.code == 0 else [f"the rerun ended with {ended.code}: {ended.said.strip()[-300:]}"]
        return ill + self.differences(out), ended.said


def said_lines(text: str, out: Path) -> set[str]:
    """Log lines without their times and numbers."""
    lines = (re.sub(r"^\[ *[\d.]+ s\] ", "", line.replace(str(out), "")) for line in text.splitlines())
    return {re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", line) for line in lines}


def counted(plan: Plan, out: Path, kinds: tuple[str, ...]) -> list[Operation]:
    """Run a plan without a fault; what it does on the disk."""
    place = out.with_suffix(".operations")

    def arm() -> None:
        def note(_: int, operation: Operation) -> None:
            with place.open("a") as file:
                file.write(json.dumps(vars(operation)) + "\n")

        watch(out, note, kinds)

    ended = plan.run(out, arm)
    if ended.code:
        raise SystemExit(f"an undisturbed run of {plan.name} ended with {ended.code}:\n{ended.said}")
    plan.lines |= said_lines(ended.said, out)
    return [Operation(**json.loads(line)) for line in place.read_text().splitlines()]


def measured(plan: Plan, folder: Path) -> Plan:
    """Run a plan twice undisturbed, and once more where everything is there."""
    first, second = folder / f"{plan.name}-first", folder / f"{plan.name}-second"
    plan.folder = first
    first.mkdir()  # as each trial's is: operations have the same numbers there
    second.mkdir()
    plan.operations = counted(plan, first, WRITES)
    before = os.times()
    plan.reads = counted(plan, second, ("read", *WRITES))
    after = os.times()
    plan.seconds = sum(after[2:4]) - sum(before[2:4])
    a, b = snapshot(first), snapshot(second)
    plan.left, plan.timed = a, {name for name in a if a[name] != b.get(name)}
    foreign = [name for name in plan.timed if "/plots/" not in name and not name.startswith("reports/")]
    if foreign or a.keys() != b.keys() or leftovers(first):
        raise SystemExit(
            f"two undisturbed runs of {plan.name} differ: {foreign}, {set(a) ^ set(b)}, {leftovers(first)}"
        )
    again, said = plan.rerun(second)
    if again:
        raise SystemExit(f"a second run of {plan.name} in the same folder is not the first: {again}")
    plan.lines |= said_lines(said, second)
    return plan


def write_plans(folder: Path) -> list[Plan]:
    """The command lines, with the files that they need."""
    (folder / "pipeline.yaml").write_text(PIPELINE)
    (folder / "tree.yaml").write_text(f"{TREE}dataset_path: {folder / 'images'}\n")
    (folder / "sweep.yaml").write_text(SWEEP)
    chance = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(16):
            place = folder / "images" / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(60 * label, 60 * label + 90, (8, 8), dtype=np.uint8)).save(place)
    first = ["--config", str(folder / "pipeline.yaml")]
    tree, many = (["--config", str(folder / name)] for name in ("tree.yaml", "sweep.yaml"))
    words = {"digits": ["run", *first], "tree": ["run", *first, *tree], "sweep": ["sweep", *first, *many]}
    return [Plan(name, command) for name, command in words.items()]


def warm_up(folder: Path) -> None:
    """Import what a run needs, but train nothing: a process with threads must not fork."""
    import jinja2  # noqa: F401
    import mpl_toolkits.mplot3d  # noqa: F401
    import sklearn.datasets
    import sklearn.linear_model
    import sklearn.model_selection  # noqa: F401
    import typeguard  # noqa: F401
    from matplotlib.figure import Figure

    import pipeline  # noqa: F401
    from reporting import draw as drawing
    from reporting import page  # noqa: F401

    Image.init()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports the rest of torch
    load_config([folder / "pipeline.yaml"])
    provenance()
    for module in ("stages.classifier", "stages.graphs", "stages.gcn", "stages.evaluation", "reporter"):
        code_key(module)  # parses every source file, which children need not do again
    figures_of, training = reporter.figures_of, reporter.training

    def two_figures(runs: Sequence[Run]) -> dict[str, list[Panel]]:
        """One panel each: they meet the disk as all 14 do, and take seconds less."""
        return {name: panels[:1] for name, panels in list(figures_of(runs).items())[:2]}

    def one_panel(*given: Any) -> list[Panel]:
        return training(*given)[:1]

    def one_by_one(jobs: list[Job], sweep: SweepConfig) -> Iterator[tuple[Job, dict]]:
        """Jobs in this process: a pool would import everything anew."""
        yield from ((job, run_job(job)) for job in jobs)

    def sketch(panels: Sequence[Panel]) -> Figure:
        """Bare curves, in a tenth of the time that axes and legends take."""
        figure = Figure(figsize=(1, 1))
        for one in panels[0].series:
            figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[]).plot(one.y)
        return figure

    vars(reporter).update(figures_of=two_figures, training=one_panel)
    vars(drawing).update(draw=sketch)
    Figure().savefig(io.BytesIO(), format="svg")  # fonts and the rest of matplotlib
    EXECUTORS["local"] = one_by_one  # ty: ignore[invalid-assignment] - it is for jobs of sweeps alone


@dataclass
class Row:
    """The trials of one kind of fault."""

    fault: str
    trials: int = 0
    differing: list[str] = field(default_factory=list)

    def add(self, name: str, ill: list[str]) -> None:
        """One more trial, and what was wrong in it."""
        self.trials += 1
        if ill:
            self.differing.append(
                f"{name}: {'; '.join(ill[:4])}{f' (and {len(ill) - 4} more)' if len(ill) > 4 else ''}"
            )
        print(
            f"{self.fault} {self.trials}: {name}: {'equal' if not ill else ill[0][:300]}", file=sys.stderr, flush=True
        )


@contextmanager
def fresh(folder: Path) -> Generator[Path]:
    """An output folder for one trial."""
    out = folder / "trial"
    out.mkdir()
    try:
        yield out
    finally:
        for path in (out, out.with_suffix(".yaml")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
