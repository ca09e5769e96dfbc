"""Rows of a leaderboard, from records alone: the runs that a method's row rests on, its rank, and how to repeat it.

A row is a method on one model and one set of images. Whoever registers a method has its row: no name is listed here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from core.intervals import within_seeds
from core.observe import log
from core.records import Metric, Record
from reporting.families import SHORT, Run, as_told, classes_of, command, dataset_of, differing, families, family_key
from reporting.tables import REFERENCES, Best, cell_of, chosen_in, leaders, losses_of, metrics_of

BESIDE = ("eval.methods",)
"""What runs of a row may differ in beside seeds and classes: no value depends on which other methods were measured."""


@dataclass(frozen=True)
class Source:
    """Runs that are pooled, and that some rows of a board rest on.

    Args:
        number: in the board, from 1.
        runs: they differ in seed, classes and measured methods alone.
        methods: names of those whose rows rest on them.
        apart: the settings by which they differ from the board's other sources; "" if there are none.
    """

    number: int
    runs: list[Run]
    methods: list[str]
    apart: str

    @cached_property
    def cells(self) -> frozenset:
        """Where values stand: a classifier, and the classes that it was to forget."""
        return frozenset(cell_of(run[0]) for run in self.runs)

    @property
    def seeds(self) -> int:
        """How many classifiers there are, each of a seed of its own."""
        return len({cell.seed for cell in self.cells})

    @property
    def count(self) -> str:
        """ "3 seeds, 6 cells"."""
        return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in ((self.seeds, "seed"), (len(self.cells), "cell")))

    @property
    def classes(self) -> list[str]:
        """The classes that were to be forgotten, each request once: "class 0", "classes 0 and 3"."""
        return list(dict.fromkeys(classes_of(run[0]) for run in self.runs))

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds, in order."""
        return sorted({run[0]["seed"] for run in self.runs})

    @property
    def commits(self) -> list[str]:
        """The commits that the runs were made by, in full, and whether files differed from them."""
        made = (run[0]["provenance"] for run in self.runs)
        return list(dict.fromkeys(f"{one['commit'] or 'unknown'}{' (changed files)' * one['dirty']}" for one in made))

    @property
    def plugins(self) -> list[str]:
        """Names and SHA-256 of the plugins that the runs were made with."""
        made = (run[0]["provenance"]["plugins"] for run in self.runs)
        return list(dict.fromkeys(f"{name} (sha256 {value})" for one in made for name, value in one.items()))

    @property
    def commands(self) -> list[str]:
        """Commands for a shell that make the runs again; those that differ in the seed alone share one."""
        alike: dict[str, list[Run]] = {}
        for run in self.runs:
            alike.setdefault(command(run, [0]), []).append(run)
        return [
            command(runs[0], sorted({run[0]["seed"] for run in runs})) if len(runs) > 1 else command(runs[0])
            for runs in alike.values()
        ]


@dataclass(frozen=True)
class Row:
    """A method's chosen points in the runs of a source."""

    method: str
    label: str
    points: list[Best]
    source: Source

    @property
    def is_reference(self) -> bool:
        """Whether other methods are held against it."""
        return self.method in REFERENCES


@dataclass(frozen=True)
class Board:
    """All methods on one model and one set of images.

    Args:
        apart: "images 3fa9c1" where another board has the same model and dataset.
    """

    model: str
    dataset: str
    apart: str
    rows: list[Row]
    sources: list[Source]

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """What the records say of their metrics."""
        return metrics_of([run for source in self.sources for run in source.runs])

    @cached_property
    def _comparable(self) -> list[dict[str, Row]]:
        """Rows by method that were made by the same settings in the same cells, so that they may be paired."""
        found: dict[tuple, dict[str, Row]] = {}
        for row in self.rows:
            key = family_key(row.source.runs[0], BESIDE), row.source.cells
            found.setdefault(key, {})[row.method] = row
        return list(found.values())

    def leading(self, name: str, better: str) -> set[tuple[str, int]]:
        """Find (method, source) of the rows with the best value, or one that cannot be told from it, among those that
        may be paired.
        """
        found = set()
        for rows in self._comparable:
            best = leaders({method: row.points for method, row in rows.items()}, name, better)
            found |= {(method, rows[method].source.number) for method in best}
        return found

    def ranked(self, name: str | None, better: str) -> list[Row]:
        """Order rows: references, then by the mean of a metric or cost, the best first; rows without a value last.

        None: in the order of the records.
        """
        if name is None:
            return sorted(self.rows, key=lambda row: not row.is_reference)
        means: dict[tuple[str, int], float] = {}
        for rows in self._comparable:
            found = losses_of({method: row.points for method, row in rows.items()}, name, better)
            means |= {(one, rows[one].source.number): within_seeds(cells).mean for one, cells in found.items()}
        worst = float("inf")
        return sorted(
            self.rows,
            key=lambda row: (not row.is_reference, means.get((row.method, row.source.number), worst)),
        )


def looks_inside(records: Iterable[Record], name: str) -> bool:
    """Tell whether a metric looks inside a model, at features, held-back logits or relearning, instead of at answers.

    No setting and no point is chosen by such a metric, so that `Eval` measures it on test images alone: it is missing
    among the values on validation images.
    """
    asked = (record for record in records if name in record["metrics"])
    return any(name not in values for record in asked for values in record["validation"].values())


def boards(runs: Sequence[Run]) -> list[Board]:
    """Make a board of each model and set of images, in the order of dataset and model.

    Of runs of the same settings, seed and classes the one that started last counts, method by method; a run that no row
    rests on is named in the log.
    """
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((dataset_of(run[0]), run[0]["model"], run[0]["images"]), []).append(run)
    named, made = Counter((dataset, model) for dataset, model, _ in found), []
    for (dataset, model, images), own in sorted(found.items(), key=lambda one: one[0]):
        apart = f"images {images[:SHORT]}" if named[dataset, model] > 1 else ""
        sources = _sources(own)
        rows = [row for source in sources for row in _rows(source)]
        made.append(Board(model, dataset, apart, rows, sources))
    counted = {run[0]["run"] for board in made for source in board.sources for run in source.runs}
    for run in runs:
        if run[0]["run"] not in counted:
            log(f"leaderboard: run {run[0]['run']} is left out: a later one repeats it")
    return made


def _sources(runs: Sequence[Run]) -> list[Source]:
    """Pool runs, method by method, as some have measured other methods than others."""
    pooled: dict[tuple[str, ...], tuple[list[Run], list[str]]] = {}
    for name in dict.fromkeys(name for run in runs for name in run[0]["labels"]):
        own = [run for run in runs if name in run[0]["labels"]]
        for group in families(own, BESIDE, say=lambda _: None):
            key = tuple(run[0]["run"] for run in group)
            pooled.setdefault(key, (group, []))[1].append(name)
    groups = [group for group, _ in pooled.values()]
    found = {name: values for name, values in differing(groups).items() if name not in BESIDE}
    return [
        Source(number, group, names, apart)
        for number, ((group, names), apart) in enumerate(
            zip(pooled.values(), as_told(found, len(groups)), strict=True), 1
        )
    ]


def _rows(source: Source) -> list[Row]:
    points = chosen_in(source.runs)
    return [Row(name, points[name][0].label, points[name], source) for name in source.methods]
