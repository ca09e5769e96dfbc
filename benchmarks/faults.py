"""Is a run that was killed, met a full disk or found its files damaged, then run again, the run that nothing disturbed?

    uv run benchmarks/faults.py [--kills 96] [--errors 38] [--together 13] [--damage 49] [--workers 2] [--seed 0]

Tiny real pipelines (DIGITS, a tree of image files, a sweep) run in children of one process that has everything
imported. Each trial has a folder of its own and one fault; what the rerun leaves is compared, file by file, with what
undisturbed runs left: every record, mask, stage, table and figure, apart from what a clock says. Prints a row for each
kind of fault and every difference; exits with 1 if there is one. Writes into a temporary folder alone.

kills    half at numbered operations on the disk (before one, or in the middle of a write), half at random moments
errors   an operation fails (ENOSPC, EIO, ...), a real tmpfs is full, no file can be opened; the run must say so in one
         sentence, without a traceback, with exit code 1 or 2
together that many processes in one folder
damage   a product is flipped, cut, emptied, exchanged, ...: the rerun names it in its log and makes it anew
workers  kill -9 of a worker of --train.use-ddp, and of the one that started it: equal, and no process is left
"""

import csv
import errno
import io
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import keep, parser
from benchmarks.disk import (
    FILLS,
    WRITES,
    Operation,
    killed_after,
    killed_at,
    refused_at,
    torn_at,
    unsynced,
    watch,
    with_few_files,
)

import numpy as np
import torch
from PIL import Image

import main as program
import reporter
from commands.sweep import EXECUTORS, Job, SweepConfig, run_job
from core.artifacts import read_tensors
from core.config import PROJECT_ROOT, UserError
from core.hashes import provenance, sha256_arrays
from core.yaml_files import load_config
from reporting.panels import Panel

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
PRODUCTS = {
    "record": "eval/metrics_and_plots/json/*/*.json",
    "mask": "eval/metrics_and_plots/masks/*/*.safetensors",
    "classifier": "checkpoints/classifier/*/*.safetensors",
    "retrained": "checkpoints/retrained/*/*.safetensors",
    "gcn": "checkpoints/gcn/*/*.safetensors",
    "graphs": "datasets/Graphs/*/[!m]*.*",
    "manifest": "*/*/*/manifest.json",
    "history": "checkpoints/*/*/history.json",
    "figure": "eval/metrics_and_plots/plots/*/*.svg",
    "table": "eval/metrics_and_plots/plots/H*/table*.*",
    "figures' manifest": "eval/metrics_and_plots/plots/*/manifest.json",
    "index": "datasets/index/*.safetensors",
    "pixels": "datasets/index/*.pixels",
    "outcome": "eval/sweeps/*.json",
    "page": "reports/index.html",
}
CACHES = re.compile(r"\.pixels$|\.rows\.safetensors$")  # that may be filled late, in another order
DRAWN = ("eval", "reports")  # made from records and masks alone, so that the same bytes come again
REDRAWN = re.compile(r"/plots/|/reports/")  # each use compares it with what its records say: no wait for the disk
# What is taken away as well, so that the damaged file is read: nothing is measured where all records are.
READERS = {"/retrained/": ("eval",), ".pixels": ("eval", "checkpoints", "datasets/Graphs")}
UNREAD = (("pixels", "longer"),)  # bytes behind the rows that count
REWRITTEN = ("page",)  # by every run, and never read: nobody can take damage for a result
STATES = "checkpoints/resume/*.safetensors"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.EROFS)
REMOVALS = ("remove", "rmdir", "rename")
SECONDS = 240.0  # for one child; more is a hang
Arm = Callable[[], None]


# --- children ---------------------------------------------------------------------------------------------


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


# --- what a run leaves ------------------------------------------------------------------------------------


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
            kept = [place for place, name in enumerate(head) if not CLOCK.search(name)]
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
    """Every file below a folder: path -> contents."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not CACHES.search(path.name)]
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


# --- trials -----------------------------------------------------------------------------------------------


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


def spread(count: int, total: int, shift: float) -> list[int]:
    """`count` numbers below `total`, evenly spread."""
    return [min(total - 1, int((place + shift) * total / count)) for place in range(count)]


def kills(plans: list[Plan], count: int, folder: Path, chance: random.Random) -> list[Row]:
    """Half at numbered operations, of which some in the middle of a write; half at random moments."""
    numbered, anytime = Row("killed at an operation"), Row("killed at a random moment")
    for share, plan in zip(_shares((count + 1) // 2, len(plans)), plans, strict=True):
        for turn, number in enumerate(spread(share, len(plan.operations), chance.random())):
            operation = plan.operations[number]
            torn = operation.kind in FILLS and turn % 2
            with fresh(folder) as out:
                arm = (
                    partial(torn_at, out, number, chance.randint(0, 600), True)
                    if torn
                    else partial(killed_at, out, number)
                )
                ended = plan.run(out, arm)
                expected = -signal.SIGXFSZ if torn else -signal.SIGKILL
                # A file smaller than the limit is written whole: the next larger one ends the run.
                hit = ended.code == expected or (torn and ended.code == 0)
                ill = [] if hit else [f"not killed: {ended.code}, {ended.said[-300:]}"]
                where = f"{plan.name}, {'in' if torn else 'before'} {operation.kind} {number}"
                numbered.add(where, ill + plan.rerun(out, resume=bool(turn % 3))[0])
    for share, plan in zip(_shares(count // 2, len(plans)), plans, strict=True):
        for turn in range(share):
            with fresh(folder) as out:
                seconds = plan.seconds * (turn + chance.random()) / share * 0.95
                ended = plan.run(out, partial(killed_after, seconds))
                ill = [] if ended.code in (0, -signal.SIGPROF) else [f"not killed: {ended.code}, {ended.said[-300:]}"]
                anytime.add(f"{plan.name}, {seconds:.2f} s", ill + plan.rerun(out, resume=bool(turn % 3))[0])
    return [numbered, anytime]


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (place < count % parts) for place in range(parts)]


def ill_said(ended: Ended, out: Path) -> list[str]:
    """What is wrong with how a run ended that met an error of the disk."""
    lines = ended.said.strip().splitlines() or [""]
    if ended.code == 0:
        return []  # it went on without what failed; what it left is compared
    ill = [] if ended.code in (1, 2) else [f"exit code {ended.code}: {lines[-1][:200]}"]
    if "Traceback" in ended.said:
        frames = [line.strip() for line in lines if line.lstrip().startswith('File "')]
        ill += [f"a traceback, {frames[-1] if frames else 'no frame'}: {lines[-1][:200]}"]
    ill += [] if lines[-1].startswith("error: ") else [f"the last line is no error: {lines[-1][:200]}"]
    named = str(out.parent) in lines[-1]  # below the output folder, or of an image beside it
    return ill + ([] if named else [f"no path is named: {lines[-1][:200]}"])


def errors(plans: list[Plan], count: int, folder: Path, chance: random.Random) -> list[Row]:
    """Injected errors, for the larger part; then real ones: a full tmpfs, no free file."""
    few, full = count // 8, count // 8 if os.geteuid() == 0 else 0
    injected, opened, filled = Row("error of an operation"), Row("too many open files"), Row("tmpfs is full")
    for share, plan in zip(_shares(count - few - full, len(plans)), plans, strict=True):
        for turn, number in enumerate(spread(share, len(plan.reads), chance.random())):
            operation = plan.reads[number]
            error = chance.choice(ERRORS if operation.kind not in REMOVALS else (errno.EIO, errno.EROFS))
            with fresh(folder) as out:
                fault = partial(refused_at, out, number, error, bool(turn % 2))
                if operation.kind in FILLS and turn % 3 == 0:
                    place = sum(one.kind != "read" for one in plan.reads[:number])
                    fault, error = partial(torn_at, out, place, chance.randint(0, 600), False), errno.EFBIG
                ill = ill_said(plan.run(out, fault), out)
                where = f"{plan.name}, {errno.errorcode[error]} at {operation.kind} {number}"
                injected.add(where, ill + plan.rerun(out)[0])
    for turn in range(few):
        plan = plans[turn % len(plans)]
        with fresh(folder) as out:
            ill = ill_said(plan.run(out, partial(with_few_files, turn)), out)
            opened.add(f"{plan.name}, room for {turn}", ill + plan.rerun(out)[0])
    for turn in range(full):
        plan = plans[turn % len(plans)]
        with fresh(folder) as out, tmpfs(out, (turn + 1) * 2000 // (full + 1)):
            ill = ill_said(plan.run(out), out)
            subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
            filled.add(f"{plan.name}, {(turn + 1) * 2000 // (full + 1)} kB", ill + plan.rerun(out)[0])
    return [row for row in (injected, opened, filled) if row.trials]


@contextmanager
def tmpfs(place: Path, kilobytes: int) -> Generator[None]:
    """A file system of a given size on a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def together(plan: Plan, count: int, folder: Path) -> Row:
    """That many processes at once in one folder."""
    row = Row("at once in one folder")
    with fresh(folder) as out:
        ended = [end(child) for child in [begin(plan.command(out), nothing) for _ in range(count)]]
        differing = plan.differences(out)
        for one in ended:
            row.add(plan.name, ([] if one.code == 0 else [f"ended with {one.code}: {one.said[-300:]}"]) + differing)
    return row


# --- damage -----------------------------------------------------------------------------------------------


def _flip(data: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def _digit(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return _flip(data, chance, others)
    place = chance.choice(places)
    return data[:place] + bytes([48 + (data[place] - 47) % 10]) + data[place + 1 :]


def _another(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    return chance.choice(others) if others else _flip(data, chance, others)


WAYS: dict[str, Callable[[bytes, random.Random, list[bytes]], bytes]] = {
    "a bit": _flip,
    "a digit": _digit,
    "half": lambda data, *_: data[: len(data) // 2],
    "another's": _another,
    "empty": lambda *_: b"",
    "longer": lambda data, *_: data + b"\n1",
}


def damage_file(path: Path, way: str, others: list[Path], chance: random.Random) -> None:
    """Spoil a file in place; `others` are of its kind."""
    data = path.read_bytes()
    theirs = [other.read_bytes() for other in others if other != path and other.suffix == path.suffix]
    path.write_bytes(WAYS[way](data, chance, [one for one in theirs if one != data]))


def products(plan: Plan) -> dict[str, list[Path]]:
    """The files of each kind that a plan leaves, below its folder."""
    found = {kind: sorted(plan.folder.glob(pattern)) for kind, pattern in PRODUCTS.items()}
    return {kind: [path.relative_to(plan.folder) for path in paths] for kind, paths in found.items() if paths}


def unnamed(said: str, path: Path, plan: Plan, out: Path) -> list[str]:
    """A complaint unless some line, that no undisturbed run says, names the file or its folder."""
    odd = [line for line in said.splitlines() if not said_lines(line, out) <= plan.lines]
    named = any(name in line for line in odd for name in (path.name, path.parent.name))
    return [] if named else ["not named in the log"]


def damage(plans: list[Plan], count: int, folder: Path, chance: random.Random) -> list[Row]:
    """Products of every kind in every way; a row for each kind."""
    cases = []
    for plan in plans:
        own = products(plan)
        wanted = [kind for kind in own if plan.name == "digits" or kind in ("index", "pixels", "outcome", "record")]
        cases += [(kind, way, plan, own[kind]) for kind in wanted for way in WAYS]
    cases += [("state", way, plans[0], []) for way in WAYS]
    chance.shuffle(cases)
    seen: Counter[str] = Counter()
    turns = []
    for case in cases:  # every kind once, then every kind twice, ...
        turns.append((seen[case[0]], case))
        seen[case[0]] += 1
    turns.sort(key=lambda turn: turn[0])
    rows: dict[str, Row] = {}
    stopped = stopped_training(plans[0], folder)
    for _, (kind, way, plan, files) in (turns * (1 + count // len(turns)))[:count]:
        row = rows.setdefault(kind, Row(f"damaged: {kind}"))
        with fresh(folder) as out:
            shutil.copytree(stopped if kind == "state" else plan.folder, out, dirs_exist_ok=True)
            path = chance.choice([one.relative_to(out) for one in out.glob(STATES)] if kind == "state" else files)
            damage_file(out / path, way, [out / file for file in files], chance)
            for place in next((places for word, places in READERS.items() if word in str(path)), ()):
                shutil.rmtree(out / place)
            ill, said = plan.rerun(out, resume=kind == "state")
            if path.parts[0] in DRAWN and contents(out / path) != contents(plan.folder / path):
                ill.append("not as it was")
            ill += [] if kind in REWRITTEN or (kind, way) in UNREAD else unnamed(said, path, plan, out)
            row.add(f"{way}: {path.name}", ill)
    return list(rows.values())


def stopped_training(plan: Plan, folder: Path) -> Path:
    """The folder of a run that was killed when the classifier's state had been saved."""
    out = folder / "stopped"
    renamed = next(n for n, one in enumerate(plan.operations) if one.kind == "rename" and "/resume/" in one.target)
    following = next(n for n, one in enumerate(plan.operations) if n > renamed and one.kind in ("open", "save"))
    plan.run(out, partial(killed_at, out, following))
    return out


# --- workers ----------------------------------------------------------------------------------------------


def relatives(mark: str) -> dict[int, int]:
    """Processes that have `mark` in their environment: number -> their parent's number."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and mark.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def workers(plan: Plan, count: int, folder: Path) -> Row:
    """In turn a worker and the launcher get kill -9 in the middle of a training in two processes."""
    row = Row("worker or launcher killed")
    long = [
        *plan.words,
        "--train.use-ddp",
        "--train.num-workers",
        "2",
        "--train.epochs",
        "40",
        "--eval.references",
        "0",
    ]
    plan = replace(plan, name="ddp", words=[*long, "--eval.methods", "mimu", "random", "default"], lines=set())
    whole = folder / "ddp-whole"
    ended = plan.run(whole)
    if ended.code:
        raise SystemExit(f"an undisturbed training in two processes ended with {ended.code}:\n{ended.said}")
    plan.left = snapshot(whole)
    plan.timed = {name for name in plan.left if "/plots/" in name or name.startswith("reports/")}
    for turn in range(count):
        who, mark = ("launcher" if turn % 2 else "worker"), f"{folder}/{turn}"
        with fresh(folder) as out:
            child = begin(plan.command(out, resume=True), partial(os.environ.update, {"FAULTS": mark}))
            last = time.monotonic() + SECONDS
            while not list(out.glob(STATES)) and time.monotonic() < last:
                time.sleep(0.02)
            there = relatives(mark)
            own = [pid for pid, parent in there.items() if parent in there]
            os.kill(child[0] if who == "launcher" else own[-1], signal.SIGKILL)
            ended = end(child)
            ill = [] if who == "launcher" or ended.code == 0 else [f"ended with {ended.code}: {ended.said[-300:]}"]
            last = time.monotonic() + 10
            while relatives(mark) and time.monotonic() < last:
                time.sleep(0.1)
            orphans = relatives(mark)
            ill += [f"{len(orphans)} processes are left"] if orphans else []
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            row.add(who, ill + (plan.rerun(out, resume=True)[0] if who == "launcher" else plan.differences(out)))
    return row


# --- the whole --------------------------------------------------------------------------------------------


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
    from reporting import page  # noqa: F401

    Image.init()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports the rest of torch
    load_config([folder / "pipeline.yaml"])
    provenance()
    figures_of, training = reporter.figures_of, reporter.training

    def two_figures(runs: Sequence[list[dict]]) -> dict[str, list[Panel]]:
        """One panel each: they meet the disk as all 14 do, and take seconds less."""
        return {name: panels[:1] for name, panels in list(figures_of(runs).items())[:2]}

    def one_panel(*given: Any) -> list[Panel]:
        return training(*given)[:1]

    def one_by_one(jobs: list[Job], sweep: SweepConfig) -> Iterator[tuple[Job, dict]]:
        """Jobs in this process: a pool would import everything anew."""
        yield from ((job, run_job(job)) for job in jobs)

    vars(reporter).update(figures_of=two_figures, training=one_panel)
    Figure().savefig(io.BytesIO(), format="svg")  # fonts and the rest of matplotlib
    EXECUTORS["local"] = one_by_one


def show(rows: list[Row]) -> None:
    """A table, and every difference below it."""
    print("| fault | trials | equal | differing |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.fault} | {row.trials} | {row.trials - len(row.differing)} | {len(row.differing)} |")
    for row in rows:
        print("".join(f"\n{row.fault}: {one}" for one in row.differing), end="")
    print()


def campaign(given: object, folder: Path) -> list[Row]:
    """All trials that were asked for."""
    asked = vars(given)
    chance = random.Random(asked["seed"])
    plans = write_plans(folder)
    warm_up(folder)
    plans = [measured(plan, folder) for plan in plans if plan.name in asked["plans"]]
    print(", ".join(f"{p.name}: {len(p.operations)} operations, {p.seconds:.1f} s" for p in plans), file=sys.stderr)
    single = [plan for plan in plans if plan.words[0] == "run"]
    order = Row("synced before it counts")
    for plan in plans:
        order.add(plan.name, unsynced([one for one in plan.operations if not REDRAWN.search(one.target)]))
    rows = [order, *kills(plans, asked["kills"], folder, chance), *errors(single, asked["errors"], folder, chance)]
    rows += [together(plans[0], asked["together"], folder)] if asked["together"] else []
    rows += damage(plans, asked["damage"], folder, chance) if asked["damage"] else []
    return rows + ([workers(plans[0], asked["workers"], folder)] if asked["workers"] else [])


def main() -> None:
    """Measure, print, keep; 1 if anything differs."""
    made = parser(__doc__)
    counts = {"kills": 96, "errors": 38, "together": 13, "damage": 49, "workers": 2, "seed": 0}
    for name, count in counts.items():
        made.add_argument(f"--{name}", type=int, default=count)
    made.add_argument("--plans", nargs="+", default=["digits", "tree", "sweep"], help="which command lines")
    given = made.parse_args()
    os.chdir(PROJECT_ROOT)
    with tempfile.TemporaryDirectory(prefix="mimu-faults-") as name:
        rows = campaign(given, Path(name).resolve())
    show(rows)
    keep(given.json, {"rows": [vars(row) for row in rows]})
    sys.exit(1 if any(row.differing for row in rows) else 0)


if __name__ == "__main__":
    main()
