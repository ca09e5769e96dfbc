"""The leaderboard: values against numpy and scipy, which rows are pooled and compared, and the page in a browser."""

import json
import math
import re
import shlex
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from core.artifacts import write_json
from core.choices import UserError
from core.config import PipelineConfig, plain, written
from core.records import record_path
from main import main
from measure.metrics import INSIDE, METRICS
from reporting.families import runs_of
from showing.leaderboard import QUESTIONS, as_leaderboard, write_leaderboard
from showing.standings import Board, boards, looks_inside
from tests.helpers.browser import FLAGS, NOWHERE, find_browser
from tests.helpers.common import settings_of
from tests.helpers.records import about, full

CELLS = [(seed, label) for seed in (0, 1, 2) for label in (1, 2)]
FORGET = dict(zip(CELLS, (4.0, 10.0, 6.0, 9.0, 1.0, 3.0), strict=True))


def cell(seed: int, label: int, forget: float, methods: tuple[str, ...] = (), run: str = "", **more) -> dict:
    """A record of one run, of some methods alone (none: of all that it has)."""
    run = run or f"run{seed}{label}"
    one: dict = full(5, 100, forget, seed=seed, run=run) | {"forget_class": [label], "forget_names": [str(label)]}
    config = written(PipelineConfig(forget_class=(label,), seed=seed, kappa_list=(100,), topK_list=(5,)))
    one |= {"config": plain(config), "id": f"{run}-{len(methods)}"} | more
    one["provenance"] = one["provenance"] | {"commit": "1a85c8b0123", "started": f"2026-01-01T{seed}{label}"}
    for part in [name for name, value in one.items() if methods and isinstance(value, dict) and "default" in value]:
        one[part] = {name: value for name, value in one[part].items() if name in methods}
    one["config"]["eval"]["methods"] = list(one["labels"])
    return one


def records() -> list[dict]:
    """Three seeds, two classes each; a metric of the features, which validation images do not have."""
    made = [cell(*place, forget=forget) for place, forget in FORGET.items()]
    for one in made:
        one["metrics"] = one["metrics"] | {"hidden_gap": about("points", "lower") | {"first": False}}
        for name, values in one["methods"].items():
            values |= {"hidden_gap": {"mimu": 7.5}.get(name, 1.25), "seconds": {"mimu": 0.25}.get(name, 3.0)}
    return made


def board_of(made: list[dict]) -> Board:
    (board,) = boards(runs_of(made))
    return board


def rows_of(html: str, question: str) -> dict[str, list[str]]:
    """Method -> texts of its cells, in the table of a question that is shown at once."""
    part = html[html.index(f'data-question="{question}"') :]
    table = part[: part.index("</table>")]
    rows = re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    plain_text = [[unescape(" ".join(re.sub(r"<[^>]+>", " ", one).split())) for one in row] for row in cells]
    return {row[0].partition(" 3 seeds")[0].partition(" 1 seed")[0]: row for row in plain_text}


# --- values -----------------------------------------------------------------------------------------------


def test_values_are_means_within_seeds_first_with_t_over_seeds():
    means = [np.mean([value for (seed, _), value in FORGET.items() if seed == one]) for one in (0, 1, 2)]
    half = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / np.sqrt(3)
    (row,) = [text for name, text in rows_of(as_leaderboard(runs_of(records())), "outputs").items() if name == "MIMU"]
    assert row[0] == "MIMU 3 seeds, 6 cells, 1a85c8b"
    assert row[1] == f"{np.mean(means):.4g} ± {half:.2g}"


def test_columns_follow_the_question():
    html = as_leaderboard(runs_of(records()))
    named = {
        question.name: re.findall(r"<th scope=\"col\"[^>]*>([\w<>]+) \[", part)
        for question, part in zip(QUESTIONS, re.split(r'data-question="\w+"', html)[1:], strict=True)
    }
    named = {name: [text.replace("<wbr>", "") for text in found] for name, found in named.items()}
    assert {"forget_score", "retain_score", "unheard_of"} <= {*named["outputs"]}
    assert named["features"] == ["hidden_gap"]
    assert named["cost"] == ["seconds", "weights_changed"]
    assert rows_of(html, "cost")["MIMU"][1:] == ["0.25 ± 0", "100"]


def test_every_metric_that_looks_inside_is_known_from_the_record_alone():
    """By the rule of `Eval`: groups of INSIDE are not measured on validation images."""
    entries = {name: entry.group in INSIDE for name, entry in METRICS.items()}
    test, val = dict.fromkeys(entries, 1.0), {name: 1.0 for name, inside in entries.items() if not inside}
    one: dict = {"metrics": entries, "methods": {"default": test}, "validation": {"default": val}}
    fewer: dict = {"metrics": {}, "methods": {"default": {}}, "validation": {"default": {}}}  # these were not asked for
    assert {name: looks_inside([fewer, one], name) for name in entries} == entries


def test_rows_are_ordered_by_what_the_question_asks():
    made = records()
    for one in made:
        one["metrics"] = one["metrics"] | {"avg_gap": about("points", "lower")}
        for part in ("methods", "validation"):
            for name, gap in (("mimu", 3.0), ("novel", 2.0), ("default", 1.0)):
                one[part][name]["avg_gap"] = gap
    html = as_leaderboard(runs_of(made))
    assert list(rows_of(html, "outputs")) == ["untouched", "a novel method", "MIMU"]  # the reference stands first
    assert list(rows_of(html, "cost")) == ["untouched", "MIMU", "a novel method"]
    assert "M on D, ordered by avg_gap" in html


def test_bold_is_the_best_and_what_cannot_be_told_from_it():
    """MIMU forgets 5.5 on average in all cells, the others 40: paired over seeds this is no chance."""
    assert board_of(records()).leading("forget_score", "lower") == {("mimu", 1)}
    close = records()
    for one, novel in zip(close, (5, 8, 4, 12, 2, 3), strict=True):
        one["methods"]["novel"]["forget_score"] = novel
    differences = np.array([[5 - 4, 8 - 10], [4 - 6, 12 - 9], [2 - 1, 3 - 3]]).mean(1)
    assert stats.ttest_1samp(differences, 0).pvalue > 0.05
    assert board_of(close).leading("forget_score", "lower") == {("mimu", 1), ("novel", 1)}


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("method", ["mimu", "novel", "default"])
def test_a_method_without_values_has_a_row_of_dashes(value, method):
    made = records()
    for part in ("methods", "validation"):
        made[0][part][method] = dict.fromkeys(made[0][part][method], value)
    html = as_leaderboard(runs_of(made))
    label = made[0]["labels"][method]
    assert set(rows_of(html, "outputs")[label][1:]) == set(rows_of(html, "cost")[label][1:]) == {"-"}
    assert len(rows_of(html, "outputs")) == 3
    assert not re.search(r">(nan|inf|None)\b", html)


# --- which runs a row rests on ----------------------------------------------------------------------------


def test_a_method_that_some_runs_lack_has_its_row():
    """Later somebody measures a method of theirs in four of the six cells, beside the untouched classifier alone."""
    later = [cell(*place, 20.0, ("novel", "default"), run=f"later{place[0]}{place[1]}") for place in CELLS[2:]]
    for one in later:
        one["provenance"]["started"] = "2026-02-01"
        for part in [name for name, value in one.items() if isinstance(value, dict) and "novel" in value]:
            one[part]["mine"] = one[part]["novel"]
        one["labels"]["mine"] = "my method"
        one["config"]["eval"]["methods"] = list(one["labels"])
    found = {(row.method, row.source.count) for row in board_of([*records(), *later]).rows}
    assert ("mine", "2 seeds, 4 cells") in found
    assert ("mimu", "3 seeds, 6 cells") in found
    assert ("novel", "3 seeds, 6 cells") in found  # pooled: which other methods were measured changes no value
    html = as_leaderboard(runs_of([*records(), *later]))
    assert "my method 2 seeds, 4 cells, 1a85c8b (3)" in [row[0] for row in rows_of(html, "outputs").values()]


def test_other_settings_images_and_plugins_are_not_pooled():
    other = [cell(*place, 20.0, run=f"other{place[0]}{place[1]}") for place in CELLS]
    for one in other:
        one["config"]["train"]["epochs"] = 7
    board = board_of([*records(), *other])
    assert [(row.method, row.source.apart) for row in board.rows if row.method == "mimu"] == [
        ("mimu", "train.epochs 30"),
        ("mimu", "train.epochs 7"),
    ]
    edited = records()
    for one, digest in zip(edited, ("a" * 64,) * 3 + ("b" * 64,) * 3, strict=True):
        one["provenance"] = one["provenance"] | {"plugins": {"my.py": digest}}
    assert {row.source.apart for row in board_of(edited).rows} == {"plugins aaaaaa", "plugins bbbbbb"}
    elsewhere = [one | {"images": "other", "id": f"e{one['id']}", "run": f"e{one['run']}"} for one in records()]
    assert [board.apart for board in boards(runs_of([*records(), *elsewhere]))] == ["images 1f2e3d", "images other"]


def test_a_run_that_is_repeated_counts_once(capsys):
    again = cell(0, 1, 50.0, run="again")
    again["provenance"]["started"] = "2026-03-01"
    (row,) = [one for one in board_of([*records(), again]).rows if one.method == "mimu"]
    assert row.source.count == "3 seeds, 6 cells"
    assert "again" in {run[0]["run"] for run in row.source.runs}
    assert "leaderboard: run run01 is left out: a later one repeats it" in capsys.readouterr().err


def test_commands_make_the_runs_again():
    """One for the seeds of a class; what a shell reads is the configuration that the records hold."""
    made = records()
    for one in made:
        one["config"]["dataset_path"] = "my photos; echo 'pwned'"
    (source,) = board_of(made).sources
    assert len(source.commands) == 2
    for line, label in zip(source.commands, (1, 2), strict=True):
        words = shlex.split(line)
        assert words[:4] == ["uv", "run", "main.py", "run"]
        at = words.index("--seeds")
        assert words[at + 1 :] == ["0", "1", "2"]
        again = replace(written(settings_of(words[4:at])), resume=False)
        assert plain(again) | {"tracker": "none"} == {
            **next(one["config"] for one in made if one["forget_class"] == [label]),
            "tracker": "none",
        }


# --- the page ---------------------------------------------------------------------------------------------


def written_to(folder: Path, made: list[dict]) -> None:
    for one in made:
        write_json(record_path(folder, one), one)


def test_the_command_reads_several_folders(tmp_path, monkeypatch, capsys):
    made = records()
    for one in made:  # without what hand-made records have for other tests alone
        one["metrics"].pop("hidden_gap")
        for values in one["methods"].values():
            values.pop("hidden_gap")
    written_to(tmp_path / "a", made[:4])
    written_to(tmp_path / "b", made[4:])
    monkeypatch.chdir(tmp_path)
    assert main(["leaderboard", "a", "b"]) == 0
    assert capsys.readouterr().out == "a/reports/leaderboard.html\n"
    assert "3 seeds, 6 cells" in (tmp_path / "a/reports/leaderboard.html").read_text(encoding="utf-8")
    assert main(["leaderboard", "b", "--out", "mine.html"]) == 0
    assert "1 seed, 2 cells" in (tmp_path / "mine.html").read_text(encoding="utf-8")
    assert main(["leaderboard", "a", "nowhere"]) == 2
    assert "there are no records below nowhere: make some" in capsys.readouterr().err
    with pytest.raises(UserError, match="no folder is named"):
        write_leaderboard([])


def test_the_page_needs_nothing_else_and_text_stays_text():
    made = records()
    for one in made:
        one["labels"]["novel"] = "</script><b id=evil>\x1b[31m"
    html = as_leaderboard(runs_of(made))
    assert "<b id=evil>" not in html
    assert "\x1b" not in html
    assert not re.search(r"@import|url\([^#]|fetch\(|XMLHttpRequest|import\(|src=", html)
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {"http://www.w3.org/2000/svg"}
    links = set(re.findall(r'href="(.*?)"', html))
    assert links == {"#source-1-1"}
    assert 'id="source-1-1"' in html


PROBE = f"<script>{Path(__file__).with_name('leaderboard_probe.js').read_text(encoding='utf-8')}</script>"


@pytest.mark.slow
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 420)], ids=["light and wide", "dark and narrow"])
def test_page_in_a_browser(tmp_path, dark, width):
    """In a frame as wide as the screen in question: the browser's own window is never narrower than 500 pixels."""
    browser, other = find_browser(), records()[:1]
    limits = {"value": 98.76, "low": 97.65, "high": 99.87, "n": 100}
    for one in other:
        one |= {"dataset": "E", "model": "N", "images": "e", "run": f"e{one['run']}", "id": f"e{one['id']}"}
        one["labels"] = {"mimu": "MIMU deep, by a network (ours)", "novel": "boundary shrink", "default": "untouched"}
        one["intervals"] = {name: dict.fromkeys(one["metrics"], limits | {"low": 97.7}) for name in one["labels"]}
    watch = "<script>window.__errors = []; onerror = m => { __errors.push(m); };</script>"
    html = as_leaderboard(runs_of([*records(), *other]))
    html = html.replace("<head>", "<head>" + watch).replace("</body>", PROBE + "</body>")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    outer = f'<iframe id="f" src="page.html" width="{width}" height="900" frameborder="0"></iframe><pre id="out"></pre>'
    outer += (
        "<script>onload = () => { out.textContent = f.contentDocument.getElementById('seen').textContent; }</script>"
    )
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    flags = [*FLAGS, NOWHERE, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, (tmp_path / "outer.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = SimpleNamespace(**json.loads(unescape(found[1])))
    assert seen.errors == []
    assert (seen.first, seen.cost) == (["D outputs", "E outputs"], ["D cost", "E cost"])
    assert (seen.all, seen.dataset) == (6, ["D outputs", "D features", "D cost"])
    assert seen.said == "3 rows in 1 table"
    assert seen.none == [[], "no run is of this dataset and model"]
    assert (seen.overflow, seen.scrolling, seen.unlabelled, seen.focusable) == (0, 0, 0, True)
    assert (seen.up[0], seen.down[0], seen.sorted) == ("MIMU", "untouched", "descending")
    assert (seen.hidden > 0) == (width < 1000)
