"""The word for how far a method goes, from measured features to JSON, screen and page.

One real run measures four edits whose word is known from how they are made: a late mask suppresses; a model that was
retrained without the class is as far as retraining; one that reads four numbers of an image is further; and nothing is
untouched. The real Reporter then writes three runs, whose answer is one of these edits each.
"""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.artifacts import write_json
from core.config import PROJECT_ROOT, EvalConfig, ReporterConfig, TrainConfig
from core.records import WORDS, Record, read_records, record_path
from measure.verdicts import LEAST_BAND
from pipeline import Pipeline
from reporter import Reporter
from reporting.page import WORD_OF
from reporting.sentences import DEEP, headline, remarks
from rivals.compared import METHODS
from showing.terminal import terminal_table
from tests.helpers.common import tiny
from unlearn.registry import Context, Edit, Point, method

UNTOUCHED, SUPPRESSED, OVER_ERASED, ERASED = WORDS
EXPECTED = {"mimu": SUPPRESSED, "twin": ERASED, "narrow": OVER_ERASED}
FORGOTTEN, DIRECTIONS = 8, 4

pytestmark = pytest.mark.slow


def twin(context: Context, point: Point) -> Edit:
    """The first of the retrained models: no farther from their mean than one of them is from the others'."""
    assert context.retrain is not None
    return Edit(copy.deepcopy(context.retrain(0)).eval(), None)


def narrow(context: Context, point: Point) -> Edit:
    """The same, but of an image its first layer reads four numbers alone: where it lies along the directions in which
    the retained classes' means differ most. Little is left that could tell a class which is not among these.
    """
    assert context.retrain is not None
    model = copy.deepcopy(context.retrain(0)).eval()
    images, labels = (torch.cat(part) for part in zip(*context.images("train", False), strict=True))
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in labels.unique()])
    directions = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[:DIRECTIONS]
    with torch.no_grad():
        weight = model.weights(0)[0]
        weight.copy_(weight @ directions.T @ directions)
    return Edit(model, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[tuple[Path, Record]]:
    """A run on DIGITS, as its files say it."""
    for name, edit in (("twin", twin), ("narrow", narrow)):
        method(name, name, axes=("seed",))(edit)
    try:
        folder = tmp_path_factory.mktemp("words")
        judged = EvalConfig(
            methods=("mimu", "default", "twin", "narrow"), metrics=("core", "IDI", *LEAST_BAND), references=2
        )
        network = {"gcn_path": PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors", "topK_list": (300,)}
        config = tiny(folder, kappa_list=(300,), forget_class=(FORGOTTEN,), eval=judged, **network)
        Pipeline(replace(config, gcn=type(config.gcn)(), train=TrainConfig(epochs=10))).run()
        (record,) = read_records(folder)
        yield folder, record
    finally:
        for name in ("twin", "narrow"):
            METHODS.pop(name, None)


def with_answer(record: Record, name: str) -> Record:
    """The same record, as if the answer's values and verdicts were those of another method."""
    changed: Any = copy.deepcopy(record)
    answer = record["answer"]
    for field in (
        "methods",
        "validation",
        "verdicts",
        "intervals",
        "undefined",
        "by_stage",
        "degradation",
        "class_probability",
    ):
        changed[field][answer] = changed[field][name]
    changed["methods"][answer]["weights_changed"] = min(
        changed["methods"][answer]["weights_changed"], record["num_graph_vertices"]
    )
    return changed


def test_measured_edits_have_the_word_that_they_are_made_for(run):
    _, record = run
    first = {name: said[0]["key"] for name, said in record["verdicts"].items()}
    assert first == {**EXPECTED, "default": UNTOUCHED}
    for name in EXPECTED:
        assert record["methods"][name]["forget_score"] < 5


def test_the_sentence_names_what_lies_outside_of_its_band(run):
    _, record = run
    said = {name: record["verdicts"][name][0]["sentence"] for name in EXPECTED}
    assert said["twin"].endswith("are within the band")
    assert "relearn_area_10 +" in said["mimu"]
    outside = re.findall(r"(\w+) ([+-])\d+\.\d points \(band \d+\.\d\)", said["narrow"])
    assert {name for name, _ in outside} <= set(LEAST_BAND)
    assert ("probe_layers_gap", "-") in outside


@pytest.mark.parametrize("name", list(EXPECTED))
def test_json_screen_and_page_say_the_word(run, name, tmp_path):
    _, record = run
    changed, word = with_answer(record, name), EXPECTED[name]
    changed["verdicts"]["mimu"] = changed["verdicts"]["mimu"][:1]  # the page would say that narrow is collapsed as well
    path = record_path(tmp_path, changed)
    write_json(path, dict(changed))
    (plots,) = Reporter(tmp_path, ReporterConfig(formats=())).plot()
    html = (tmp_path / "reports" / "index.html").read_text("utf-8").replace("&#39;", "'")
    sentence = record["verdicts"][name][0]["sentence"].replace(">", "&gt;").replace("<", "&lt;")
    (shown,) = re.findall(r'<p class="word"><strong>(.*?)</strong></p>', html)
    assert shown == WORD_OF[word] == {ERASED: "erased"}.get(word, word)
    (because,) = re.findall(r'<p class="headline">.*?</p>\n<p class="soft">(.*?)</p>', html, re.DOTALL)
    assert because == f"{sentence[:1].upper()}{sentence[1:]}."
    assert f"In a word: {word}, {record['verdicts'][name][0]['sentence']}." in headline([changed])
    assert json.loads(path.read_text("utf-8"))["verdicts"]["mimu"][0]["key"] == word
    screen = terminal_table([changed], 200).splitlines()
    (line,) = [line for line in screen if line.startswith(record["labels"]["mimu"])]
    assert word in line
    assert f"| {word}" in (plots / "table.md").read_text("utf-8")


def test_the_features_method_has_its_word_beside_the_answer_s(run):
    """mimu_deep is no mask, so that it is not the answer; its word is said after the answer's."""
    _, record = run
    changed: Any = copy.deepcopy(record)
    plain = headline([record])
    for field in ("labels", "methods", "validation", "verdicts", "axes"):
        changed[field][DEEP] = changed[field]["twin"]
    values = changed["methods"][DEEP]
    assert headline([changed]) == (
        f"{plain} twin changes {values['weights_changed']} numbers: class 8 is recognised "
        f"{values['forget_score']:.1f} % of the time, the other classes score {values['retain_score']:.1f} %. "
        f"In a word: {ERASED}, {changed['verdicts'][DEEP][0]['sentence']}."
    )
    changed["verdicts"][DEEP] = [{"key": "fine", "sentence": "nothing found"}]
    assert headline([changed]) == plain


def test_why_a_value_is_lacking_is_in_the_record_and_in_the_remarks(run):
    """The untouched classifier is asked for its own index: where it has none, the reason is there, and only there."""
    _, record = run
    for name, values in record["methods"].items():
        assert (values["IDI"] is None) == ("IDI" in record["undefined"][name])
    lacking = [name for name in record["labels"] if record["methods"][name]["IDI"] is None]
    said = [line for line in remarks([record]) if "IDI is not defined: " in line]
    assert bool(said) == bool(lacking)
