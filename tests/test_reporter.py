"""Reports from hand-made records: what is chosen, what is written, and that nothing is drawn twice."""

import copy
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from core.artifacts import read_json, write_json, write_text
from core.config import ReporterConfig, UserError
from core.intervals import Cell
from core.records import EACH, read_records, record_path
from reporter import Reporter
from reporting.compare import compared, find_side, in_words, side
from reporting.draw import COLOURS, COLUMN, METADATA, SETTINGS, WORTH, _shared, draw, save, save_all
from reporting.families import Run, families, family_key, runs_of, told_apart
from reporting.figures import (
    MOST_BARS,
    class_probability,
    confusion_difference,
    figures_of,
    forgotten_taken_for,
    per_class,
    training,
)
from reporting.panels import Panel, Series, in_style, over, pareto, shown_range, style_of, time_against_quality
from reporting.sentences import TERMS, answer_of, headline, remarks, warnings
from reporting.tables import (
    Estimate,
    best_points,
    caption,
    choose,
    chosen_in,
    grid,
    leaders,
    measurable,
    over_cells,
    shown,
    table,
    without_records,
)
from reporting.write import Lead, as_csv, as_latex, as_text
from tests.helpers.records import about, full, record, values


def marked(rows: list[list[str]]) -> list[list[str]]:
    """Rows with stars about the cells that lead."""
    return [[f"**{cell}**" if isinstance(cell, Lead) else cell for cell in row] for row in rows]


@pytest.fixture
def records() -> list[dict]:
    return [
        record(5, 100, validation=(50, 80), test=(0, 99)),  # the best on test images, which must not matter
        record(5, 200, validation=(10, 79), test=(12, 78)),
        record(9, 200, validation=(10, 79), test=(20, 70)),  # a tie: the smaller top_k wins
    ]


def test_points_are_chosen_on_validation_images(records):
    assert choose(records, "mimu")["id"] == "5-200"
    chosen = {best.method: (best.top_k, best.kappa) for best in best_points(records)}
    assert chosen == {"mimu": (5, 200), "default": (None, None), "novel": (None, 100)}


def gapped(kappa: int, gap: float | None, forget: float = 50, retain: float = 80) -> dict:
    """A record whose validation values of mimu have an Avg Gap."""
    one = record(5, kappa, (forget, retain), (forget, retain))
    one["validation"]["mimu"]["avg_gap"] = gap
    return one


def test_points_are_chosen_by_one_criterion_in_a_run():
    # Diverged at kappa 100: its retain minus forget score must not be held against the Avg Gap of the other.
    assert choose([gapped(100, None, 10, 10), gapped(200, 0.1, 2, 98)], "mimu")["kappa"] == 200
    assert choose([gapped(100, None, 0, 100), gapped(200, 40.0)], "mimu")["kappa"] == 200
    for broken in (math.nan, math.inf, -math.inf):
        assert choose([gapped(100, broken), gapped(200, 40.0)], "mimu")["kappa"] == 200
        assert choose([gapped(100, None, broken), gapped(200, None, 90, 80)], "mimu")["kappa"] == 200
    assert choose([gapped(100, None), gapped(200, None)], "mimu")["kappa"] == 100  # nothing retrained, a tie
    # The scale is the run's, not the method's: another method has an Avg Gap, so this one is not ranked by scores.
    others = [gapped(100, None, 90, 10), gapped(200, None, 0, 100)]
    others[0]["validation"]["novel"]["avg_gap"] = 3.0
    assert choose(others, "mimu")["kappa"] == 100
    # Rounding decides nothing: of equal points the smaller kappa.
    assert choose([gapped(100, 0.1 + 0.2), gapped(200, 0.3)], "mimu")["kappa"] == 100


def test_the_answers_mask_is_that_of_its_chosen_point(records):
    answer = answer_of(records)
    assert answer
    assert answer["id"] == "5-200"
    unmeasured = [one | {"answer": "mimu_refined"} for one in records]
    assert answer_of(unmeasured) is None  # three masks, and nothing to choose by
    assert answer_of(unmeasured[:1]) == unmeasured[0]


OLD = ["-", "-", "0.500"]  # seconds, of a record that knows those per request alone


def test_seconds_stand_in_three_columns(records):
    """Once per classifier, one request alone, per request; what is unknown of one point is unknown of the mean."""
    names = ["once per classifier [s]", "one request alone [s]", "per request [s]"]
    for one in records:
        one["methods"]["mimu"] |= {"seconds_offline": 20.0, "seconds_alone": 20.5}
        one["methods"]["default"] |= {"seconds_offline": None, "seconds_alone": None}
    rows = table(records)
    first = rows[0].index(names[0])
    assert rows[0][first : first + 3] == names
    assert rows[1][first : first + 3] == ["20.000", "20.500", "0.500"]
    assert rows[2][first : first + 3] == OLD


def test_table_and_headline_by_hand(records):
    rows = marked(table(records))
    assert rows[0][:4] == ["method", "top_k", "kappa", "forget_loss [nats, ↑]"]
    assert "unheard_of [furlongs, ↓]" in rows[0]
    assert rows[1] == ["MIMU", "5", "200", "**1**", "**2**", "**0.12**", "**12**", "**78**", "**1.5**", "200", *OLD]
    assert rows[2][3:6] == ["1", "2", "0.9"]  # the untouched classifier is a reference, never the best
    assert rows[3][:3] == ["a novel method", "-", "100"]
    rows = table(records)
    assert as_csv(rows).splitlines()[1] == "MIMU,5,200,1,2,0.12,12,78,1.5,200,-,-,0.500"
    assert len({len(line) for line in as_text(rows).splitlines()}) == 1
    assert headline(records) == (
        "Switching off 200 weights (20.0 % of the layer), class 1 is recognised 12.0 % of the time (before: 90.0 %); "
        "the other classes score 78.0 % (before: 80.0 %)."
    )


def test_the_headline_says_the_answer_s_word(records):
    """It is that of the chosen point, and no complaint."""
    plain, word = headline(records), {"key": "suppressed", "sentence": "probe_layers_gap +9.0 points"}
    records[1]["verdicts"]["mimu"] = [{"key": "collapsed", "sentence": "too much is lost"}]
    records[0]["verdicts"]["mimu"] = [word]  # not the point that is chosen
    assert headline(records) == plain
    records[1]["verdicts"]["mimu"] = [word, {"key": "fine", "sentence": "nothing found"}]
    assert headline(records) == f"{plain} In a word: suppressed, probe_layers_gap +9.0 points."


def test_verdicts_of_the_chosen_point_are_shown(records):
    assert (remarks(records), "verdict" in table(records)[0]) == ([], False)  # a record from before there were any
    bad, fine = {"key": "collapsed", "sentence": "too much is lost"}, {"key": "fine", "sentence": "nothing found"}
    records[0]["verdicts"] |= {"mimu": [fine]}  # not the point that is chosen
    records[1]["verdicts"] |= {"mimu": [bad, {"key": "too random", "sentence": "it guesses"}], "default": [fine]}
    rows = table(records)
    assert [row[-1] for row in rows] == ["verdict", "collapsed, too random", "-", "-"]
    assert rows[1][-5:-1] == ["200", *OLD]
    records[0]["verdicts"]["default"] = [fine]
    assert [row[-1] for row in table(records)][2] == "fine"
    assert remarks(records) == ["MIMU: too much is lost.", "MIMU: it guesses."]
    for name in ("default", "novel"):
        records[0]["verdicts"][name] = [{"key": "fine", "sentence": "nothing found; not checked"}]
    assert remarks(records)[2:] == ["untouched, a novel method: nothing found; not checked."]


def test_a_value_that_is_not_there_says_why_of_the_chosen_point(records):
    """Once for all methods that lack it for the same reason."""
    records[0]["undefined"]["mimu"] = {"IDI": "of another point"}
    records[1]["undefined"]["mimu"] = {"IDI": "it is a ratio to nothing"}
    for one in records:
        one["undefined"] |= {"default": {"IDI": "it is a ratio to nothing"}, "novel": None}
    assert remarks(records) == ["MIMU, untouched: IDI is not defined: it is a ratio to nothing."]


def test_what_holds_of_most_methods_names_the_others(records):
    """Reasons that several metrics share are said once."""
    names = [f"novel-{i}" for i in range(6)]
    reason = {"IDI": "nothing to divide by", "UA": "nothing to divide by", "RA": "no images"}
    for field in EACH:
        for one in records:
            one[field] |= dict.fromkeys(names, one[field]["novel"])
    for one in records:
        one["labels"] |= {name: f"method {name[-1]}" for name in names}
        one["undefined"] |= dict.fromkeys(names, reason)
    said = "IDI, UA are not defined: nothing to divide by."
    assert remarks(records) == [
        f"all methods but MIMU, untouched, a novel method: {said}",
        "all methods but MIMU, untouched, a novel method: RA is not defined: no images.",
    ]
    for one in records:
        one["undefined"] |= dict.fromkeys(("mimu", "default", "novel"), reason)
    assert remarks(records)[0] == f"all methods: {said}"
    for one in records:
        one["undefined"] |= dict.fromkeys(names[:4])
    assert remarks(records)[0] == f"MIMU, untouched, a novel method, method 4, method 5: {said}"


def test_terms_that_tell_no_method_from_another_are_named(records):
    """Of methods that forget: neither the untouched classifier nor one that forgets nothing counts."""
    values = {"mimu": (0, 100, 95, 90, 100), "default": (90, 0, 0, 0, 0), "novel": (0.5, 99, 91, 91.5, 99.2)}
    for one in records:
        for name, figures in values.items():
            one["methods"][name] |= dict(zip(("forget_score", *TERMS), figures, strict=True))
    assert remarks(records) == [
        "Saturated terms of Avg Gap, among the 2 methods that leave at most 1 % of the class: UA (99.0 to 100.0 %), "
        "MIA (99.2 to 100.0 %)."
    ]
    for one in records:
        one["methods"]["novel"]["forget_score"] = 1.5
    assert remarks(records) == []


def test_a_reference_that_failed_its_check_is_named(records):
    for one in records:
        one["references"] = [
            {"index": 0, "sane": True, "why": None},
            {"index": 1, "sane": False, "why": "it still knows"},
        ]
    assert warnings(records) == ["Retrained model 1, not used to choose or to compare with: it still knows."]
    assert remarks(records) == []


def test_a_method_that_diverged_has_a_row_without_figures_and_no_place_in_figures(records):
    for one in records:
        for part in ("methods", "validation"):
            one[part]["novel"] = dict.fromkeys(one[part]["novel"])
        one["verdicts"] |= {"novel": [{"key": "diverged", "sentence": "its loss is no longer finite"}]}
        one["confusion"]["novel"] = one["class_probability"]["novel"] = None
    row = table(records)[3]
    assert (row[0], set(row[3:-1]), row[-1]) == ("a novel method", {"-"}, "diverged")
    (panel,) = time_against_quality([records])
    assert "a novel method" not in {series.label for series in panel.series}
    assert figures_of([records])
    assert remarks(records) == ["a novel method: its loss is no longer finite."]
    half = dict(records[0], validation={**records[0]["validation"], "mimu": records[0]["validation"]["novel"]})
    assert choose([half, records[1]], "mimu") is records[1]  # a point that diverged is chosen last


def family() -> list[Run]:
    """Three seeds, two points each; forget scores of the chosen point 10, 12, 14."""
    return runs_of(
        record(5, kappa, (kappa / 20, 79), (score, 78), seed=seed, run=f"run-{seed}")
        for seed, scores in enumerate(((10, 50), (12, 60), (14, 40)))
        for kappa, score in zip((100, 200), scores, strict=True)
    )


def test_mean_and_interval_over_runs():
    runs = family()
    assert families(runs) == [runs]
    mean, half = 12, 4.302652729749464 * 2 / math.sqrt(3)  # t(2) at 97.5 %, standard deviation 2
    found = over_cells(by_seed([10], [12], [14]))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((mean, mean - half, mean + half, 3))
    assert over_cells(by_seed([10])) == Estimate(10, None, None, 1)
    rows = marked(table(*runs))
    assert rows[1][:3] == ["MIMU", "5", "100"]
    assert rows[1][6] == "**12 ± 5**"
    assert rows[2][6] == "90 ± 0"
    assert caption(*runs).endswith("mean ± 95 % interval over the seeds, n = 3 runs (classes 1; seeds 0, 1, 2)")


def test_runs_of_one_classifier_are_averaged_before_the_interval():
    """Two classes of three seeds: the interval is that of the three means, whatever the classes differ by."""
    alone = family()
    other = [changed(run, forget_class=[2], run=f"{run[0]['run']}-2") for run in alone]
    for run in other:
        for one in run:
            one["methods"]["mimu"] = one["methods"]["mimu"] | {
                "forget_score": one["methods"]["mimu"]["forget_score"] + 40
            }
    both = [*alone, *other]
    assert families(both) == [sorted(both, key=lambda run: (run[0]["seed"], run[0]["forget_class"]))]
    rows, single = (marked(table(*runs)) for runs in (both, alone))
    assert (single[1][6], rows[1][6]) == ("**12 ± 5**", "**32 ± 5**")
    assert "n = 6 runs (classes 1, 2; seeds 0, 1, 2)" in caption(*both)
    one_seed = [alone[0], other[0]]
    assert marked(table(*one_seed))[1][6] == "**30**"
    assert "mean; one classifier, so no interval over seeds, n = 2 runs (classes 1, 2; seeds 0)" in caption(*one_seed)


def by_seed(*seeds: list[float]) -> dict[Cell, float]:
    """Values of the classes of each seed, by cell."""
    return {
        Cell(seed=seed, classes=(label,)): value
        for seed, values in enumerate(seeds)
        for label, value in enumerate(values)
    }


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_interval_is_students(values):
    found, error = over_cells(by_seed(*([value] for value in values))), stats.sem(values)
    if error > 1e-6:
        expected = stats.t.interval(0.95, len(values) - 1, math.fsum(values) / len(values), error)
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_another_setting_is_another_family_and_a_repetition_takes_the_place_of_the_older(capsys):
    runs = family()
    runs[0][0]["config"]["train"]["epochs"] = 3
    assert sorted(map(len, families(runs))) == [1, 2]
    again = [[one | {"run": "new", "provenance": one["provenance"] | {"started": "2027"}} for one in runs[1]]]
    capsys.readouterr()
    assert [run[0]["run"] for run in max(families(runs + again), key=len)] == ["new", "run-2"]
    assert "run run-1 is left out of its family: new repeats it" in capsys.readouterr().err


def changed(run: list[dict], /, **more) -> list[dict]:
    """A run with other facts; dotted names are written with two underscores, `config__train__epochs`."""
    made = copy.deepcopy(run)
    for one in made:
        for name, value in more.items():
            *parents, last = name.split("__")
            inner = one
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
    return made


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        (("abcdefgh", "abcdefghi"), ["8", "9 with i"]),
        (("abcdefgh", "abcdefij"), ["8 with g h", "8 with i j"]),
        (("abcd", "abcdefghijk"), ["4", "11 with e f g ..."]),
        (("abc", "abd"), ["a b c", "a b d"]),  # short ones are told whole
        (
            ("abcdefg", "bacdefg"),
            ["a b c d e f g", "b a c d e f g"],
        ),  # and where the short form is no difference
    ],
)
def test_long_lists_are_told_by_their_length_and_what_others_lack(lists, told):
    runs = family()[:2]
    runs = [changed(run, config__eval={"methods": list(one)}) for run, one in zip(runs, lists, strict=True)]
    assert told_apart(families(runs)) == [f"eval.methods {text}" for text in told]


@pytest.mark.parametrize(
    "facts",
    [
        {"images": "other"},
        {"code": "other"},
        {"given__classifier": "a"},
        {"given__graphs": "a"},
        {"given__gcn": "a"},
        {"config__kappa": "auto"},
        {"config__train__epochs": 3},
        {"config__gcn": {"steps": 4}},
        {"provenance__versions": {"torch": "9"}},
        {"provenance__device": "cuda:1"},
        {"model": "another"},
    ],
    ids=lambda facts: next(iter(facts)),
)
def test_nothing_is_pooled_that_differs_in_more_than_seed_and_classes(facts):
    runs = family()
    odd = changed(runs[1], **facts)
    assert [len(group) for group in families([runs[0], odd, runs[2]])] == [2, 1]
    if "model" not in facts:
        told = told_apart(families([runs[0], odd, runs[2]]))
        assert all(told)  # each says what tells it from the other
        assert told[0] != told[1]


def test_the_points_of_the_sweep_are_part_of_a_family():
    """A point chosen of two and one chosen of one are no repeats of each other; kappas that auto found may differ."""
    runs = family()
    assert [len(group) for group in families([runs[0], runs[1][:1]])] == [1, 1]
    assert told_apart(families([runs[0], runs[1][:1]])) == ["kappa tried 100 200", "kappa tried 100"]
    found = [changed(run[place:][:1], auto={"achieved": True}) for run, place in ((runs[0], 0), (runs[1], 1))]
    assert [len(group) for group in families(found)] == [2]
    mixed = families([changed(found[0], config__kappa="auto"), changed(runs[0][:1], seed=1, config__kappa="list")])
    assert told_apart(mixed) == ["kappa auto", "kappa list"]
    assert family_key(changed(runs[0], config__auto={"tau": 3})) == family_key(runs[0])  # no effect on a list


@pytest.mark.parametrize(
    "facts",
    [
        {"seed": 7, "config__seed": 7},
        {"forget_class": [2, 1], "config__forget_class": [2, 1]},
        {"config__dataset_path": "/elsewhere", "config__vision_dataset": "FOLDER", "dataset": "FOLDER"},
        {"config__gcn_path": "b", "config__graph_dir": "b", "config__trained_vision_model_path": "b"},
        {"config__device": "cpu", "config__output_dir": "b", "config__reporter": {}, "config__resume": True},
        {"config__data": {"num_workers": 4, "skip_bad_images": True}},
    ],
    ids=lambda facts: list(facts)[-1],
)
def test_files_and_folders_count_by_what_they_hold(facts):
    runs = family()
    assert family_key(changed(runs[0], **facts)) == family_key(runs[0])


def test_two_datasets_of_one_name_are_told_apart():
    one = changed(family()[0], dataset="FOLDER", config__dataset_path="/x/pets")
    two = changed(one, images="abcdef0123", run="other", config__dataset_path="/y/pets")
    groups = families([one, two])
    assert told_apart(groups) == ["images 1f2e3d", "images abcdef"]
    rows = grid(groups, "forget_score")
    assert [row[:4] for row in rows] == [
        ["model", "dataset", "apart by", "runs"],
        ["M", "FOLDER pets", "images 1f2e3d", "1"],
        ["M", "FOLDER pets", "images abcdef", "1"],
    ]
    assert caption(one, apart="images 1f2e3d").startswith("M on FOLDER pets (images 1f2e3d), forgetting class 1")


def leading(ours: list[float], theirs: list[float], better: str = "lower", retrain: list[float] | None = None):
    runs = []
    for seed, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        one = record(5, 100, (5, 79), (5, 79), seed=seed, run=str(seed))
        for name, value in (("mimu", a), ("novel", b), ("default", -1e9), ("retrain", (retrain or ours)[seed])):
            one["methods"][name] = one["validation"][name] = values(5, 79, 1) | {"m": value}
            one["labels"][name], one["axes"][name] = name, []
        runs.append([one])
    return leaders(chosen_in(runs), "m", better)


def test_leaders_by_hand():
    assert leading([1], [2]) == {"mimu"}
    assert leading([1], [2], "higher") == {"novel"}
    assert leading([2], [2]) == {"mimu", "novel"}
    assert leading([1, 5, 9], [1.2, 5.1, 9.2]) == {"mimu"}  # differences 0.2, 0.1, 0.2: no doubt
    assert leading([1, 5, 9], [2, 4, 10]) == {"mimu", "novel"}  # 1, -1, 1: may be chance
    assert leading([1], [4], "retrain", [3]) == {"novel"}  # closest to the retrained model


def test_a_dropped_logit_s_loss_leads_nowhere():
    """10,000 nats are what the method wrote; the highest loss that was measured is the best."""
    one = record(5, 100, (5, 79), (5, 79))
    for part in ("methods", "validation"):
        for name, loss in (("mimu", 12.5), ("novel", 10_000.0)):
            one[part][name]["forget_loss"] = loss
    assert leaders(chosen_in([[one]]), "forget_loss", "higher") == {"mimu"}
    for part in ("methods", "validation"):
        one[part]["novel"]["forget_loss"] = 103.0  # float32 still tells such a probability from 0
    assert leaders(chosen_in([[one]]), "forget_loss", "higher") == {"novel"}
    assert measurable(1e4, "%")


def test_interval_of_a_single_run_comes_from_the_record(records):
    for one in records:
        one["intervals"] |= {
            "mimu": {"forget_score": {"value": 12, "low": 9, "high": 18, "n": 50}},
            "novel": {"forget_score": {"value": 40, "low": 17, "high": 60, "n": 50}},
        }
    assert [row[6] for row in marked(table(records))[1:]] == ["**12 [9, 18]**", "90", "**40 [17, 60]**"]
    records[0]["intervals"]["novel"]["forget_score"]["low"] = 19  # of novel's chosen point: apart now
    assert [row[6] for row in marked(table(records))[1:]] == ["**12 [9, 18]**", "90", "40 [19, 60]"]
    band = over([records], "forget_score", "kappa").series[0]
    assert (band.y, band.low, band.high) == ([12, 12], [9, 9], [18, 18])


def test_latex_by_hand():
    rows = [["a_b [%, ↓]", "c & d"], [Lead("1 ± 2"), "x^2"]]
    lines = as_latex(rows, "50 % of #1").splitlines()
    assert r"\caption{50 \% of \#1}" in lines
    assert r"a\_b [\%, $\downarrow$] & c \& d \\" in lines
    assert r"\textbf{1 $\pm$ 2} & x\textasciicircum{}2 \\" in lines
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert as_csv(rows).splitlines() == ['"a_b [%, ↓]",c & d', "1 ± 2,x^2"]


def test_grid_has_a_row_for_each_family_and_says_what_is_missing(records):
    other: list[dict[str, Any]] = [record(5, 100, (5, 79), (3, 78), run="other")]
    other[0] |= {"model": "HookedResnet", "dataset": "MNIST"}
    del other[0]["labels"]["novel"], other[0]["methods"]["novel"], other[0]["validation"]["novel"]
    groups = families([records, other])
    rows = marked(grid(groups, "forget_score"))
    assert rows[0] == ["model", "dataset", "runs", "MIMU", "untouched", "a novel method"]
    assert rows[1:] == [
        ["HookedResnet", "MNIST", "1", "**3**", "90", "-"],
        ["M", "D", "1", "**12**", "90", "40"],
    ]
    missing = without_records(groups)
    assert "HookedMLPClassifier on MNIST" in missing
    assert "HookedResnet on MNIST" not in missing


def test_shown_by_hand():
    cases = {
        Estimate(12, None, None, 1): "12",
        Estimate(12, 9, 15, 3): "12 ± 3",
        Estimate(12, -148, 172, 2): "12 ± 160",
        Estimate(12, -87.6, 111.6, 2): "12 ± 100",
        Estimate(0, 0, 7.1, 50): "0 [0, 7.1]",
        Estimate(-2.4e-15, -2.9, 2.9, 3): "0 ± 2.9",
        Estimate(1.4e-5, None, None, 1): "1.4e-05",
    }
    assert [shown(figure) for figure in cases] == list(cases.values())
    assert shown(None) == "-"
    assert shown(over_cells(by_seed([0.1 + 0.2], [0.3]))) == "0.3 ± 0"


# --- figures ----------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(POINTS)
def test_pareto_front_is_what_nothing_beats(points):
    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

    assert pareto(points) == sorted({p for p in points if not beaten(p)})


def test_curves_by_hand(records):
    panel = over([records], "unheard_of", "kappa")
    drawn = {(one.label, one.kind): (one.x, one.y) for one in panel.series}
    assert drawn == {
        ("MIMU, top_k 5", "line"): ([100, 200], [0, 1.5]),
        ("MIMU, top_k 9", "line"): ([200], [2.5]),
        ("untouched", "level"): ([0], [11.25]),
        ("a novel method", "line"): ([100, 200], [5, 5]),
    }
    (line,) = [one for one in over([records], "unheard_of", "top_k").series if one.kind == "line"]
    assert (line.label, line.x, line.y) == ("MIMU, kappa 200", [5, 9], [1.5, 2.5])
    assert {"unheard_of_over_kappa", "unheard_of_over_top_k", "trade_off"} <= set(figures_of([records]))


def test_bands_span_the_seeds():
    line = next(one for one in over(family(), "forget_score", "kappa").series if one.label.startswith("MIMU"))
    expected = [over_cells(by_seed([10], [12], [14])), over_cells(by_seed([50], [60], [40]))]
    assert (line.x, line.y) == ([100, 200], [12, 50])
    assert list(zip(line.low, line.high, strict=True)) == [(one.low, one.high) for one in expected]
    wild = runs_of(record(5, 100, (5, 79), (s, 78), seed=i, run=f"{i}") for i, s in enumerate((0, 90)))
    line = next(one for one in over(wild, "forget_score", "kappa").series if one.label.startswith("MIMU"))
    assert (line.y, line.low, line.high) == ([45], [0], [100])  # percent end there
    again = [changed(run, forget_class=[2], run=f"{run[0]['run']}-2") for run in wild]  # other classes, no other seed
    line = next(one for one in over([*wild, *again], "forget_score", "kappa").series if one.label.startswith("MIMU"))
    assert (line.y, line.low, line.high) == ([45], [0], [100])


def test_trade_off_has_front_and_star(records):
    for one in records:
        one["labels"]["retrain"], one["axes"]["retrain"] = "retrained", []
        one["verdicts"]["retrain"], one["intervals"]["retrain"] = [], {}
        for field in ("confusion", "class_score", "taken_for"):
            one[field]["retrain"] = None
        one["methods"]["retrain"] = one["validation"]["retrain"] = values(0, 95, 50)
    (panel,) = figures_of([records])["trade_off"]
    kinds = {one.label: one for one in panel.series}
    assert (kinds["retrained"].kind, kinds["retrained"].x, kinds["retrained"].y) == ("star", [0], [95])
    assert (kinds["Pareto front"].x, kinds["Pareto front"].y) == ([0], [99])  # the reference is no part of it


finite = st.floats(-1e6, 1e6)


def test_shown_range_by_hand():
    others = [97.8, 98.1, 98.8]
    assert shown_range([*others, 40.9], [98.1, 98.5]) == (97.8, 98.8)  # SFT's 41 % would leave a fiftieth to the rest
    assert shown_range([86, 90, 94, *others], [98.1, 98.5]) == (86, 98.8)  # from value to value
    assert shown_range([0.044, 0.07, 1.8, 5.0], [0.044, 0.045]) == (0.044, 0.045)
    assert shown_range([0.044, 0.05, 1.8, 5.0], [0.044, 0.045]) == (0.044, 0.05)
    assert shown_range([0, 30, 50], [0, 50]) == (0, 50)


@settings(deadline=None)
@given(st.lists(finite, min_size=1), st.lists(finite, min_size=1))
def test_an_axis_holds_what_is_kept_and_leaves_out_only_what_crushes(others, kept):
    low, high = shown_range([*others, *kept], kept)
    assert low <= min(kept)
    assert max(kept) <= high
    assert {low, high} <= {*others, *kept}
    size = max(high - low, 0.01 * max(abs(low), abs(high)))
    above, below = [v - high for v in others if v > high], [low - v for v in others if v < low]
    assert not above or min(above) > 6 * (max(kept) - min(kept))
    assert not below or min(below) > 6 * size


def test_what_lies_beyond_an_axis_is_named_at_its_edge(records):
    for one in records:
        for part in ("methods", "validation"):
            for name, score in (("mimu", 98.0), ("default", 98.5), ("novel", 41.0)):
                one[part][name]["retain_score"] = score
    panels = figures_of([records])
    for name in ("trade_off", "retain_score_over_kappa"):
        (panel,) = panels[name]
        assert (panel.above, panel.below) == ([], ["a novel method 41"])
        assert panel.y_range == (98.0, 98.5)
        assert any("\u25bc a novel method 41" in text.get_text() for text in draw([panel]).axes[0].texts)
    for one in records:
        for part in ("methods", "validation"):
            one[part]["novel"]["forget_loss"] = 10_000.0
    (panel,) = figures_of([records])["forget_loss_over_kappa"]
    assert (panel.above, panel.y_range, panel.y_log) == (["a novel method 1e+04"], (1.0, 1.0), False)


def test_numbers_of_a_logarithmic_axis_are_text_and_no_formulas():
    """A formula takes as long as the rest of a panel. Which numbers are named is still for matplotlib to choose."""
    steps = Series("", [0.0, 1.0, 2.0], [5.0, 500.0], "steps")
    x, y = (draw([Panel("", "", "", [steps], x_log=log, y_log=not log)]).axes[0] for log in (True, False))
    x.set_xlim(0.3, 0.9)
    assert [x.xaxis.get_major_formatter()(value) for value in (1e-3, 1.0, 1e12)] == [
        "10\u207b\u00b3",
        "10\u2070",
        "10\u00b9\u00b2",
    ]
    x.xaxis.get_minor_formatter().set_locs([0.4, 0.5])
    assert x.xaxis.get_minor_formatter()(0.4) == "4\u00d710\u207b\u00b9"
    assert [y.yaxis.get_major_formatter()(value) for value in (0, -10)] == ["0", "\u221210\u00b9"]


def test_a_logarithmic_axis_that_ends_early_holds_intervals_that_reach_below_zero():
    """Over two seeds the loss of MIMU is 5 ± 50; a dropped logit's is named at the edge."""
    runs = [[full(5, kappa, 12, seed=seed, run=str(seed)) for kappa in (100, 400)] for seed in (0, 1)]
    for seed, run in enumerate(runs):
        for one, loss in zip(run, (1.0 + 8 * seed, 50.0), strict=True):
            for name, value in (("mimu", loss), ("default", 0.002), ("novel", 10_000.0)):
                one["methods"][name]["forget_loss"] = value
    (panel,) = figures_of(runs)["forget_loss_over_kappa"]
    assert (panel.y_log, panel.above) == (True, ["a novel method 1e+04"])
    assert min(low for one in panel.series for low in one.low or [1]) < 0
    assert panel.y_range is not None
    assert 0 < panel.y_range[0] <= 0.002
    low, high = draw([panel]).axes[0].get_ylim()
    assert 0 < low < 0.002
    assert 50 < high < 10_000


def test_probes_stage_by_stage_and_relearning_by_hand(records):
    for one in records:
        one["metrics"] |= {name: about("%", "retrain") for name in ("probe_layers", "relearn_1", "relearn_10")}
        one["by_stage"] |= {"mimu": {"probe_layers": {"a.1": 40.0, "b": 60.0}}, "novel": None}
        one["by_stage"]["default"] = {"probe_layers": {"a.1": 90.0, "b": 95.0}}
        one["methods"]["mimu"] |= {"relearn_1": 30.0, "relearn_10": 70.0}
        one["methods"]["novel"] |= {"relearn_1": None, "relearn_10": 80.0}
    drawn = figures_of([records])
    (panel,) = drawn["probes"]
    assert (panel.ticks, [(one.label, one.x, one.y) for one in panel.series]) == (
        ["a.1", "b"],
        [("MIMU", [0, 1], [40, 60]), ("untouched", [0, 1], [90, 95])],
    )
    (panel,) = drawn["relearning"]
    assert (panel.ticks, [(one.label, one.x, one.y) for one in panel.series]) == (
        ["1", "10"],
        [("MIMU", [0, 1], [30, 70]), ("a novel method", [1], [80])],
    )


def test_classes_before_and_after_by_hand(records):
    (panel,) = per_class([records])
    assert {one.label: one.y for one in panel.series} == {"untouched": [100, 90, 100], "MIMU": [100, 20, 100]}
    (panel,) = forgotten_taken_for([records])
    assert {one.label: one.y for one in panel.series} == {"untouched": [0, 90, 10], "MIMU": [0, 20, 80]}
    (panel,) = confusion_difference([records])
    assert panel.cells == [[0, 0, 0], [0, -70, 70], [0, 0, 0]]


def test_many_classes_are_cut_or_joined_and_it_says_so():
    one = record(5, 100, (50, 80), (50, 80), classes=300)
    one["class_probability"]["mimu"][250] = 0.5
    (panel,) = class_probability([[one]])
    assert len(panel.ticks or []) == MOST_BARS
    assert {"1", "250"} <= set(panel.ticks or [])
    assert "20 of 300 classes" in panel.title
    one["class_probability"] = {name: [0.0] * 300 for name in one["class_probability"]}
    one["class_probability"]["mimu"][250] = 1.0
    (panel,) = class_probability([[one]])
    assert panel.ticks == ["1", "250"]  # the forgotten class, and no class of which there is nothing to draw
    assert "(2 of 300 classes; the others' median: 0)" in panel.title
    one = record(5, 100, (50, 80), (50, 80), classes=300)
    one["class_probability"]["mimu"][250] = 0.5
    (panel,) = class_probability([[one]])
    (ax,) = draw([panel]).axes
    assert len(ax.patches) == 2 * MOST_BARS
    (panel,) = per_class([[one]])
    assert panel.ticks == ["1"]  # the one class that changes
    assert panel.title.endswith("the others' median change: 0)")  # the bars are accuracies of 100
    (panel,) = confusion_difference([[one]])
    assert "blocks of 15 of 300 classes" in panel.title
    assert list(panel.ticks or [])[:2] == ["0-14", "15-29"]
    assert sum(itertools.chain(*(panel.cells or []))) == pytest.approx(0)


def test_records_of_a_thousand_classes_have_tables_of_their_own():
    one = record(5, 100, (50, 80), (50, 80))
    one["confusion"] = {"mimu": None, "default": None}
    one["class_score"] = {"default": [100.0] * 1000, "mimu": [100.0] * 998 + [10.0, None]}
    one["taken_for"] = {"default": [0, 8] + [0] * 998, "mimu": [0, 0, 6, 2] + [0] * 996}
    (panel,) = per_class([[one]])
    assert "998" in (panel.ticks or [])
    assert panel.series[1].y[(panel.ticks or []).index("998")] == 10
    (panel,) = forgotten_taken_for([[one]])
    assert panel.series[1].y[(panel.ticks or []).index("2")] == 75
    assert confusion_difference([[one]]) == []


def test_map_of_a_mask_shows_every_weight_once(records):
    (panel,) = figures_of([records])["mask_map"]
    assert panel.cells == [[1, 0], [2, 5]]
    assert panel.title == "switched off in w,\n4 x 2, kappa 200,\ncells of 2 x 1 weights"
    heat, right, top = (lambda ax: (ax, *ax.child_axes))(draw([panel]).axes[0])
    assert [bar.get_width() for bar in right.patches] == [1, 7]
    assert [bar.get_height() for bar in top.patches] == [3, 5]
    assert heat.images[0].get_array().tolist() == panel.cells


def test_scales_of_a_map_are_whole_numbers(records):
    (panel,) = figures_of([records])["mask_map"]
    figure = draw([replace(panel, cells=[[1, 0], [0, 1]])])
    heat, bar = figure.axes
    right, top = heat.child_axes
    for ticks in (bar.get_yticks(), right.get_xticks(), top.get_yticks()):
        assert len(ticks) > 1
        assert all(tick == int(tick) for tick in ticks)


def test_training_curves_are_thinned():
    history = [{"step": step, "loss": 1 / step, "nll": None} for step in range(1, 2001)]
    (panel,) = training(history, "gcn", "gcn")
    assert panel.series[0].x[:2] == [1, 6]
    assert len(panel.series[0].x) == 400


def test_figures_fit_one_column_and_name_every_line(records):
    for name, panels in figures_of([records]).items():
        figure = draw(panels)
        assert figure.get_figwidth() == COLUMN * (2 if len(panels) > 3 else 1), name
        named = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        assert named == {one.label for panel in panels for one in panel.series if len(panel.series) > 1}, name


@pytest.mark.slow
def test_labels_are_drawn_as_they_are(records):
    """`$` would begin a formula (`$a_$` none that can be set), a legend passes over what begins with `_`."""
    for one in records:
        one["labels"] |= {"mimu": "$a_$", "novel": "_hidden", "default": "cost $5\x1b"}
    for name, panels in figures_of([records]).items():
        figure = draw(panels)
        figure.draw_without_rendering()
        named = {text.get_text().strip() for legend in figure.legends for text in legend.get_texts()}
        if name == "retain_score_over_kappa":
            assert named == {r"\$a_\$, top_k 5", r"\$a_\$, top_k 9", "_hidden", r"cost \$5\x1b"}


@pytest.mark.parametrize("names", [["0", "1", "12"], ["MIMU (ours)", "untouched"], ["boundary shrink"] * 5])
def test_names_below_bars_lie_over_nothing(names):
    """Short ones are written across, longer ones upwards: beside each other either way."""
    places = list(range(len(names)))
    figure = draw(
        [Panel("a", "method", "b", [Series("c", [*map(float, places)], [1.0] * len(names), "bars")], ticks=names)]
    )
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(one.x1 <= other.x0 for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_file_is_what_matplotlib_itself_writes(records, kind, tmp_path):
    """Bit for bit, though each format is drawn once and not twice; heat maps, legends and logarithmic axes included."""
    every = figures_of([records])
    for name in ("trade_off", "mask_map", "weight_histogram"):
        save(every[name], tmp_path, name, ReporterConfig(formats=(kind,), dpi=50))
        with matplotlib.rc_context(SETTINGS):
            figure, expected = draw(every[name]), io.BytesIO()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            figure.savefig(expected, format=kind, dpi=50, metadata=METADATA[kind])
        assert (tmp_path / f"{name}.{kind}").read_bytes() == expected.getvalue()


def lines(count: int) -> list[Panel]:
    return [
        Panel("a", "x", "y", [Series("s", [1.0, 2.0, 3.5], [float(place), 0.1 + 0.2, 1e-3])]) for place in range(count)
    ]


def test_a_second_process_draws_the_same_files(tmp_path, monkeypatch):
    """Many figures are divided between two processes; together they write what one of them would."""
    config = ReporterConfig(formats=("svg",))
    figures = {"few": lines(1), "many": lines(WORTH)}
    monkeypatch.setattr("reporting.draw._cores", lambda: 2)
    mine, others = _shared(figures)
    assert (list(mine), list(others)) == (["many"], ["few"])
    monkeypatch.setattr("reporting.draw._save_each", lambda figures, *_: list(map(save_only.append, figures)))
    save_only: list[str] = []
    save_all(figures, tmp_path / "two", config)
    assert save_only == ["many"]
    save(figures["few"], tmp_path / "one", "few", config)
    assert (tmp_path / "two/few.svg").read_bytes() == (tmp_path / "one/few.svg").read_bytes()


@pytest.mark.parametrize(("cores", "panels"), [(1, 100), (2, 1)])
def test_no_second_process_where_it_would_not_pay(cores, panels, monkeypatch):
    monkeypatch.setattr("reporting.draw._cores", lambda: cores)
    figures = {"a": lines(panels), "b": lines(1)}
    assert _shared(figures) == (figures, {})


def test_what_a_second_process_fails_to_draw_is_drawn_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reporting.draw._cores", lambda: 2)
    monkeypatch.setattr("sys.executable", "/bin/false")
    drawn: list[str] = []
    monkeypatch.setattr("reporting.draw._save_each", lambda figures, *_: drawn.extend(figures))
    save_all({"few": lines(1), "many": lines(WORTH)}, tmp_path, ReporterConfig())
    assert drawn == ["many", "few"]
    assert "a second process could not draw" in capsys.readouterr().err


def test_a_figure_whose_panels_did_not_change_is_kept(records, tmp_path, monkeypatch):
    """The oracle is what would be drawn: only figures whose panels hold something else are handed on."""
    monkeypatch.setattr("reporter.figures_of", lambda runs: panels)
    handed: list[list[str]] = []

    def draw_all(figures: dict, folder: Path, config: ReporterConfig) -> None:
        handed.append(sorted(figures))
        for name in figures:
            write_text(folder / f"{name}.svg", f"{name} {len(handed)}")

    monkeypatch.setattr("reporter.save_all", draw_all)
    panels = {"a": lines(1), "b": lines(2)}
    (folder,) = Reporter(tmp_path).plot(records)
    panels = {"a": lines(1), "b": lines(3), "c": lines(1)}
    records[0]["methods"]["mimu"]["retain_score"] = 1.0  # so that the folder is out of date
    Reporter(tmp_path).plot(records)
    (folder / "c.svg").write_text("damaged")
    records[0]["methods"]["mimu"]["retain_score"] = 2.0
    Reporter(tmp_path).plot(records)
    Reporter(tmp_path, ReporterConfig(dpi=99)).plot(records)
    assert handed == [["a", "b"], ["b", "c"], ["a", "b", "c"], ["a", "b", "c"]]


@pytest.mark.parametrize("answer", ["novel-1", "novel-20"])
def test_what_stands_beside_each_other_has_colours_of_its_own(records, answer):
    """With more methods than colours too: bars are of the untouched, the answer's and the retrained classifier."""
    names = [f"novel-{i}" for i in range(30)]
    for one in records:
        one["answer"] = answer
        one["labels"] = {name: name for name in [*names, "default", "retrain"]}
    first = records[0]
    assert sorted(in_style(first)) == sorted(first["labels"])
    assert [style_of(first, name) for name in in_style(first)] == list(range(32))
    assert len({style_of(first, name) % len(COLOURS) for name in (answer, "default", "retrain")}) == 3


def test_no_two_of_sixty_methods_have_the_same_mark():
    series = [Series(str(style), [0], [style], "points", style) for style in range(60)]
    marks = draw([Panel("", "", "", series, "")]).axes[0].lines
    told = {(one.get_color(), one.get_marker(), one.get_markersize(), one.get_markerfacecolor()) for one in marks}
    assert len(told) == len(marks) == 60


@pytest.mark.parametrize("count", [3, 34, 80])
def test_many_methods_leave_a_figure_its_height(count):
    """Their names stand below it: the figure grows with them."""
    series = [Series(f"method {place} of those", [0, 1], [place, 1], "line", place) for place in range(count)]
    figure = draw([Panel("title", "x", "y", series, "alt")])
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1.4
    (legend,) = figure.legends
    low, high = legend.get_window_extent().intervaly
    assert low > -1
    assert high / figure.dpi < figure.axes[0].get_position().y0 * figure.get_figheight()


def test_levels_are_told_apart_in_grey(records):
    (panel,) = figures_of([records])["retain_score_over_kappa"]
    levels = [replace(next(one for one in panel.series if one.kind == "level"), style=style) for style in range(4, 8)]
    dashes = [
        str(line.get_linestyle()) + str(line._unscaled_dash_pattern)
        for line in draw([replace(panel, series=levels)]).axes[0].lines
    ]
    assert len(set(dashes)) == 4


# --- what is written --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bytes_are_reproducible_and_nothing_is_drawn_twice(records, tmp_path, monkeypatch):
    config = ReporterConfig(formats=("png", "svg", "pdf"), dpi=30)
    drawn = [Reporter(tmp_path / name, config).plot(records)[0] for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in drawn)
    assert first == second
    assert {"forget_score_over_kappa.svg", "trade_off.pdf", "weight_histogram.png", "table.md", "table_all.tex"} <= set(
        first
    )
    assert b"a novel method" in first["table.csv"]
    times = {p.name: p.stat().st_mtime_ns for p in drawn[0].iterdir()}
    Reporter(tmp_path / "a", config).plot(records)
    assert {p.name: p.stat().st_mtime_ns for p in drawn[0].iterdir()} == times
    monkeypatch.setattr("reporter.figures_of", lambda runs: {"trade_off": figures_of(runs)["trade_off"]})
    (drawn[0] / "trade_off.png").unlink()
    Reporter(tmp_path / "a", config).plot(records)
    assert (drawn[0] / "trade_off.png").read_bytes() == first["trade_off.png"]
    records[0]["methods"]["mimu"]["retain_score"] = 1.0
    Reporter(tmp_path / "a", config).plot(records)
    assert (drawn[0] / "trade_off.png").read_bytes() != first["trade_off.png"]


@pytest.mark.slow
def test_broken_and_foreign_records_are_named_and_left_out(records, tmp_path, capsys):
    paths = [record_path(tmp_path, one) for one in records]
    for one, path in zip(records, paths, strict=True):
        write_json(path, one)
    paths[0].write_text("{")
    write_json(paths[1], {"schema": "another"})
    assert read_records(tmp_path) == [records[2]]
    without = {name: value for name, value in records[1].items() if name != "axes"}
    scoreless = records[1] | {"validation": {name: {"avg_gap": 1.0} for name in records[1]["labels"]}}
    for broken in (without, scoreless, records[1] | {"labels": {"mimu": "MIMU", "lost": "lost"}}):
        write_json(paths[1], broken)
        assert read_records(tmp_path) == [records[2]]
    assert Reporter(tmp_path, ReporterConfig(formats=("png",), dpi=20)).plot()
    said = capsys.readouterr().err
    assert str(paths[0]) in said
    assert str(paths[1]) in said
    assert read_json(paths[2]) == records[2]


@pytest.mark.slow
def test_broken_training_curves_are_named_and_left_out(records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "reporter.figures_of", lambda runs: {}
    )  # the others have nothing to do with it, and take seconds
    write_json(record_path(tmp_path, records[0]), records[0])
    history = (tmp_path / records[0]["classifier_path"]).with_name("history.json")
    history.parent.mkdir(parents=True)
    write_json(history, {"history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})
    (folder,) = Reporter(tmp_path, ReporterConfig(formats=("png",), dpi=20)).plot()
    assert (folder / "training_classifier.png").exists()
    changed = history.read_text().replace("2.0", "3.0")
    for text, why in (
        (changed, "its digest says"),
        ("{", "no whole JSON"),
        ("{}", "no digest"),
        ("[1]", "a JSON list"),
    ):
        (folder / "training_classifier.png").unlink()
        history.write_text(text)
        (folder,) = Reporter(tmp_path, ReporterConfig(formats=("png",), dpi=20)).plot()
        said = capsys.readouterr().err
        assert f"left out: {history} is damaged" in said
        assert why in said
        assert not (folder / "training_classifier.png").exists()
        write_json(history, {"history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})
        Reporter(tmp_path, ReporterConfig(formats=("png",), dpi=20)).plot()


def test_no_records_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"no records below .* `uv run main\.py"):
        Reporter(tmp_path).plot()


# --- runs against each other ------------------------------------------------------------------------------


def three(run: str, scores: tuple[float, ...], retain: float = 78) -> list[Run]:
    return runs_of(record(5, 100, (5, 79), (s, retain), seed=i, run=f"{run}{i}") for i, s in enumerate(scores))


def test_compared_by_hand():
    a, b = side("A", three("a", (10, 12, 14))), side("B", three("b", (5, 8, 8)))
    rows = {(row[0], row[1].split(" [")[0]): row for row in compared(a, b).rows[1:]}
    gain = over_cells(by_seed([-5], [-4], [-6]))
    assert rows["MIMU", "forget_score"][2:] == ["3", "3", "12", "7", shown(gain), "B better"]
    assert rows["MIMU", "retain_score"][2:] == ["3", "3", "78", "78", "0 ± 0", "no difference shown"]
    assert rows["untouched", "forget_score"][-1] == "no difference shown"
    assert in_words([["", ""], rows["MIMU", "forget_score"]], "A", "B") == (
        "Of 1 comparisons A is better 0 times; B is better 1 times (MIMU on forget_score); "
        "the others show no difference."
    )
    turned = {(row[0], row[1].split(" [")[0]): row[-1] for row in compared(b, a).rows[1:]}
    assert turned["MIMU", "forget_score"] == "B better"
    doubtful = compared(a, side("C", three("c", (5, 13, 12)))).rows  # -5, 1, -2: may be chance
    assert next(row for row in doubtful if row[0] == "MIMU" and row[1].startswith("forget_score"))[-1] == (
        "no difference shown"
    )
    higher = compared(a, side("D", three("d", (10, 12, 14), retain=80))).rows
    assert next(row for row in higher if row[0] == "MIMU" and row[1].startswith("retain_score"))[-1] == "D better"


def test_one_pair_has_the_intervals_of_its_records():
    sides = []
    for name, (value, low, high) in (("A", (60, 50, 70)), ("B", (30, 20, 40))):
        (run,) = three(name, (value,))
        run[0]["intervals"] |= {"mimu": {"forget_score": {"value": value, "low": low, "high": high, "n": 90}}}
        sides.append(side(name, [run]))
    row = next(row for row in compared(*sides).rows if row[0] == "MIMU" and row[1].startswith("forget_score"))
    half = math.sqrt(200)  # both reach 10 to either side
    assert row[2:] == ["1", "1", "60", "30", f"-30 ± {half:.2g}", "B better"]
    loss = next(row for row in compared(*sides).rows if row[0] == "MIMU" and row[1].startswith("unheard_of"))
    assert loss[-1] == "B ahead; one pair, no interval"


def test_pairs_of_one_classifier_are_no_repeats():
    """Six pairs: of three classifiers they have the interval of three means, of one they have none."""

    def classes(name: str, scores: tuple[float, ...], label: int) -> list[list[dict]]:
        return [changed(run, forget_class=[label], run=f"{run[0]['run']}-{label}") for run in three(name, scores)]

    def said(a: list[Run], b: list[Run]) -> list[str]:
        rows = compared(side("A", a), side("B", b)).rows
        return next(row for row in rows if row[0] == "MIMU" and row[1].startswith("forget_score"))[2:]

    a = [*classes("a", (10, 12, 14), 1), *classes("c", (20, 22, 24), 2)]
    b = [*classes("b", (5, 13, 12), 1), *classes("d", (15, 17, 18), 2)]  # -5 -5, 1 -5, -2 -6: means -5, -2, -4
    gain = over_cells(by_seed([-5], [-2], [-4]))
    assert said(a, b) == ["6", "3", "17", "13.33", shown(gain), "no difference shown"]
    assert stats.ttest_1samp([-5, -5, 1, -5, -2, -6], 0).pvalue < 0.05  # as six repeats they would be a difference
    one = ([run for run in runs if run[0]["seed"] == 0] for runs in (a, b))
    assert said(*one) == ["2", "1", "15", "10", "-5", "B ahead; one classifier, no interval"]


def test_rounding_is_no_difference():
    a, b = side("A", three("a", (0.3, 0.3, 0.3))), side("B", three("b", (0.1 + 0.2,) * 3))
    assert {row[-1] for row in compared(a, b).rows[1:]} == {"no difference shown"}
    a, b = side("A", three("a", (0.3,))), side("B", three("b", (0.1 + 0.2,)))
    assert {row[-1] for row in compared(a, b).rows[1:]} == {"equal; one pair, no interval"}
    assert leading([0.3, 0.3], [0.1 + 0.2] * 2) == leading([0.1 + 0.2] * 2, [0.3, 0.3]) == {"mimu", "novel"}


def test_a_side_with_two_runs_of_one_cell_is_refused_and_both_are_named():
    run, other = three("a", (10,))[0], changed(three("z", (12,))[0], config__train__epochs=9)
    both, b = side("A", [run, other]), side("B", three("b", (5,)))
    message = r"A has 2 runs .* a0 \(train.epochs 2\); z0 \(train.epochs 9\): name the one"
    for sides in ((both, b), (b, both)):
        with pytest.raises(UserError, match=message):
            compared(*sides)
    elsewhere = side("A", [run, changed(other, seed=4)])  # not in question: that cell is in A alone
    assert "Of A without a counterpart in B: z0 (classes [1], seed 4)." in compared(elsewhere, b).about


def test_what_is_compared_is_of_the_same_images():
    one = changed(three("a", (10,))[0], dataset="FOLDER", config__dataset_path="/x/pets")
    moved = changed(one, run="b", config__dataset_path="/y/pets")
    assert compared(side("A", [one]), side("B", [moved])).rows[1][2] == "1"
    others = changed(moved, images="abcdef0123")
    message = (
        r"nothing to pair: their images differ, A has FOLDER pets \(3 classes, 30/10/10 images, 1f2e3d\); "
        r"B has FOLDER pets \(3 classes, 30/10/10 images, abcdef\)"
    )
    with pytest.raises(UserError, match=message):
        compared(side("A", [one]), side("B", [others]))


def test_given_classifiers_are_paired_by_their_contents():
    def given(sha: str | None, trained: str = "x") -> list[dict]:
        return changed(three("a", (10,))[0], given__classifier=sha, classifier_sha256=sha or trained)

    def pairs(one: list[dict], two: list[dict]) -> str:
        return compared(side("A", [one]), side("B", [two])).rows[1][2]

    assert pairs(given("s"), given("s")) == pairs(given(None, "s"), given("s")) == "1"
    assert pairs(given(None, "s"), given(None, "t")) == "1"  # two recipes, one seed: that is what is compared
    for one, two in ((given("s"), given("t")), (given(None, "t"), given("s"))):
        with pytest.raises(UserError, match="their given classifiers differ"):
            pairs(one, two)


def test_a_comparison_says_what_differs_and_where_it_is_written(tmp_path):
    for where, epochs in (("one", 2), ("two", 9)):
        for run in three("a", (10, 12)):
            write_json(record_path(tmp_path / where, run[0]), changed(run, config__train__epochs=epochs)[0])
    said = Reporter(tmp_path).compare([str(tmp_path / "one"), f"{tmp_path}/two/a1"])
    assert "differ in: train.epochs (2 | 9)." in said
    assert f"Of {tmp_path}/one without a counterpart in {tmp_path}/two/a1: a0 (classes [1], seed 0)." in said
    place = tmp_path / "reports/compare-1"
    assert f"written to {place}.md, .csv and .tex" in said
    assert all(place.with_suffix(kind).exists() for kind in (".md", ".csv", ".tex"))


def test_sides_are_found_by_folder_and_by_id(tmp_path):
    for where, name, scores in (("one", "aa", (10, 12)), ("two", "bb", (1, 2))):
        for run in three(name, scores):
            write_json(record_path(tmp_path / where, run[0]), run[0])
    said = Reporter(tmp_path / "one").compare([str(tmp_path / "one"), str(tmp_path / "two")])
    assert "MIMU on forget_score" in said
    assert (tmp_path / "one/reports/compare-1.tex").exists()
    assert find_side("aa1", tmp_path / "one").runs.keys() == {("M", "1f2e3d4c5b", (1,), 1)}
    for names, message in (
        (["aa1"], "needs two"),
        (["aa", "aa1"], "id of 2 runs .* aa0, aa1"),
        (["none", "aa1"], "no folder and the id of 0 runs"),
        (["aa0", "aa1"], "nothing to pair: their seeds differ, aa0 has 0; aa1 has 1"),
        ([str(tmp_path), "aa1"], "no records below"),
    ):
        with pytest.raises(UserError, match=message):
            Reporter(tmp_path / "one").compare(names)
