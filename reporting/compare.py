"""Compare runs: which is better on which metric, by paired differences with intervals over classifiers.

A *side* is some runs under one name: an output folder, or one run by its id. Two sides are paired run by run over the
same model, images, classes and seed, each method at its chosen point; what is not paired is named. A classifier that
was given must be the same file's content on both sides. No torch, no dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.choices import UserError, at_home
from core.intervals import Cell, Interval, difference, minus, same
from core.records import Metric, read_records
from reporting.families import SHORT, Run, dataset_of, differing, labels_of, runs_of
from reporting.tables import ARROWS, Best, Estimate, best_points, cell_of, known, over_cells, shown

Setting = tuple[str, str, tuple[int, ...], int]  # model, fingerprint of the images, classes, seed
Points = dict[str, Best]  # method -> its chosen point
Pair = tuple[Points, Points]
MOST_NAMED = 8  # runs that a message names


@dataclass(frozen=True)
class Side:
    """Some runs under one name, by setting."""

    name: str
    runs: dict[Setting, list[Run]]
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Comparison:
    """The comparison of two sides: the table, its conclusion in words, and the runs that it leaves out."""

    rows: list[list[str]]
    about: str


def side(name: str, runs: Sequence[Run]) -> Side:
    """Runs as one side."""
    settings: dict[Setting, list[Run]] = {}
    for run in runs:
        first = run[0]
        setting = (first["model"], first["images"], tuple(labels_of(first)), first["seed"])
        settings.setdefault(setting, []).append(run)
    metrics = {metric: about for run in runs for metric, about in run[0]["metrics"].items()}
    return Side(name, settings, {metric: about for metric, about in metrics.items() if about["first"]})


def find_side(name: str, output_dir: Path) -> Side:
    """Find a side by an output folder's name, or by (the beginning of) a run's id below `output_dir` or FOLDER/.

    Raises:
        UserError: there is neither, or the id is of several runs.
    """
    folder = at_home(Path(name))
    if folder.is_dir():
        runs = runs_of(read_records(folder))
        if not runs:
            raise UserError(f"there are no records below {folder}: make some with `uv run main.py --output-dir {name}`")
        return side(name, runs)
    where = folder.parent if "/" in name and folder.parent.is_dir() else output_dir
    runs = runs_of(read_records(where))
    found = [run for run in runs if run[0]["run"].startswith(folder.name)]
    if len(found) != 1:
        ids = ", ".join(sorted(run[0]["run"] for run in runs)) or "none"
        what = f"{name} is no folder and the id of {len(found)} runs below {where}"
        raise UserError(f"{what}: give an output folder or one of the runs {ids}")
    return side(name, found)


# --- which runs are paired --------------------------------------------------------------------------------


def _classifier(run: Run) -> str | None:
    """Return the content of a classifier that was given; None where the run trained its own."""
    return run[0]["given"]["classifier"]


def _fits(one: Run, other: Run) -> bool:
    """Return whether two runs may be paired: both trained their classifier, or both were given the same one."""
    return _classifier(one) == _classifier(other) or one[0]["classifier_sha256"] == other[0]["classifier_sha256"]


def _pairs(a: Side, b: Side) -> list[tuple[Run, Run]]:
    """Pair runs of the same setting whose classifiers may be paired.

    Raises:
        UserError: nothing is paired, or one run could be with several.
    """
    found = []
    for setting in a.runs:
        ours, theirs = a.runs[setting], b.runs.get(setting, [])
        fitting = [(run, other) for run in ours for other in theirs if _fits(run, other)]
        for run, other in fitting:
            _only_one(a, [one for one, two in fitting if two is other])
            _only_one(b, [two for one, two in fitting if one is run])
        found += fitting
    if not found:
        raise UserError(f"{a.name} and {b.name} have nothing to pair: {_why(a, b)}")
    return found


def _only_one(one: Side, runs: Sequence[Run]) -> None:
    """Raise `UserError` if a side has several runs that could be paired with the same run."""
    if len(runs) == 1:
        return
    first = runs[0][0]
    apart = differing([[run] for run in runs])
    ids = [
        f"{run[0]['run']} ({', '.join(f'{name} {values[place]}' for name, values in apart.items()) or 'a repeat'})"
        for place, run in enumerate(runs)
    ]
    what = f"{one.name} has {len(runs)} runs of {first['model']} on {dataset_of(first)}, classes {labels_of(first)}"
    raise UserError(
        f"{what}, seed {first['seed']}: {'; '.join(ids)}: name the one to compare, as {one.name}/ID or with "
        "--output-dir and its ID"
    )


def _images(run: Run) -> str:
    first = run[0]
    parts = "/".join(str(count) for count in first["split_sizes"].values())
    size = f"{first['num_classes']} classes, {parts} images"
    return f"{dataset_of(first)} ({size}, {first['images'][:SHORT]})"


def _why(a: Side, b: Side) -> str:
    """Name what keeps two sides apart: the first property that no run of one shares with a run of the other."""
    told = {
        "models": lambda run: run[0]["model"],
        "images": _images,
        "classes to forget": lambda run: str(labels_of(run[0])),
        "seeds": lambda run: str(run[0]["seed"]),
        "given classifiers": lambda run: (_classifier(run) or "none: it trains its own")[:SHORT],
    }
    keys = {**told, "images": lambda run: run[0]["images"], "given classifiers": _classifier}
    both = [[run for runs in one.runs.values() for run in runs] for one in (a, b)]
    for name, say in told.items():
        held = [{keys[name](run) for run in runs} for runs in both]
        if not held[0] & held[1]:
            has = [", ".join(dict.fromkeys(map(say, runs))) for runs in both]
            return f"their {name} differ, {a.name} has {has[0]}; {b.name} has {has[1]}"
    return "no run of one has the model, images, classes, seed and given classifier of a run of the other"


def _left_out(one: Side, other: Side, paired: Sequence[Run]) -> str:
    """Return the runs of a side that have no counterpart."""
    ids = {run[0]["run"] for run in paired}
    rest = [run[0] for runs in one.runs.values() for run in runs if run[0]["run"] not in ids]
    named = [f"{first['run']} (classes {labels_of(first)}, seed {first['seed']})" for first in rest[:MOST_NAMED]]
    more = f" and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
    return f"Of {one.name} without a counterpart in {other.name}: {', '.join(named)}{more}." if rest else ""


# --- what a pair says -------------------------------------------------------------------------------------


def _points(run: Run) -> Points:
    return {best.method: best for best in best_points(run)}


def _loss(points: Points, method: str, metric: str, better: str) -> float | None:
    """Measure how far a method is from the best possible value: smaller is better. None: not known."""
    value = points[method].values.get(metric)
    target = points["retrain"].values.get(metric) if "retrain" in points else None
    if better == "retrain":
        return abs(minus(value, target)) if known(value) and known(target) else None
    if not known(value):
        return None
    return -value if better == "higher" else value


def _one_pair(a: Best, b: Best, metric: str) -> Estimate:
    """Compute b - a of a single pair, with Newcombe's interval if both have one."""
    mine, theirs = a.interval(metric), b.interval(metric)
    if not mine or not theirs:
        return Estimate(minus(b.values[metric], a.values[metric]), None, None, 1)
    found = difference(Interval(**theirs), Interval(**mine))
    return Estimate(found.value, found.low, found.high, 1)


def _verdict(gain: Estimate, pairs: int, a: str, b: str) -> str:
    """Say who is better, from b's gain over a (positive: b is better) in some pairs."""
    if gain.low is None or gain.high is None:
        first = "equal" if same(gain.value, 0) else f"{b if gain.value > 0 else a} ahead"
        return f"{first}; one {'pair' if pairs == 1 else 'classifier'}, no interval"
    return f"{b} better" if gain.low > 0 else f"{a} better" if gain.high < 0 else "no difference shown"


def _row(pairs: Sequence[Pair], sides: tuple[Side, Side], method: str, metric: str) -> list[str] | None:
    """Compare one method on one metric, as a row; None unless both sides have a value in some pair."""
    a, b = sides
    better = a.metrics[metric]["better"]
    both = [pair for pair in pairs if all(method in points for points in pair)]
    losses = [[_loss(points, method, metric, better) for points in pair] for pair in both]
    kept = [(pair, loss) for pair, loss in zip(both, losses, strict=True) if None not in loss]
    if not kept:
        return None
    found = [(one[method], two[method]) for (one, two), _ in kept]
    cells = [_cell(one, two) for one, two in found]
    gains = [minus(one, two) for _, (one, two) in kept]  # ty: ignore[invalid-argument-type]
    if len(found) == 1:
        change = _one_pair(*found[0], metric)
        signs = {"higher": (change.low, change.high), "lower": (_negative(change.high), _negative(change.low))}
        gain = Estimate(gains[0], *signs.get(better, (None, None)), 1)
    else:
        changes = [minus(two.values[metric], one.values[metric]) for one, two in found]
        change, gain = (over_cells(dict(zip(cells, values, strict=True))) for values in (changes, gains))
    sides_values = [[pair[place].values[metric] for pair in found] for place in (0, 1)]
    means = [over_cells(dict(zip(cells, values, strict=True))).value for values in sides_values]
    about = f"{metric} [{a.metrics[metric]['unit']}, {ARROWS[better]}]"
    counts = [str(len(found)), str(len({cell.seed for cell in cells}))]
    numbers = [f"{mean:.4g}" for mean in means]
    said = _verdict(gain, len(found), a.name, b.name)
    return [found[0][0].label, about, *counts, *numbers, shown(change), said]


def _cell(one: Best, other: Best) -> Cell:
    """Return where a pair stands: pairs that share both sides' classifiers are no independent repeats."""
    ours, theirs = cell_of(one.record), cell_of(other.record)
    return Cell(seed=(ours.seed, theirs.seed), classes=ours.classes)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def compared(a: Side, b: Side) -> Comparison:
    """Compare all methods and metrics that both sides have: means, b - a with its 95 % interval, who is better.

    Classes of one classifier are averaged first; the interval is over classifiers.

    Raises:
        UserError: they have nothing to pair, or one has several runs of the same model, images, classes and seed.
    """
    pairs = _pairs(a, b)
    points = [(_points(one), _points(two)) for one, two in pairs]
    methods = dict.fromkeys(name for one, two in points for name in one if name in two)
    metrics = [metric for metric in a.metrics if metric in b.metrics]
    rows = [_row(points, (a, b), method, metric) for method in methods for metric in metrics]
    head = ["method", "metric", "pairs", "classifiers", a.name, b.name, f"{b.name} - {a.name}", "95 % interval says"]
    table = [head, *(row for row in rows if row)]
    ours, theirs = ([pair[place] for pair in pairs] for place in (0, 1))
    apart = [f"{name} ({one or '-'} | {two or '-'})" for name, (one, two) in differing([ours, theirs]).items()]
    said = [
        in_words(table, a.name, b.name),
        f"{a.name} | {b.name} differ in: {', '.join(apart) or 'nothing that a run records'}.",
        _left_out(a, b, ours),
        _left_out(b, a, theirs),
    ]
    return Comparison(table, " ".join(filter(None, said)))


def in_words(rows: list[list[str]], a: str, b: str) -> str:
    """Say how often each side is better, and on which metrics."""
    said = []
    for winner in (a, b):
        won = [f"{row[0]} on {row[1].split(' [')[0]}" for row in rows[1:] if row[-1] == f"{winner} better"]
        said.append(f"{winner} is better {len(won)} times" + (f" ({', '.join(won)})" if won else ""))
    ahead = sum(row[-1].endswith("no interval") and " ahead; " in row[-1] for row in rows[1:])
    if ahead:
        said.append(f"in {ahead} one is ahead in a single pair or classifier, without an interval")
    return f"Of {len(rows) - 1} comparisons {'; '.join(said)}; the others show no difference."
