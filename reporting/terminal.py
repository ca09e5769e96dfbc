"""Make the table that a run prints: the most important columns, as many as the terminal is wide.

All other columns, and every interval, are in the table's files and on the page.
"""

import textwrap

from core.observe import visible
from reporting.families import Run
from reporting.tables import Best, chosen_in, known

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


def _kept(widths: dict[str, int], width: int) -> list[str]:
    """Return the columns that fit beside the method, which takes up to a third of the width."""
    kept = list(widths)
    for name in DROPPED_FIRST:
        if width // 3 + sum(len(GAP) + widths[one] for one in kept) > width and name in kept:
            kept.remove(name)
    return kept


def terminal_table(records: Run, width: int) -> str:
    """Return a run's methods, one row each, for a terminal.

    Args:
        records: of one run.
        width: columns of the terminal. A number is never cut: where too few are left for it, its column is left out, by
            DROPPED_FIRST; names and verdicts go on in the next line.

    Returns:
        Lines of at most `width` signs (of at least 32).
    """
    width = max(width, 32)
    points = [found[0] for found in chosen_in([records]).values()]
    cells = [_figures(point) for point in points]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in COLUMNS}
    kept = _kept(widths, width)
    taken = sum(len(GAP) + widths[name] for name in kept)
    names = [visible(point.label) for point in points]
    room = width - taken - len(GAP) - LEAST_VERDICT  # for names, if the verdict is to stand beside the values
    first = min(max(len("method"), *map(len, names)), room if room >= LEAST_NAME else width - taken)
    left = width - taken - first - len(GAP)
    beside = left >= LEAST_VERDICT

    def row(name: str, texts: dict[str, str], said: str) -> list[str]:
        verdict = textwrap.wrap(said, left if beside else width - len(INDENT), break_long_words=False)
        numbers = "".join(f"{GAP}{texts[column]:>{widths[column]}}" for column in kept)
        parts = textwrap.wrap(name, first) or [""]
        count = max(len(parts), len(verdict)) if beside else len(parts)
        lines = []
        for place in range(count):
            part = parts[place] if place < len(parts) else ""
            word = verdict[place] if beside and place < len(verdict) else ""
            lines.append(f"{part:<{first}}{numbers if place == 0 else ' ' * taken}{GAP}{word}".rstrip())
        return lines if beside else [*lines, *(INDENT + line for line in verdict)]

    head = row("method", {name: name for name in COLUMNS}, "verdict" if beside else "")
    body = [line for point, name, texts in zip(points, names, cells, strict=True)
            for line in row(name, texts, _said(point))]  # fmt: skip
    return "\n".join([*head, "-" * max(map(len, (*head, *body))), *body]) + "\n"


def _said(point: Best) -> str:
    """Return a method's verdicts, in words."""
    return ", ".join(one["key"] for one in point.verdicts)
