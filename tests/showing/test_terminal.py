"""The table that a run prints fits the terminal: columns go by priority, words wrap, numbers stay whole."""

import re

import pytest

from reporting.tables import table
from showing.terminal import COLUMNS, DROPPED_FIRST, scores_table, terminal_table
from tests.helpers.records import full

NUMBER = re.compile(r"(?<![\w.,])[\d,]+\.?\d*(?![\w.,])")


def records(name: str = "a method of a rather long name") -> list[dict]:
    """One run: three methods, one of them with several verdicts."""
    found = [full(5, kappa, 0.1, seed=0, run="r") for kappa in (10, 1000)]
    for record in found:
        record["labels"]["novel"] = name
        words = ("half forgotten", "collapsed", "worse than logit drop", "too random")
        record["verdicts"]["novel"] = [{"key": word, "text": word} for word in words]
    return found


@pytest.mark.parametrize("width", [32, 40, 60, 80, 100, 140])
def test_lines_fit_and_numbers_are_whole(width):
    lines = terminal_table(records(), width).splitlines()
    assert max(map(len, lines)) <= width
    wide = set(NUMBER.findall(terminal_table(records(), 200)))
    assert set(NUMBER.findall("\n".join(lines))) <= wide


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_columns_go_by_priority_and_no_word_is_lost(width):
    text = terminal_table(records(), width)
    head = re.split(r" {2,}", text.splitlines()[0])
    gone = [name for name in COLUMNS if name not in head]
    assert gone == [name for name in COLUMNS if name in DROPPED_FIRST[: len(gone)]]
    assert {"forget %", "retain %"} <= set(head)
    for word in ("forgotten", "collapsed,", "logit", "random", "method", "rather", "long"):
        assert word in text


def test_a_hundred_columns_hold_everything():
    text = terminal_table(records(), 100)
    assert re.split(r" {2,}", text.splitlines()[0]) == ["method", *COLUMNS, "verdict"]


def test_figures_are_those_of_the_table():
    rows = table(records())
    column = next(place for place, cell in enumerate(rows[0]) if cell.startswith("forget_score"))
    found = [re.split(r" {2,}", line)[2] for line in terminal_table(records("short"), 200).splitlines()[2:]]
    assert found == [f"{float(row[column].split()[0]):.1f}" for row in rows[1:]]


def test_scores_over_seeds_by_hand():
    """Seeds 0 and 1 at 10 and 20 %: 15 ± 12.7 · 5; the classes of seed 0 are averaged before."""
    runs = [[full(5, 100, forget, seed=seed, run=str(seed))] for seed, forget in ((0, 10.0), (1, 20.0))]
    line = next(line for line in scores_table(runs, 120).splitlines() if line.startswith("MIMU"))
    assert re.split(r" {2,}", line) == ["MIMU", "100", "15.0 ± 63.5", "78.0 ± 0.0", "-", "100", "0.500 ± 0.000"]
    again = full(5, 200, 30.0, seed=0, run="other") | {"forget_class": [2]}
    runs[0][0]["methods"]["mimu"]["forget_score"] = -10.0
    line = next(line for line in scores_table([*runs, [again]], 120).splitlines() if line.startswith("MIMU"))
    assert re.split(r" {2,}", line)[1:3] == ["100-200", "15.0 ± 63.5"]
    one = next(line for line in scores_table(runs[1:], 120).splitlines() if line.startswith("MIMU"))
    assert re.split(r" {2,}", one)[2] == "20.0"  # a single seed has no interval
    assert max(map(len, scores_table(runs, 60).splitlines())) <= 60


def test_a_name_cannot_move_the_cursor():
    assert "\x1b" not in terminal_table(records("a\x1b[2Jb"), 100)
