"""Write the tables of README.md and docs/ from the JSON files in docs/results/.

    uv run benchmarks/docs_tables.py

`docs/results/NAME.json` holds one table: its columns, rows and n, the command that measured it and the commit of the
code. A page shows the table between the lines `<!-- table: NAME -->` and `<!-- end -->`; what stands there is
overwritten. A benchmark with `--docs` writes its JSON and then rewrites the pages. Some JSON files hold no values of
their own but show columns, and all rows or some, of another table (`"of": NAME`), so that every value stands in one
file.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401 - first, because it sets what OpenMP reads

from core.artifacts import read_json, write_json, write_text
from core.config import PROJECT_ROOT, UserError
from core.hashes import provenance
from reporting.write import in_markdown

RESULTS = PROJECT_ROOT / "docs" / "results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
UNBROKEN = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"  # a value and its interval stay on one line of a cell
NOT_SHOWN = (
    "--json",
    "--measured",
    "--models",
    "--networks",
    "--curve",
    "--markdown",
    "--output-dir",
    "--masks",
    "--root",
)  # flags that change no value of a table


def pages() -> list[Path]:
    """Return the pages that may show tables."""
    return [PROJECT_ROOT / "README.md", PROJECT_ROOT / "EXPERIMENTS.md", *sorted(RESULTS.parent.glob("*.md"))]


def load(name: str) -> dict:
    """Read a table; of one that shows a part of another, look that part up.

    Raises:
        UserError: there is no such table, or the other table lacks a row or column.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"a page shows the table {name}, but there is no {path}: measure it with --docs, or drop it")
    table = read_json(path, foreign=True)
    if "of" not in table:
        return table
    whole, columns = load(table["of"]), table["columns"]
    lacking = [column for column in columns if column not in whole["columns"]]
    by_name = {row[0]: row for row in whole["rows"]}
    chosen = table.get("rows", list(by_name))
    lacking += [row for row in chosen if row not in by_name]
    if lacking:
        raise UserError(f"{path} shows {', '.join(lacking)}, which {table['of']} lacks: name what is there")
    places = [whole["columns"].index(column) for column in columns]
    rows = [[by_name[row][place] for place in places] for row in chosen]
    return whole | {"columns": list(columns.values()), "rows": rows}


def rendered(table: dict) -> str:
    """Return a table as Markdown, with n, command and commit below it, and whether its values were copied by hand."""
    rows = (table["columns"], *table["rows"])
    head, *body = [[in_markdown(cell).replace(" ± ", UNBROKEN) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    command = f"`{table['command']}`" if table["command"].startswith("uv run") else table["command"]
    commit = f"commit {table['commit']}" if "commit" in table else f"first published in commit {table['published']}"
    cost = f", {table['cost']}" if "cost" in table else ""
    copied = "; transcribed" if table.get("transcribed") else ""
    return "\n".join([*lines, "", f"n: {table['n']}. Command: {command} ({commit}{cost}{copied}).", ""])


def refreshed(text: str) -> str:
    """Return a page with the tables between its markers written anew."""
    return TABLE.sub(lambda found: found[1] + rendered(load(found[2])) + found[4], text)


def refresh() -> None:
    """Rewrite every page whose tables differ from their JSON."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := refreshed(text)) != text:
            write_text(page, new)
            print(f"rewrote {page.relative_to(PROJECT_ROOT)}")


def command_of(words: Sequence[str]) -> str:
    """Return the command that a person types for these words of the process, without flags that change no value."""
    kept, skipped = [], False
    for word in words[1:]:
        if not skipped and word != "--docs" and word.partition("=")[0] not in NOT_SHOWN:
            kept.append("DIR" if Path(word).is_absolute() else word)  # a folder of this machine
        skipped = word in NOT_SHOWN
    return shlex.join(["uv", "run", f"benchmarks/{Path(words[0]).name}", *kept])


def publish(name: str, rows: Sequence[Sequence[str]], n: str, seeds: dict | None = None) -> None:
    """Write a measured table as JSON, and the pages that show it.

    Args:
        name: the table's name in the pages' markers.
        rows: the head and the body, one string a cell.
        n: over what the values are taken, e.g. "10 classes x 3 classifiers".
        seeds: by row and column, the mean of each seed: what intervals and tests over seeds can be computed from again.
    """
    code = provenance()
    commit = str(code["commit"])[:7] + (" with changes" if code["dirty"] else "")
    head, *body = [list(row) for row in rows]
    table = {"columns": head, "rows": body, "n": n, "command": command_of(sys.argv), "commit": commit}
    write_json(RESULTS / f"{name}.json", table if seeds is None else table | {"seeds": seeds})
    refresh()


if __name__ == "__main__":
    refresh()
