"""The tables on unlearning: a row is a way to forget, measured on some classifiers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.classifiers import SINGLES, Classes, Recipe, Score, TrainedClassifier, Way, classifiers

from core.config import PROJECT_ROOT
from core.intervals import Cell, over_seeds, within_seeds
from reporting.write import as_text
from unlearn.requests import FrozenHead

SHIPPED = PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors"
SHIPPED_RESNET = PROJECT_ROOT / "pretrained" / "gcn_resnet.safetensors"
BATCHES, KAPPAS = (512, 128), (64, 128, 200, 256, 400)
RESNET_KAPPAS = (164, 328, 655, 1638)  # 0.25, 0.5, 1 and 2.5 % of 65,536


@dataclass
class Scope:
    """How much is measured, where classifiers are kept, and the tables that were made."""

    output_dir: Path
    full: bool
    tables: dict[str, tuple[str, list[list[str]]]] = field(default_factory=dict)
    """For docs/results/, by name: over what the values are taken, and head and body."""

    def recipes(self, seeds: Iterable[int], batches: Sequence[int] = BATCHES) -> list[Recipe]:
        """Fashion-MNIST MLPs; the short form has one seed."""
        seeds = list(seeds) if self.full else list(seeds)[:1]
        return [Recipe(size, seed) for size in batches for seed in seeds]

    @property
    def judged(self) -> list[TrainedClassifier]:
        """Classifiers for the report."""
        return classifiers(self.recipes(range(5)), self.output_dir)

    @property
    def chosen_on(self) -> list[TrainedClassifier]:
        """Classifiers for choices."""
        return classifiers(self.recipes([50]), self.output_dir)

    @property
    def teachers(self) -> list[FrozenHead]:
        """What the graph network learns on."""
        return [one.stages.head for one in classifiers(self.recipes(range(100, 104)), self.output_dir)]


@dataclass(frozen=True)
class Row:
    """A way to forget on some classifiers."""

    name: str
    scores: dict[str, list[Score]]
    """By classifier."""


def mean_forget(scores: Iterable[Score]) -> float:
    """Mean forget score, percent."""
    return statistics.fmean(score.forget for score in scores)


def summary(groups: Sequence[Sequence[Score]]) -> str:
    """`forget +- interval (worst class) / retain` of scores by classifier."""
    cells = {
        Cell(seed=place, classes=score.classes): score.forget for place, group in enumerate(groups) for score in group
    }
    mean, spread = within_seeds(cells).mean, ""
    if len(groups) > 2:
        spread = f" +- {over_seeds(cells).high - mean:.2f}"
    scores = [score for group in groups for score in group]
    worst = max(mean_forget(score for score in scores if score.classes == c) for c in {s.classes for s in scores})
    retain = statistics.fmean(score.retain for score in scores)
    return f"{mean:.2f}{spread} ({worst:.1f}) / {retain:.1f}"


def show(title: str, rows: Sequence[Row], kappas: Sequence[int], more: bool = False) -> tuple[str, list[list[str]]]:
    """Print one table; return its title, with over what it averages, and its cells.

    Args:
        kappas: a column each.
        more: whether to add probability and KL at the last but one kappa.
    """
    probe = kappas[-2] if len(kappas) > 1 else kappas[-1]
    head = ["", *(f"kappa {kappa}" for kappa in kappas)]
    head += [f"p at {probe}", f"KL at {probe}"] if more else []
    lines = [[*head, "ms"]]
    for row in rows:
        groups = list(row.scores.values())
        line = [row.name]
        for kappa in kappas:
            at = [[score for score in group if score.kappa in (kappa, 0)] for group in groups]
            line.append(summary(at) if all(at) else "-")
        flat = [score for group in groups for score in group]
        if more:
            there = [score for score in flat if score.kappa in (probe, 0)]
            distances = [score.kl for score in there if score.kl is not None]
            line.append(f"{statistics.fmean(score.probability for score in there):.4f}")
            line.append(f"{statistics.fmean(distances):.2f}" if distances else "-")
        lines.append([*line, f"{1e3 * statistics.median(score.seconds for score in flat):.0f}"])
    print(f"\n{title}\n\n{as_text(lines)}", flush=True)
    requests = {score.classes for group in groups for score in group}
    return f"{title}; {len(requests)} requests x {len(groups)} classifiers", lines


def row_of(
    name: str,
    way: Way,
    judged: Sequence[TrainedClassifier],
    kappas: Sequence[int],
    split: str = "test",
    requests: Sequence[Classes] = SINGLES,
) -> Row:
    """Measure a way on each classifier, for each request and kappa."""
    return Row(name, {one.recipe.name: one.measure(way, kappas, requests, split) for one in judged})


def rows_of(
    ways: Mapping[str, Way], judged: Sequence[TrainedClassifier], kappas: Sequence[int], split: str = "test"
) -> list[Row]:
    """Return a row for each way, all classes one by one."""
    return [row_of(name, way, judged, kappas, split) for name, way in ways.items()]
