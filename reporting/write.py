"""Write tables as Markdown, CSV and LaTeX. Each format has one function that escapes a cell.

Names of classes, folders and methods come from users: what they hold must neither end a cell, nor be run by a
spreadsheet or by LaTeX, nor move a terminal's cursor.
"""

import csv
import io
import re
from collections.abc import Sequence

from core.observe import visible

PUNCTUATION = re.escape("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
SHOWN_VALUE = re.compile(rf"-|{NUMBER}( ± {NUMBER}| \[{NUMBER}, {NUMBER}\])?")  # what `tables.shown` gives, and numbers
# What a spreadsheet runs: it passes over spaces first, and takes the wide forms of East Asian keyboards as well.
RUN_BY_SPREADSHEETS = re.compile(r"'*\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|'*[\t\n]")
MARKDOWN = re.compile(
    r"[|`*~$]"
    rf"|\\(?=[{PUNCTUATION}]|$)"  # before anything else a backslash stands for itself
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word an underscore does
    r"|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[])"
)
TEX = {
    **{sign: f"\\{sign}" for sign in "%&_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "|": r"\textbar{}",
    "-": "-{}",  # two of them would be joined to a dash
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "<": "$<$",
    ">": "$>$",
}


class Lead(str):
    """A cell that is the best of its column, or cannot be told from it: bold where a format has bold."""

    __slots__ = ()


class Markdown(str):
    """A cell that is Markdown already, e.g. a link: written as it is in Markdown."""

    __slots__ = ()


def in_markdown(cell: str) -> str:
    """Escape a cell of a Markdown table: one line, without markup."""
    if isinstance(cell, Markdown):
        return cell
    text = MARKDOWN.sub(lambda found: "\\" + found[0], visible(cell))
    return f"**{text}**" if isinstance(cell, Lead) else text


def in_csv(cell: str) -> str:
    """Escape a cell of a CSV file: a formula gets an apostrophe in front; numbers stay numbers."""
    text = visible(cell, keep="\n\t")
    return f"'{text}" if RUN_BY_SPREADSHEETS.match(text) and not SHOWN_VALUE.fullmatch(text) else text


def in_latex(cell: str) -> str:
    """Escape a cell or caption of a LaTeX table: every character stands for itself."""
    number = SHOWN_VALUE.fullmatch(cell)
    special = {sign: text for sign, text in TEX.items() if not (number and sign == "-")}
    text = "".join(special.get(sign, sign) for sign in visible(cell))
    return f"\\textbf{{{text}}}" if isinstance(cell, Lead) else text


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it reads well on a terminal too."""
    cells = [[in_markdown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Return the same rows as CSV, without marks."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[in_csv(cell) for cell in row] for row in rows])
    return text.getvalue()


def as_latex(rows: Sequence[Sequence[str]], about: str) -> str:
    """Return the same rows as a LaTeX table (needs the packages booktabs and graphicx)."""
    lines = [" & ".join(map(in_latex, row)) + r" \\" for row in rows]
    # After the end of a row `[` would begin an option of it, and `*` be one.
    head, *body = [f"{{}}{line}" if line[0] in "[*" else line for line in lines]
    kinds = "l" + "r" * (len(rows[0]) - 1)
    lines = [r"\begin{table}", r"\centering", f"\\caption{{{in_latex(about)}}}", r"\resizebox{\linewidth}{!}{%"]
    lines += [f"\\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}}", r"\end{table}"]) + "\n"
