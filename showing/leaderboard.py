"""The leaderboard as one HTML file that needs nothing else: methods by dataset and model, and by the question asked.

Style, tables and scripts are those of the report's page (`reporting/templates`). Nothing here needs torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.artifacts import write_text
from core.config import PROJECT_ROOT, UserError
from core.records import Metric, Record, read_records
from reporting.families import Run, runs_of
from reporting.page import FIRST, LATER, in_parts, levels_of, sheet, template
from reporting.tables import ARROWS, Best, budget, estimate, known, over_cells, shown, values_of
from reporting.write import Lead
from showing.standings import Board, Row, Source, boards, looks_inside

TEMPLATES = PROJECT_ROOT / "showing" / "templates"
PAGE = Path("reports/leaderboard.html")
ACROSS = 3  # columns of values beside each other where all are shown: as many as 420 pixels hold
MOST_SHORT = 7  # digits of a commit, where people read it
FEATURES = (
    *("probe_layers_gap", "relearn_area_10", "forget_auroc", "probe_gap", "relearn_10", "fresh_head_10"),
    "knn_layers_gap",
)
"""Metrics that look inside, in the order in which they are shown; all others follow."""
COSTS = ("seconds", "weights_changed", "seconds_offline", "seconds_alone", "edit_bytes")
COUNTED = ("weights_changed", "edit_bytes")  # whole numbers, shown as such
SECONDS = "s"


@dataclass(frozen=True)
class Question:
    """What a reader may ask of methods, and the columns that answer.

    Args:
        name: as it is chosen. title: of the table. about: a sentence below the title.
        columns: of a board, by priority.
        ranks: metrics or costs that rows are ordered by: the one that most rows have, of several the first.
        levels: column -> level, of some columns (`reporting.page.LEVELS`).
    """

    name: str
    title: str
    about: str
    columns: Callable[[Board], list[str]]
    ranks: tuple[str, ...]
    levels: Callable[[Sequence[str]], dict[str, int]]


def _records(board: Board) -> list[Record]:
    return [record for source in board.sources for run in source.runs for record in run]


def _of_answers(board: Board) -> list[str]:
    records = _records(board)
    own = [name for name in board.metrics if not looks_inside(records, name)]
    others = [name for name in own if name not in FIRST + LATER]
    others.sort(key=lambda name: not board.metrics[name]["first"])
    return [name for name in (*FIRST, *others, *LATER) if name in own]


def _of_features(board: Board) -> list[str]:
    records = _records(board)
    own = [name for name in board.metrics if looks_inside(records, name)]
    own = [*(name for name in FEATURES if name in own), *(name for name in own if name not in FEATURES)]
    return sorted(own, key=lambda name: -_measured(board, name))


def _measured(board: Board, name: str) -> int:
    """Count the rows that have a value of a metric or cost."""
    return sum(known(row.points[0].values.get(name)) for row in board.rows)


def _of_cost(board: Board) -> list[str]:
    return [name for name in COSTS if any(name in row.points[0].values for row in board.rows)]


def _by_place(columns: Sequence[str]) -> dict[str, int]:
    """Three columns in any case, three more on a desktop, the rest below."""
    return {name: 1 if place < 3 else 3 if place < 6 else 4 for place, name in enumerate(columns)}


QUESTIONS = (
    Question(
        "outputs",
        "Outputs: does it forget, and keep the rest?",
        "What the classifier answers.",
        _of_answers,
        ("avg_gap",),
        levels_of,
    ),
    Question(
        "features",
        "Features: is the class still inside?",
        "Probes, held-back logits and relearning: the features of a class that is only suppressed are still there.",
        _of_features,
        ("probe_layers_gap", "probe_gap"),
        _by_place,
    ),
    Question(
        "cost",
        "Cost: how long, and how much is changed?",
        "Seconds of the machine that made the runs: compare rows that were made together.",
        _of_cost,
        ("seconds",),
        _by_place,
    ),
)


def _about(board: Board, name: str) -> tuple[str, str]:
    """Return (unit, which way is better) of a metric or a cost."""
    about: Metric | None = board.metrics.get(name)
    if about:
        return about["unit"], about["better"]
    return ("" if name in COUNTED else SECONDS), "lower"


def _text(row: Row, name: str) -> str:
    """Return a cell: the mean with its interval, a range for whole numbers."""
    points: list[Best] = row.points
    if name not in COSTS:
        return shown(estimate(points, name))
    cells = values_of(points, name)
    if name in COUNTED:
        return budget([int(value) for value in cells.values()])
    return shown(over_cells(cells)) if cells else "-"


def _heading(board: Board, name: str) -> str:
    unit, better = _about(board, name)
    return f"{name} [{', '.join(part for part in (unit, ARROWS[better]) if part)}]"


def _where(place: int, source: Source) -> str:
    """Name the paragraph that says how a source was made, within the page."""
    return f"source-{place}-{source.number}"


def _noted(table: dict, rows: Sequence[Row], place: int) -> dict:
    """Write below each method on how much its row rests, with a link to how that was made."""
    several = len({row.source.number for row in rows}) > 1
    for cells, row in zip(table["rows"], rows, strict=True):
        link = row.source.commits[0][:MOST_SHORT] + (f" ({row.source.number})" if several else "")
        cells[0] |= {"note": row.source.count, "href": f"#{_where(place, row.source)}", "link": link}
    return table


def _tables(board: Board, question: Question, place: int) -> dict | None:
    """Return a question's tables of a board: what is shown at once, which of these columns a narrow screen hides, and
    all other columns; None: nothing answers it.
    """
    columns = question.columns(board)
    if not columns:
        return None
    first = max(question.ranks, key=lambda name: _measured(board, name))
    rank = first if _measured(board, first) else None
    rows = board.ranked(rank, _about(board, rank)[1] if rank else "lower")
    best = {name: board.leading(name, _about(board, name)[1]) for name in columns}

    def cell(row: Row, name: str) -> str:
        text = _text(row, name)
        return Lead(text) if (row.method, row.source.number) in best[name] else text

    texts = [["method", *(_heading(board, name) for name in columns)]]
    texts += [[row.label, *(cell(row, name) for name in columns)] for row in rows]
    levels = question.levels(columns) | {"method": 1}
    order = f"ordered by {rank}" if rank else "in the order of the records, as nothing was measured to order by"
    about = f"{board.model} on {board.dataset}, {order}"

    def part(fits: Callable[[int], bool]) -> list[list[str]]:
        places = [0, *(at for at, name in enumerate(columns, 1) if fits(levels.get(name, 3)))]
        return [[row[at] for at in places] for row in texts]

    table = _noted(sheet(part(lambda level: level < 4), about, levels), rows, place)
    return {
        "name": question.name,
        "title": question.title,
        "about": question.about,
        "table": table | {"more": False},
        "hidden": in_parts(part(lambda level: level in (2, 3)), 1, "columns that a narrow screen hides", ACROSS),
        "every": in_parts(part(lambda level: level == 4), 1, "other columns", ACROSS),
    }


def _made(source: Source, place: int) -> dict:
    """Return how a source was made, in words."""
    labels = source.runs[0][0]["labels"]
    return {
        "id": _where(place, source),
        "number": source.number,
        "methods": ", ".join(labels[name] for name in source.methods),
        "count": source.count,
        "classes": ", ".join(source.classes),
        "seeds": ", ".join(map(str, source.seed_numbers)),
        "commits": ", ".join(source.commits),
        "plugins": ", ".join(source.plugins),
        "apart": source.apart,
        "commands": source.commands,
    }


def _board(board: Board, place: int) -> dict:
    tables = [_tables(board, question, place) for question in QUESTIONS]
    return {
        "model": board.model,
        "dataset": board.dataset,
        "apart": board.apart,
        "tables": [one for one in tables if one],
        "sources": [_made(source, place) for source in board.sources],
        "rows": len(board.rows),
    }


def as_leaderboard(runs: Sequence[Run]) -> str:
    """Return the page, as text."""
    made = boards(runs)
    records = [record for run in runs for record in run]
    definitions = {name: about for board in made for name, about in board.metrics.items()}
    costs = {name: text for record in records for name, text in record["costs"].items() if name in COSTS}
    return template("leaderboard.html", TEMPLATES).render(
        boards=[_board(board, place) for place, board in enumerate(made, 1)],
        questions=[(question.name, question.title.partition(":")[0]) for question in QUESTIONS],
        metrics=definitions,
        costs=costs,
        runs=len(runs),
    )


def write_leaderboard(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write the leaderboard of all records below some output folders, whole or not at all; return its path.

    Args:
        target: the file to write. None: PAGE below the first folder.

    Raises:
        UserError: there is no folder, or no record in one of them.
    """
    records: dict[str, Record] = {}
    for folder in folders:
        found = read_records(folder)
        if not found:
            raise UserError(f"there are no records below {folder}: make some with `uv run main.py`")
        records |= {record["id"]: record for record in found}
    if not records:
        raise UserError("no folder is named: name one that runs wrote to")
    target = target or folders[0] / PAGE
    write_text(target, as_leaderboard(runs_of(records.values())), lasting=False)
    return target
