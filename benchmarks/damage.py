"""Spoil one file that a run has left, run again, and see whether the run names the file and makes it anew."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.disk import (
    killed_at,
)
from benchmarks.undisturbed import STATES, Plan, Row, contents, fresh, said_lines

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
DRAWN = ("eval", "reports")  # made from records and masks alone, so that the same bytes come again
# What is taken away as well, so that the damaged file is read: nothing is measured where all records are.
READERS = {"/retrained/": ("eval",), ".pixels": ("eval", "checkpoints", "datasets/Graphs")}
UNREAD = (("pixels", "longer"),)  # bytes behind the rows that count
REWRITTEN = ("page",)  # by every run, and never read: nobody can take damage for a result


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
