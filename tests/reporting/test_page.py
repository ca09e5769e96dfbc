"""The HTML page: what it says, that it needs nothing but itself, and how it behaves in a real browser without a screen.

A script appended to a copy of the page uses it as a person would, and writes what it saw into the page.
"""

import itertools
import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tyro
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.config import KappaModes, PipelineConfig, SupportedDatasets, TrainConfig, plain, written
from core.records import WORDS
from core.yaml_files import load_config
from measure.verdicts import CHECKS
from reporting.families import DEFAULT_CONFIG, command, families, runs_of
from reporting.figures import figures_of
from reporting.page import (
    ELSEWHERE,
    NOT_LOOKED,
    WORD_OF,
    as_page,
    by_priority,
    costs,
    in_parts,
    rounded,
    sentence,
    word_of,
)
from reporting.panels import FIGURES, Panel, Series
from reporting.tables import table
from reporting.write import as_text
from tests.helpers.browser import FLAGS, NOWHERE, find_browser
from tests.helpers.common import settings_of
from tests.helpers.records import DATA, METRICS, full, page_data


def page(records: list[dict]) -> str:
    return as_page(families(runs_of(records)), {})


@pytest.fixture(scope="module")
def html() -> str:
    """Two seeds and another class, three kappas each."""
    kappas = ((100, 60.0), (200, 12.0), (400, 3.0))
    runs = [(0, 1, "a"), (1, 1, "b"), (0, 2, "c")]
    return page(
        [
            full(5, k, f, seed=s, run=run) | {"forget_class": [c], "forget_names": [str(c)]}
            for s, c, run in runs
            for k, f in kappas
        ]
    )


def attributes_of(html: str) -> list[tuple[str, str]]:
    """(tag, attribute) of every attribute as a browser finds them."""
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend((tag, name) for name, _ in attrs)

    Tags().feed(html)
    return found


# --- what it says -----------------------------------------------------------------------------------------


def test_sentence_by_hand():
    assert sentence(full(5, 200, 12)) == (
        "At kappa 200 (20.0 % of the layer) class 1 is recognised 12.0 % of the time; "
        "the other classes lose 2.0 points."
    )
    named = full(5, 200, 12) | {"forget_names": ["Trouser"]}
    assert "class 1 (Trouser) is recognised" in sentence(named)
    two = named | {"forget_class": [1, 3], "forget_names": ["Trouser", "3"]}
    assert "classes 1 (Trouser) and 3 are recognised" in sentence(two)
    assert "(20.0 % of the masked layers)" in sentence(full(5, 200, 12) | {"mask_layer": [-2, -1]})


def test_page_holds_sentences_tables_and_provenance_without_its_script(html):
    static = DATA.sub("", html)
    assert static.count("Switching off 400 weights (40.0 % of the layer), class 1 is recognised 3.0 %") == 2
    assert "class 2 is recognised 3.0 %" in static
    assert re.search(r'<th scope="row" class="c1">MIMU</th><td class="c1"><strong>3</strong></td>', static)
    assert '<td class="c2">400</td><td class="c3">5</td>' in static  # kappa, top_k
    assert "<strong>3</strong>" in static
    assert "n = 3 runs" in static
    assert static.count("uv run main.py run --") == 3
    assert "HookedMLPClassifier on MNIST" in static  # of what there are no records


def test_nothing_is_loaded_from_elsewhere(html):
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend((tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "data"))

    Links().feed(html)
    places = {(tag, name, value.rpartition("/")[0]) for tag, name, value in found}
    below = "../eval/metrics_and_plots"
    assert places == {("a", "href", f"{below}/masks/p"), ("a", "href", f"{below}/json/M_D_top-5_kappa_400")}
    assert not re.search(r"@import|url\([^#]|fetch\(|XMLHttpRequest|import\(", html)
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {"http://www.w3.org/2000/svg"}


def test_text_from_records_stays_text():
    one = full(5, 100, 12)
    one["labels"]["mimu"] = "</script><b id=evil>"
    text = page([one])
    assert "<b id=evil>" not in text
    assert page_data(text)[0]["labels"]["mimu"] == "</script><b id=evil>"


def test_names_that_a_screen_would_obey_are_spelled_out():
    one: dict = full(5, 100, 12) | {"forget_names": ["a\x1b[31m\u202eb\udc80\n"], "dataset": '" onload="x'}
    one["labels"]["mimu"] = "**not bold**"
    html = page([one])
    html.encode()
    assert not set("\x1b\u202e") & set(html)
    assert r"class 1 (a\x1b[31m\u202eb\x80\n)" in html
    assert ">**not bold**</th>" in html
    attributes = [name for tag, name in attributes_of(html) if tag == "section"]
    assert set(attributes) == {"class", "id", "data-what", "data-classes", "data-name", "aria-label"}


def without_figures(value: float | None, methods: Sequence[str], points: slice, seeds: int) -> list[dict]:
    """Records of runs in which some methods have no values at some points."""
    records = []
    for seed in range(seeds):
        run = [full(5, kappa, 12, seed=seed, run=f"run-{seed}") for kappa in (100, 200)]
        for one in run[points] if seed == 0 else []:
            for part, name in itertools.product(("methods", "validation"), methods):
                one[part][name] = dict.fromkeys(one[part][name], value)
        records += run
    return records


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("methods", [("mimu",), ("novel",), ("default",), ("mimu", "novel", "default")])
@pytest.mark.parametrize("points", [slice(1), slice(2)], ids=["one point", "all points"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_reports_hold_where_figures_are_missing(value, methods, points, seeds):
    records = without_figures(value, methods, points, seeds)
    runs = runs_of(records)
    for group in (*([run] for run in runs), runs):
        rows = table(*group, every=True)
        assert {row[0] for row in rows[1:]} == {"MIMU", "untouched", "a novel method"}
        assert not re.search(r"\b(nan|inf|None)\b", as_text(rows))
        panels = [panel for drawn in figures_of(group).values() for panel in drawn]
        assert all(math.isfinite(value) for panel in panels for one in panel.series for value in one.y)
    said = [point["sentence"] for point in page_data(page(records))[0]["points"]]
    if methods == ("mimu",) and points == slice(1):
        assert said[0] == "At kappa 100 there are no values: training diverged, or nothing was measured."
        assert "class 1 is recognised" in said[1]


@pytest.mark.parametrize("methods", [("mimu",), ("default",), ("novel", "default")])
def test_reports_hold_where_methods_are_missing(methods):
    one = full(5, 100, 12)
    for part in ("methods", "validation", "labels", "axes", "confusion", "class_probability"):
        one[part] = {name: one[part][name] for name in methods}
    assert "The answer or the untouched classifier has no values." in page([one])
    assert len(table([one])) == 1 + len(methods)
    one |= dict.fromkeys(("class_probability", "confusion"), dict.fromkeys(methods))
    assert page([one])


def test_numbers_are_cut_to_four_digits():
    assert rounded({"a": [0.123456, 98765.4, 3, None, float("inf")]}) == {"a": [0.1235, 98770.0, 3, None, None]}


def test_command_gives_the_same_configuration_again():
    default = load_config([DEFAULT_CONFIG])
    config = replace(
        default, forget_class=(3, 4), kappa_list=(70, 9), seed=5, train=TrainConfig(epochs=3, bf16=True, lr=0.5)
    )
    config = written(replace(config, gcn=replace(config.gcn, residual=False, train_classes=(1, 2))))
    one = full(2000, 70, 12) | {"config": plain(replace(config, kappa_list=(70,)))}
    words = shlex.split(command([one, one | {"kappa": 9}]))
    assert words[:4] == ["uv", "run", "main.py", "run"]
    again = tyro.cli(PipelineConfig, args=words[4:], default=default)
    assert replace(again, kappa_list=config.kappa_list) == config
    assert again.kappa_list == (9, 70)


ODD_SIGNS = st.sampled_from(" '\"\\;$()`&|<>*?~#!-=\n\t{}é")
ODD = st.text(st.one_of(ODD_SIGNS, st.characters(exclude_categories=["Cs"])), min_size=1)
PATHS = st.builds(Path, ODD.filter(lambda text: "\0" not in text and not text.startswith("~")))
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "dataset_path": PATHS,
        "gcn_path": PATHS,
        "trained_vision_model_path": PATHS,
        "forget_class": st.lists(ODD.map("name:{}".format), min_size=1, max_size=3, unique=True).map(tuple),
        "mask_layer": st.sampled_from([None, (-1,), (-3, -2)]),
        "seed": st.integers(0, 9),
        "device": st.sampled_from(["cpu", "cuda:1"]),
        "vision_dataset": st.sampled_from(list(SupportedDatasets)),
        "kappa": st.sampled_from(list(KappaModes)),
        "resume": st.booleans(),
    },
)


def as_run(config: PipelineConfig) -> list[dict]:
    """A run with this configuration, as records keep it."""
    return [full(2000, 70, 12) | {"config": plain(replace(written(config), kappa_list=(70,)))}]


def typed_again(words: list[str]) -> PipelineConfig:
    """What main.py makes of the words of a command."""
    assert words[:4] == ["uv", "run", "main.py", "run"]
    return replace(settings_of(words[4:]), kappa_list=(70,))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
@example({"dataset_path": Path("my photos; echo pwned")})
@example({"dataset_path": Path("-x"), "gcn_path": Path("None"), "trained_vision_model_path": Path("--json")})
@example({"dataset_path": Path("$(rm -rf x)\n'\"`id`")})
def test_command_is_quoted_for_a_shell(changes):
    config = replace(load_config([DEFAULT_CONFIG]), kappa_list=(70,), **changes)
    again = typed_again(shlex.split(command(as_run(config))))
    assert again == replace(written(config), resume=False)


@pytest.mark.parametrize("name", ["a\nb\rc\td\x1b; echo 'pwned' $(id)", "\udce9 \n'$(id)"])
def test_command_may_be_pasted_from_the_page(name):
    """What a browser shows of the page is read by a shell: odd paths come out as they were, nothing is run."""
    config = replace(load_config([DEFAULT_CONFIG]), dataset_path=Path(name))
    (shown,) = re.findall(r"<pre><code>(.*?)</code></pre>", page(as_run(config)), re.DOTALL)
    line = unescape(shown.encode().decode())
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout.split(
        b"\0"
    )
    assert os.fsencode(config.dataset_path) in words
    assert words[:4] == [b"uv", b"run", b"main.py", b"run"]


def test_sample_images_have_the_names_of_their_classes():
    """Of all points, since the slider moves between them; a name that is the label itself says nothing."""
    records = [full(5, kappa, 12) for kappa in (100, 200)]
    for one, names in zip(records, ({"1": "cat", "0": "0"}, {"1": "cat", "2": "a\x1bdog"}), strict=True):
        one["samples"]["names"] = names
    (run,) = page_data(page(records))
    assert run["samples"]["names"] == {"1": "cat", "2": "a\\x1bdog"}
    for one in records:  # as earlier records are
        del one["samples"]["names"]
    (run,) = page_data(page(records))
    assert run["samples"]["names"] == {}


def test_nothing_is_said_to_be_lost_or_gained_that_rounds_to_zero():
    one = full(5, 100, 12)
    for change, said in ((0.04, "keep their score"), (-0.04, "keep their score"), (0.06, "gain 0.1 points")):
        one["methods"]["mimu"]["retain_score"] = one["methods"]["default"]["retain_score"] + change
        assert sentence(one).endswith(f"the other classes {said}.")


def test_one_kappa_is_no_curve():
    assert not [name for name in figures_of([[full(5, 100, 12)]]) if "_over_" in name]


def test_a_metric_of_which_nothing_is_known_has_no_plot():
    records = [full(5, kappa, 12) for kappa in (100, 200)]
    assert "unheard_of_over_kappa" in figures_of([records])
    for one in records:
        for values in one["methods"].values():
            values["unheard_of"] = None
    assert "unheard_of_over_kappa" not in figures_of([records])
    assert "forget_score_over_kappa" in figures_of([records])


@pytest.mark.slow
def test_five_hundred_points_stay_small():
    """Ten runs of fifty points, ten classes, six methods, maps of full size and eight colour images."""
    cells = [[(i * j) % 4 for j in range(32)] for i in range(32)]
    records = [
        full(5, kappa, 12, classes=10, seed=seed, run=f"run-{seed}")
        for seed in range(10)
        for kappa in range(50, 2550, 50)
    ]
    for one in records:
        one["mask_map"] = [{"layer": "linears.1.weight", "shape": [128, 512], "cells": cells}]
        one["samples"] = {"images": ["A" * 4000] * 8, "labels": [1] * 8}
        one["said_of_samples"] = {name: [[1, 0.1234]] * 8 for name in ("mimu", "default")}
        for name in ("x", "y", "z"):
            for part in ("methods", "validation", "labels", "axes", "verdicts", "intervals"):
                one[part][name] = one[part]["mimu"]
    assert len(page(records).encode()) <= 5_000_000


# --- what a run's part begins with ------------------------------------------------------------------------


def test_every_verdict_that_says_how_far_a_method_goes_has_a_word():
    assert set(WORD_OF) <= {*CHECKS, *WORDS}
    assert set(WORDS) <= set(WORD_OF)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        (["fine"], "suppressed"),  # the answers forget, and nobody has shown more
        (["unchecked"], "suppressed"),
        (["suppressed", "head suppression only"], "suppressed"),
        (["erased to retraining's level", "fine"], "erased"),
        (["over-erased", "costs a class"], "over-erased"),
        (["no-op", "worse than logit drop"], "nothing happened"),
        (["suppressed", "collapsed"], "collapsed"),
        (["half forgotten", "too random"], "half forgotten"),
        (["too few images", "half forgotten"], "cannot be told"),
    ],
)
def test_the_word_follows_the_verdicts(keys, word):
    one = full(5, 100, 12)
    one["verdicts"]["mimu"] = [{"key": key, "sentence": f"about {key}"} for key in keys]
    said, because = word_of(one, "mimu")
    assert said == word
    assert because == NOT_LOOKED if keys[0] in ("fine", "unchecked") else because in [f"About {key}." for key in keys]
    html = DATA.sub("", page([one]))
    opening = html[html.index('class="opening"') : html.index('class="legend"')]
    assert re.findall(r'<p class="word"><strong>(.*?)</strong>', opening) == [word.replace("'", "&#39;")]
    assert opening.index('class="word"') < opening.index("Switching off 100 weights") < opening.index('class="picture"')
    assert html.index('class="legend"') < html.index("What it cost") < html.index("<table")


def test_costs_by_hand():
    one = full(5, 200, 12)
    one["labels"]["retrain"] = "retrained"
    one["methods"]["retrain"] = one["methods"]["default"] | {"seconds": 31.4}
    one["methods"]["mimu"] |= {"seconds_offline": 1260.2, "edit_bytes": 1024, "avg_gap": None}
    assert costs(one) == [
        ("weights changed", "200", "20.0 % of the layer"),
        ("other classes", "-2.0 points", "80.0 to 78.0 %"),
        ("time", "0.5 s", "retraining: 31 s"),
        ("before any request", "1,260 s", "once for all requests, on this machine"),
        ("size of the change", "1,024 bytes", "to be stored"),
    ]


def test_links_lead_to_the_chosen_point(html):
    masks = re.findall(r'href="(\.\./[^"]*safetensors)"', html)
    assert masks == [f"../eval/metrics_and_plots/masks/p/5-400{seed}_mimu.safetensors" for seed in ("", "", "-1")]
    odd = full(5, 100, 12) | {"mask_path": "eval/a b/\"x\udce9'&.safetensors"}
    assert 'href="../eval/a%20b/%22x%E9%27%26.safetensors"' in page([odd])


def test_runs_are_named_by_what_differs(html):
    named = re.findall(r'data-what="(.*?)" data-classes="(.*?)"\s+data-name="(.*?)"', html, re.DOTALL)
    assert named == [
        ("M on D", "class 1", "seed 0"),
        ("M on D", "class 2", "seed 0"),
        ("M on D", "class 1", "seed 1"),
    ]
    runs = [full(5, 100, 12, run=run) for run in ("a", "b")]
    runs[1]["config"] = runs[1]["config"] | {"train": {"epochs": 5}}
    assert re.findall(r'data-what="(.*?)"', page(runs)) == ["M on D (train.epochs 2)", "M on D (train.epochs 5)"]


def test_columns_stand_by_priority():
    one = full(5, 100, 12)
    metrics = list(METRICS)
    rows = by_priority(table([one]), metrics)
    names = [text.partition(" [")[0] for text in rows[0]]
    assert names[:4] == ["method", "forget_score", "retain_score", "unheard_of"]
    assert set(names[1:7]) == set(metrics)
    assert names[7:10] == ["kappa", "top_k", "weights changed"]
    plain = dict(zip(*table([one])[:2], strict=True))
    kept = {name: value for name, value in plain.items() if name.partition(" [")[0] not in ELSEWHERE}
    assert dict(zip(*rows[:2], strict=True)) == kept  # each value below its own name
    assert len(plain) - len(kept) == len(ELSEWHERE)
    assert all(f"{name} [s]</th>" in page([one]) for name in ELSEWHERE)
    one["axes"]["mimu"] = ["kappa"]
    assert "top_k" not in by_priority(table([one]), metrics)[0]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 3))
def test_a_wide_table_is_cut_into_narrow_ones(columns, fixed):
    rows = [[f"{row}-{column}" for column in range(fixed + columns)] for row in range(3)]
    parts = [[[cell["text"] for cell in row] for row in part["rows"]] for part in in_parts(rows, fixed, "all")]
    assert all(len(part[0]) <= fixed + 6 for part in parts)
    assert all([row[:fixed] for row in part] == [row[:fixed] for row in rows[1:]] for part in parts)
    again = [sum((part[place][fixed:] for part in parts), rows[place + 1][:fixed]) for place in range(2)]
    assert again == rows[1:]


# --- in a browser -----------------------------------------------------------------------------------------

PROBE = f"<script>{Path(__file__).with_name('page_probe.js').read_text(encoding='utf-8')}</script>"


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


def use(browser: str, html: str, folder: Path, dark: bool, width: int) -> dict:
    """Open the page and use it; returns what was seen."""
    watch = "<script>window.__errors = []; onerror = m => { __errors.push(m); };</script>"
    path = folder / "page.html"
    path.write_text(html.replace("<head>", "<head>" + watch).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    flags = [*FLAGS, NOWHERE, f"--window-size={width},1200", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", path.as_uri()]
    result = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 500)], ids=["light and wide", "dark and narrow"])
def test_page_in_a_browser(browser, html, tmp_path, dark, width):
    seen = use(browser, html, tmp_path, dark, width)
    assert seen["errors"] == []
    assert seen["dark"] == dark
    assert seen["text"] >= 4.5  # WCAG 2.2, 1.4.3
    assert seen["series"] >= 3  # and 1.4.11
    assert seen["overflow"] <= 0
    assert (seen["unnamed"], seen["broken"], seen["unlabelled"], seen["focus"]) == (0, 0, 0, True)
    assert (seen["legends"], seen["pressed"]) == (1, {"before": ["", ""], "after": ["none", "none"]})
    assert width < 1280 or seen["scrolling"] == []
    word, picture, cost, table = seen["order"]
    assert max(word, picture) < cost < table
    assert (seen["copied"], seen["commands"]) == (3, 3)
    assert seen["visible"] == ["run-a"]
    assert {"trade_off", "unheard_of_over_kappa", "accuracy_by_class", "weight_histogram"} <= set(seen["figures"])
    assert len(seen["figures"]) == len(set(seen["figures"])) == seen["drawn"]  # each once, what the slider shows beside
    assert [text.split(" (")[0] for text in seen["slider"]] == ["At kappa 100", "At kappa 200", "At kappa 400"]
    assert [re.findall(r"recognised ([\d.]+) %", text) for text in seen["slider"]] == [["60.0"], ["12.0"], ["3.0"]]
    assert seen["images"][0] == "test image of class 1, before taken for 1, after for 2"
    assert (seen["up"], seen["down"], seen["sorted"]) == (["60", "78", "80"], ["80", "78", "60"], "descending")
    assert seen["picked"] == ["class 2"]


def crowded(kappa: int, forgotten: int) -> dict:
    """A record of many classes with levels beside each other, small figures and intervals in its table."""
    one = full(5, kappa, 12, classes=100, run=f"run-{forgotten}")
    one["forget_class"], one["forget_names"] = [forgotten], [str(forgotten)]
    for name, label in (("retrain", "retrained"), ("sft", "SFT randomisation"), ("logit_drop", "logit drop")):
        one["labels"][name], one["axes"][name] = label, []
        for part in ("methods", "validation"):
            one[part][name] = dict(one[part]["default"])
    shown = ("worst_retained_drop", "avg_gap")  # with these, as many as a record of the pipeline shows first
    one["metrics"] = {name: about for name, about in one["metrics"].items() if name != "unheard_of"}
    one["metrics"] |= {name: {"unit": "points", "better": "lower", "first": True} for name in shown}
    for part in ("methods", "validation"):
        for place, values in enumerate(one[part].values()):
            values |= {"worst_retained_drop": 12.345, "avg_gap": 0.001 + 0.0005 * place}
    one["verdicts"] = {name: [] for name in one["labels"]}
    for field in ("confusion", "class_score", "taken_for", "said_of_samples"):
        one[field] = dict.fromkeys(one["labels"]) | one[field]
    one["class_probability"] = {name: [c / 44850 for c in range(300)] for name in one["labels"]}
    limits = {"value": 98.76, "low": 97.65, "high": 99.87, "n": 100}
    one["intervals"] = {name: dict.fromkeys(one["metrics"], limits) for name in one["labels"]}
    return one


def names_below_bars(runs: Sequence[Sequence[dict]]) -> list[Panel]:
    """A figure whose bars have the methods' names."""
    names = list(runs[0][0]["labels"].values())
    bars = Series("bars", [float(place) for place in range(len(names))], [1.0] * len(names), "bars")
    return [Panel("named bars", "method", "score [%]", [bars], ticks=names)]


@pytest.mark.slow
def test_crowded_page_in_a_browser(browser, tmp_path, monkeypatch):
    """Nothing written in a figure lies over anything else or outside; tables fit on paper."""
    monkeypatch.setitem(FIGURES, "named_bars", (names_below_bars, False))
    seen = use(browser, page([crowded(k, c) for c in (1, 2) for k in (100, 200)]), tmp_path, dark=False, width=1280)
    assert (seen["errors"], seen["collisions"], seen["cut"]) == ([], [], [])
    assert seen["offPaper"] <= 0
    cut = "what images of class 1 are taken for\n(2 of 100 classes; the others' median: 0)"
    assert seen["captions"].count(cut) == 1
    assert seen["scrolling"] == []
    assert len(seen["dashes"]) >= 3  # levels are told apart in grey
