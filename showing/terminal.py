"""Make the table that a run prints: the most important columns, as many as the terminal is wide.

All other columns, and every interval, are in the table's files and on the page.
"""

import textwrap
from collections.abc import Sequence

from core.observe import visible
from reporting.families import Run
from reporting.tables import Best, budget, chosen_in, known, over_cells, values_of

GAP = "  "
LEAST_VERDICT = 16  # columns; where fewer are left, the verdict has a line of its own below its row
LEAST_NAME = 19  # columns; longer names go on in the next line before the verdict has to leave the row
INDENT = "    "
COLUMNS = ("kappa", "forget %", "retain %", "Avg Gap", "weights", "seconds")
DROPPED_FIRST = ("seconds", "weights", "Avg Gap", "kappa")  # in this order, where the terminal is narrow


def _figures(point: Best) -> dict[str, str]:
    """Return a method's cells by column, at its chosen point."""

    def number(name: str, digits: str) -> str:
        value = point.values.get(name)
        return format(value, digits) if known(value) else "-"

    return {
        "kappa": "-" if point.kappa is None else f"{point.kappa:,}",
        "forget %": number("forget_score", ".1f"),
        "retain %": number("retain_score", ".1f"),
        "Avg Gap": number("avg_gap", ".2f"),
        "weights": number("weights_changed", ",.0f"),
        "seconds": number("seconds", ".3f"),
    }


def _kept(widths: dict[str, int], width: int, beside: int) -> list[str]:
    """Return the columns that fit, by DROPPED_FIRST, where the method takes `beside` columns."""
    kept = list(widths)
    for name in DROPPED_FIRST:
        if beside + sum(len(GAP) + widths[one] for one in kept) > width and name in kept:
            kept.remove(name)
    return kept


def _figures_over(points: Sequence[Best]) -> dict[str, str]:
    """Return a method's cells over the chosen points of several runs: mean and, over several seeds, 95 % interval."""

    def number(name: str, digits: str) -> str:
        cells = values_of(points, name)
        found = over_cells(cells) if cells else None
        if found is None:
            return "-"
        half = "" if found.high is None else f" ± {found.high - found.value:{digits}}"
        return f"{found.value:{digits}}{half}"

    weights = [int(value) for value in values_of(points, "weights_changed").values()]
    return {
        "kappa": budget([point.kappa for point in points]),
        "forget %": number("forget_score", ".1f"),
        "retain %": number("retain_score", ".1f"),
        "Avg Gap": number("avg_gap", ".2f"),
        "weights": budget(weights),
        "seconds": number("seconds", ".3f"),
    }


def terminal_table(records: Run, width: int) -> str:
    """Return a run's methods, one row each, for a terminal.

    Args:
        records: of one run.
        width: columns of the terminal. A number is never cut: where too few are left for it, its column is left out, by
            DROPPED_FIRST; names and verdicts go on in the next line.

    Returns:
        Lines of at most `width` signs (of at least 32).
    """
    points = [found[0] for found in chosen_in([records]).values()]
    said = [", ".join(one["key"] for one in point.verdicts) for point in points]
    return _laid_out([point.label for point in points], [_figures(point) for point in points], width, said)


def scores_table(runs: Sequence[Run], width: int) -> str:
    """Return the methods of several runs of a family, one row each: mean ± 95 % interval over the seeds.

    Classes of one seed are averaged first. Methods that some run lacks are left out; arguments as of `terminal_table`.
    """
    found = chosen_in(runs).values()
    return _laid_out([points[0].label for points in found], [_figures_over(points) for points in found], width)


def _laid_out(labels: Sequence[str], cells: list[dict[str, str]], width: int, said: Sequence[str] = ()) -> str:
    """Lay out rows of methods, with their verdicts if `said` has some."""
    width = max(width, 32)
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in COLUMNS}
    names = [visible(label) for label in labels]
    third = width // 3  # what a method and its verdict may take of the line
    kept = _kept(widths, width, third if said else min(third, max(map(len, names))))
    taken = sum(len(GAP) + widths[name] for name in kept)
    room = width - taken - (len(GAP) + LEAST_VERDICT if said else 0)  # for names, if the verdict is to stand beside
    first = min(max(len("method"), *map(len, names)), room if room >= LEAST_NAME else width - taken)
    left = width - taken - first - len(GAP)
    beside = left >= LEAST_VERDICT or not said

    def row(name: str, texts: dict[str, str], said: str) -> list[str]:
        verdict = textwrap.wrap(said, left if beside else width - len(INDENT), break_long_words=False) if said else []
        numbers = "".join(f"{GAP}{texts[column]:>{widths[column]}}" for column in kept)
        parts = textwrap.wrap(name, first) or [""]
        count = max(len(parts), len(verdict)) if beside else len(parts)
        lines = []
        for place in range(count):
            part = parts[place] if place < len(parts) else ""
            word = verdict[place] if beside and place < len(verdict) else ""
            lines.append(f"{part:<{first}}{numbers if place == 0 else ' ' * taken}{GAP}{word}".rstrip())
        return lines if beside else [*lines, *(INDENT + line for line in verdict)]

    head = row("method", {name: name for name in COLUMNS}, "verdict" if beside and said else "")
    body = [line for name, texts, words in zip(names, cells, said or [""] * len(names), strict=True)
            for line in row(name, texts, words)]  # fmt: skip
    return "\n".join([*head, "-" * max(map(len, (*head, *body))), *body]) + "\n"
