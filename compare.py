"""Runs held against each other: which is better on what, by paired differences with intervals.

A *side* is some runs under one name: an output folder, or one run by its id. Two sides are paired run by run over the
same model, dataset, classes and seed, each method at its chosen point. No torch, no dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from intervals import Estimate as Interval
from intervals import difference
from records import read_records
from tables import ARROWS, Best, Estimate, Run, best_points, over_runs, runs_of, shown

Cell = tuple[str, str, str, int]  # model, dataset, classes, seed


@dataclass(frozen=True)
class Side:
    """Some runs under one name: cell -> method -> its chosen point."""

    name: str
    points: dict[Cell, dict[str, Best]]
    metrics: dict[str, dict]


def side(name: str, runs: Sequence[Run]) -> Side:
    """Runs as one side; of several runs of a cell the one that started last."""
    ordered = sorted(runs, key=lambda run: run[0].get("provenance", {}).get("started", ""))
    points = {
        (run[0]["model"], run[0]["dataset"], str(run[0]["forget_class"]), run[0]["seed"]): {
            best.method: best for best in best_points(run)
        }
        for run in ordered
    }
    metrics = {metric: about for run in runs for metric, about in run[0]["metrics"].items()}
    return Side(name, points, {metric: about for metric, about in metrics.items() if about.get("first", True)})


def find_side(name: str, output_dir: Path) -> Side:
    """A side by the name of an output folder, or by (the beginning of) a run's id below `output_dir`.

    Raises:
        UserError: there is neither, or the id is of several runs.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        runs = runs_of(read_records(folder))
        if not runs:
            raise UserError(f"there are no records below {folder}: make some with `uv run main.py --output-dir {name}`")
        return side(name, runs)
    runs = runs_of(read_records(output_dir))
    found = [run for run in runs if run[0]["run"].startswith(name)]
    if len(found) != 1:
        known = ", ".join(sorted(run[0]["run"] for run in runs)) or "none"
        what = f"{name} is no folder and the id of {len(found)} runs below {output_dir}"
        raise UserError(f"{what}: give an output folder or one of the runs {known}")
    return side(name, found)


def _loss(points: dict[str, Best], method: str, metric: str, better: str) -> float | None:
    """How far from the best possible a method is: smaller is better."""
    value = points[method].values.get(metric)
    if value is None or better == "lower":
        return value
    if better == "higher":
        return -value
    target = points["retrain"].values.get(metric) if "retrain" in points else None
    return None if target is None else abs(value - target)


def _one_pair(a: Best, b: Best, metric: str) -> Estimate:
    """b - a of a single pair, from the intervals of both, if they have some (Newcombe's way)."""
    mine, theirs = a.interval(metric), b.interval(metric)
    if not mine or not theirs:
        return over_runs([b.values[metric] - a.values[metric]])
    found = difference(Interval(**theirs), Interval(**mine))
    return Estimate(found.value, found.low, found.high, 1)


def _verdict(gain: Estimate, a: str, b: str) -> str:
    """Who is better, from b's gain over a (positive: b is better)."""
    if gain.low is None or gain.high is None:
        first = "equal" if gain.value == 0 else f"{b if gain.value > 0 else a} ahead"
        return f"{first}; one pair, no interval"
    return f"{b} better" if gain.low > 0 else f"{a} better" if gain.high < 0 else "no difference shown"


def _row(a: Side, b: Side, method: str, metric: str) -> list[str] | None:
    """One method on one metric; None unless both sides have figures of it in a common cell."""
    better = a.metrics[metric]["better"]
    cells = [cell for cell in a.points if cell in b.points and method in a.points[cell] and method in b.points[cell]]
    losses = [[_loss(one.points[cell], method, metric, better) for cell in cells] for one in (a, b)]
    kept = [place for place, pair in enumerate(zip(*losses, strict=True)) if None not in pair]
    if not kept:
        return None
    pairs = [(a.points[cells[place]][method], b.points[cells[place]][method]) for place in kept]
    gains = [losses[0][place] - losses[1][place] for place in kept]  # ty: ignore[unsupported-operator]
    if len(pairs) == 1:
        change = _one_pair(*pairs[0], metric)
        signs = {"higher": (change.low, change.high), "lower": (_minus(change.high), _minus(change.low))}
        gain = Estimate(gains[0], *signs.get(better, (None, None)), 1)
    else:
        change, gain = over_runs([two.values[metric] - one.values[metric] for one, two in pairs]), over_runs(gains)
    means = [over_runs([pair[place].values[metric] for pair in pairs]).value for place in (0, 1)]
    about = f"{metric} [{a.metrics[metric]['unit']}, {ARROWS[better]}]"
    figures = [f"{mean:.4g}" for mean in means]
    return [pairs[0][0].label, about, str(len(pairs)), *figures, shown(change), _verdict(gain, a.name, b.name)]


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def compared(a: Side, b: Side) -> list[list[str]]:
    """Every method and metric that both sides have: means, b - a with its 95 % interval, and who is better.

    Raises:
        UserError: they have no model, dataset, classes and seed in common.
    """
    common = [cell for cell in a.points if cell in b.points]
    if not common:
        what = f"{a.name} and {b.name} have no model, dataset, forget class and seed in common"
        raise UserError(f"{what}: compare runs that differ in something else")
    methods = dict.fromkeys(name for cell in common for name in a.points[cell] if name in b.points[cell])
    metrics = [metric for metric in a.metrics if metric in b.metrics]
    rows = [_row(a, b, method, metric) for method in methods for metric in metrics]
    head = ["method", "metric", "pairs", a.name, b.name, f"{b.name} - {a.name}", "95 % interval says"]
    return [head, *(row for row in rows if row)]


def in_words(rows: list[list[str]], a: str, b: str) -> str:
    """How often each side is better, and on what."""
    said = []
    for winner in (a, b):
        won = [f"{row[0]} on {row[1].split(' [')[0]}" for row in rows[1:] if row[-1] == f"{winner} better"]
        said.append(f"{winner} is better {len(won)} times" + (f" ({', '.join(won)})" if won else ""))
    return f"Of {len(rows) - 1} comparisons {said[0]}; {said[1]}; the others show no difference."
