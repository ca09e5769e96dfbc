"""Tables in three formats: what is written is read back, and no cell is more than its text."""

import csv
import io
import re
import string

from hypothesis import example, given
from hypothesis import strategies as st

from core.observe import visible
from reporting.write import Lead, Markdown, as_csv, as_latex, as_text, in_csv, in_latex, in_markdown

MARKS = "|\\`*_~$<>&[]()#%{}^'\"=+-@\t\n\r\x1b\u202e\u2028\udc80 ,;±é0a"
TEXT = st.text(st.one_of(st.sampled_from(MARKS), st.characters(exclude_categories=["Cs"])), max_size=8)
ROWS = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(TEXT, min_size=width, max_size=width), min_size=2, max_size=4)
)
FIGURES = ("-3.2", "12", "1e-05", "-30 ± 14", "-0.5 [-1.2, 0.3]", "-", "+4", "-.5")


# --- Markdown ---------------------------------------------------------------------------------------------


def markdown_cells(line: str) -> list[str]:
    """The cells of a table's line as a reader of Markdown takes them; a mark in a cell is an error."""
    cells, signs = [""], iter(line)
    for sign in signs:
        if sign == "\\":
            after = next(signs)
            cells[-1] += after if after in string.punctuation else sign + after
        elif sign == "|":
            cells.append("")
        else:
            assert sign not in "`*~$", f"{sign} would be a mark in {line}"
            cells[-1] += sign
    assert (cells[0], cells[-1]) == ("", "")
    return [cell.strip() for cell in cells[1:-1]]


@given(ROWS)
@example([["a|b", "c\\"], ["\\|", "`x`"], ["new\nline", "\\\\"]])
def test_markdown_is_read_back(rows):
    lines = as_text(rows).split("\n")
    assert lines.pop() == ""
    assert set(lines.pop(1)) <= set("|-")
    assert [markdown_cells(line) for line in lines] == [[visible(cell).strip() for cell in row] for row in rows]


def test_marks_by_hand():
    assert in_markdown("forget_score [%, ↓]") == "forget_score [%, ↓]"  # nothing that needs it, nothing done
    assert in_markdown("_x_") == r"\_x\_"
    assert in_markdown("a|b\n") == r"a\|b\n"
    assert in_markdown("<b>, 1 < 2, &lt; & [a](b)") == r"\<b>, 1 < 2, \&lt; & [a\](b)"
    assert in_markdown(Lead("12")) == "**12**"
    assert in_markdown("**12**") == r"\*\*12\*\*"
    assert in_markdown(Markdown("[a](b)")) == "[a](b)"


# --- CSV --------------------------------------------------------------------------------------------------


def as_a_spreadsheet(cell: str) -> str:
    """The text that a spreadsheet shows; what it would run is an error."""
    if re.fullmatch(r"'+\s*[=+\-@＝＋－＠].*|'+[\t\n].*", cell, re.DOTALL):
        return cell[1:]
    number = re.fullmatch(r"[+-]?[\d.]+(e-?\d+)?( ± \S+| \[\S+, \S+\])?|-", cell)
    assert number or not cell.strip() or cell.lstrip()[0] not in "=+-@＝＋－＠", f"{cell!r} would be run"
    return cell


@given(ROWS)
@example([["=1+1", "+A1"], ["-3.2", "@SUM(A1)"], ["\t=1", "'=1"], [" =1", '=cmd|"/c calc"!A1'], ["-3+2", "-"]])
def test_csv_is_read_back(rows):
    found = list(csv.reader(io.StringIO(as_csv(rows), newline="")))
    assert [[as_a_spreadsheet(cell) for cell in row] for row in found] == [
        [visible(cell, keep="\n\t") for cell in row] for row in rows
    ]


def test_figures_stay_figures_in_csv():
    assert [in_csv(figure) for figure in FIGURES] == list(FIGURES)
    assert as_csv([[Lead("-3.2"), "**bold**"]]) == "-3.2,**bold**\n"


# --- LaTeX ------------------------------------------------------------------------------------------------

LATEX = {
    **{f"\\{sign}": sign for sign in "%&_#${}"},
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textasciigrave{}": "`",
    r"\textquotesingle{}": "'",
    r"\textbar{}": "|",
    "-{}": "-",
    **{f"${sign}$": sign for sign in "<>"},
    r"$\pm$": "±",
    r"$\uparrow$": "↑",
    r"$\downarrow$": "↓",
    r"$\rightarrow$": "→",
}
TOKEN = re.compile("|".join(map(re.escape, LATEX)) + r"|[^\\%&_#${}~^`'|\n]")


def latex_text(cell: str) -> str:
    """What LaTeX sets for a cell; a sign that does more is an error."""
    tokens = TOKEN.findall(cell)
    assert "".join(tokens) == cell
    return "".join(LATEX.get(token, token) for token in tokens)


@given(TEXT)
@example("\\input{x} 50 % of $a_b$ & #1 ~ ^ [x]")
def test_latex_is_read_back(cell):
    assert latex_text(in_latex(cell)) == visible(cell)


def test_a_row_in_latex_has_its_cells():
    lines = as_latex([["a & b", "c \\\\"], ["[x]", "-3 ± 2"]], "{").splitlines()
    assert r"a \& b & c \textbackslash{}\textbackslash{} \\" in lines
    assert r"{}[x] & -3 $\pm$ 2 \\" in lines
    assert r"\caption{\{}" in lines


# --- terminals --------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_spelled_out():
    assert visible("\x1b[31mred\x07\n") == r"\x1b[31mred\x07\n"
    assert visible("a\u202eb\u2028c\udc80") == r"a\u202eb\u2028c\x80"
    assert visible("café 日本 👩\u200d🔬") == "café 日本 👩\u200d🔬"
    assert visible("a\nb\t", keep="\n") == "a\nb" + r"\t"
