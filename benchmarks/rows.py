"""Rows of the tables on unlearning: a way to forget, measured on some classifiers, and how a table is printed."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.zoo import SINGLES, Case, Cell, Recipe, Theta, cases, mean

from scipy.stats import t as student

from core.config import PROJECT_ROOT
from reporting.write import as_text
from unlearn.requests import Checkpoint

SHIPPED = PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors"
SHIPPED_RESNET = PROJECT_ROOT / "pretrained" / "gcn_resnet.safetensors"
BATCHES, KAPPAS = (512, 128), (64, 128, 200, 256, 400)
RESNET_KAPPAS = (164, 328, 655, 1638)  # 0.25, 0.5, 1 and 2.5 % of 65,536


@dataclass
class Bench:
    """What all sections share."""

    output_dir: Path
    full: bool
    tables: dict[str, tuple[str, list[list[str]]]] = field(default_factory=dict)
    """For docs/results/, by name: over what the values are taken, and head and body."""

    def recipes(self, seeds: Iterable[int], batches: Sequence[int] = BATCHES) -> list[Recipe]:
        """Fashion-MNIST MLPs; the short form has one seed."""
        seeds = list(seeds) if self.full else list(seeds)[:1]
        return [Recipe(size, seed) for size in batches for seed in seeds]

    @property
    def judged(self) -> list[Case]:
        """Classifiers for the report."""
        return cases(self.recipes(range(5)), self.output_dir)

    @property
    def chosen_on(self) -> list[Case]:
        """Classifiers for choices."""
        return cases(self.recipes([50]), self.output_dir)

    @property
    def teachers(self) -> list[Checkpoint]:
        """What the graph network learns on."""
        return [case.checkpoint for case in cases(self.recipes(range(100, 104)), self.output_dir)]


@dataclass(frozen=True)
class Row:
    """A method on some checkpoints."""

    name: str
    cells: dict[str, list[Cell]]
    """By checkpoint."""


def summary(groups: Sequence[Sequence[Cell]]) -> str:
    """`forget +- interval (worst class) / retain` of cells by checkpoint."""
    means = [mean(cell.forget for cell in group) for group in groups]
    spread = ""
    if len(means) > 2:
        half = student.ppf(0.975, len(means) - 1) * statistics.stdev(means) / len(means) ** 0.5
        spread = f" +- {half:.2f}"
    classes = {cell.classes for group in groups for cell in group}
    worst = max(mean(cell.forget for group in groups for cell in group if cell.classes == c) for c in classes)
    retain = mean(cell.retain for group in groups for cell in group)
    return f"{mean(means):.2f}{spread} ({worst:.1f}) / {retain:.1f}"


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
        groups = list(row.cells.values())
        line = [row.name]
        for kappa in kappas:
            at = [[cell for cell in group if cell.kappa in (kappa, 0)] for group in groups]
            line.append(summary(at) if all(at) else "-")
        flat = [cell for group in groups for cell in group]
        if more:
            there = [cell for cell in flat if cell.kappa in (probe, 0)]
            distances = [cell.kl for cell in there if cell.kl is not None]
            line += [f"{mean(cell.probability for cell in there):.4f}", f"{mean(distances):.2f}" if distances else "-"]
        lines.append([*line, f"{1e3 * statistics.median(cell.seconds for cell in flat):.0f}"])
    print(f"\n{title}\n\n{as_text(lines)}", flush=True)
    requests = {cell.classes for group in groups for cell in group}
    return f"{title}; {len(requests)} requests x {len(groups)} checkpoints", lines


def on(judged: Sequence[Case], how: Callable[[Case], list[Cell]]) -> dict[str, list[Cell]]:
    """Cells by checkpoint."""
    return {case.recipe.name: how(case) for case in judged}


def judged_rows(
    judged: Sequence[Case], ways: dict[str, Theta], kappas: Sequence[int], split: str, kl: bool = False
) -> list[Row]:
    """A row for each way, all classes one by one."""

    def cells(way: Theta) -> dict[str, list[Cell]]:
        return on(judged, lambda case: case.run(way, kappas, SINGLES, split, kl))

    return [Row(name, cells(way)) for name, way in ways.items()]
