"""Each verdict is provoked by hand-made figures, and not provoked just beyond its edge."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from config import EvalConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels
from eval import SCORES, Eval
from intervals import wilson
from methods import Context
from model import vision_model_loader
from utils_data import get_unlearning_dataset
from verdicts import (
    CHECKS,
    COLLAPSE_DROP,
    ENTROPY_GAP,
    FORGOTTEN,
    NEAR_CHANCE,
    PROBE_GAP,
    References,
    meanings,
    verdict,
)


def figures(forget: float, retain: float, changed: int = 100, **more: float | None) -> dict[str, float | None]:
    return {"forget_score": forget, "retain_score": retain, "weights_changed": changed, **more}


# 1,000 forget images: beside 90.0 % (interval 88.0 to 91.7) 87.0 % is apart, 88.0 % is not (checked below).
BASE = References(1000, 9000, 10, figures(90, 88, 0))


def keys(one: dict[str, float | None], references: References = BASE) -> list[str]:
    return [said.key for said in verdict(one, references)]


def test_fine_says_what_was_not_checked():
    (said,) = verdict(figures(1, 87.5), BASE)
    assert (said.key, said.sentence) == (
        "fine",
        "nothing found; not checked, for want of probe_gap, entropy_gap, entropy_forget, logit_drop",
    )
    everything = figures(1, 87.5, probe_gap=2.0, entropy_gap=0.01, entropy_forget=0.4)
    (said,) = verdict(everything, replace(BASE, logit_drop=figures(0, 88)))
    assert (said.key, said.sentence) == ("fine", "nothing found")


def test_meanings_give_thresholds_by_value():
    texts = meanings()
    assert list(texts) == [*CHECKS, "fine"]
    assert texts["collapsed"].startswith(f"The retained score is at most {NEAR_CHANCE:g} points above chance")
    assert f"more than {COLLAPSE_DROP:g} points below" in texts["collapsed"]
    assert not any(re.search("[A-Z]{2}", text) for text in texts.values())


def test_no_op():
    assert keys(figures(90, 88, 0)) == ["no-op"]
    assert keys(figures(88, 88, 500)) == ["no-op"]
    assert keys(figures(95, 88, 500)) == ["no-op"]  # recognised more than before is not forgotten either
    assert keys(figures(87, 88, 500)) == ["fine"]
    (said,) = verdict(figures(88, 88, 5000), BASE)
    assert "5,000 weights are changed" in said.sentence
    assert "88.0 % against 90.0 %" in said.sentence


def test_noise_depends_on_the_number_of_images():
    """80 of 100 against 90 of 100 is noise only with few images: Newcombe's interval (.0001, .1995) just clears 0."""
    assert keys(figures(80, 88), replace(BASE, forget_images=100)) == ["fine"]
    assert keys(figures(81, 88), replace(BASE, forget_images=100)) == ["no-op"]
    assert keys(figures(80, 88), replace(BASE, forget_images=50)) == ["no-op"]


def test_outputs_only():
    assert keys(figures(0, 88, 0)) == ["outputs only"]
    assert keys(figures(0, 88, 1)) == ["fine"]


def test_collapsed_by_points_and_by_chance():
    edge = 88 - COLLAPSE_DROP
    assert keys(figures(0, edge)) == ["fine"]
    assert keys(figures(0, edge - 0.1)) == ["collapsed"]
    weak = replace(BASE, untouched=figures(90, 20, 0))
    assert keys(figures(0, 10 + NEAR_CHANCE), weak) == ["collapsed"]
    assert keys(figures(0, 10.1 + NEAR_CHANCE), weak) == ["fine"]
    two = replace(BASE, classes=2, untouched=figures(90, 96, 0))
    assert keys(figures(0, 95), two) == ["fine"]  # one retained class out of two, 95 % of it kept


def test_head_suppression_only():
    assert keys(figures(0, 88, probe_gap=PROBE_GAP + 1)) == ["head suppression only"]
    assert keys(figures(0, 88, probe_gap=PROBE_GAP)) == ["fine"]
    assert keys(figures(0, 88, probe_gap=None)) == ["fine"]
    assert keys(figures(FORGOTTEN, 88, probe_gap=50.0)) == ["fine"]  # it is not suppressed to begin with
    (said,) = verdict(figures(0.2, 88, probe_gap=61.0), BASE)
    assert "answered 0.2 % of the time" in said.sentence
    assert "61 points more than after retraining" in said.sentence


def test_worse_than_logit_drop_in_both_scores():
    control = replace(BASE, logit_drop=figures(0, 88, 0))
    assert keys(figures(5, 86), control) == ["worse than logit drop"]
    assert keys(figures(5, 87.5), control) == ["fine"]  # retains as much, within noise
    assert keys(figures(0.1, 86), control) == ["fine"]  # forgets as much, within noise
    assert keys(figures(5, 86)) == ["fine"]  # logit drop was not measured


def test_no_better_than_random():
    control = replace(BASE, is_mask=True, random=figures(60, 80))
    assert keys(figures(60, 80), control) == ["no better than random"]
    assert keys(figures(62, 79), control) == ["no better than random"]
    assert keys(figures(54, 80), control) == ["fine"]  # forgets more
    assert keys(figures(60, 82), control) == ["fine"]  # retains more
    assert keys(figures(60, 80), replace(control, is_mask=False)) == ["fine"]
    (said,) = verdict(figures(60, 80), replace(control, random=None))
    assert said.sentence.endswith("for want of probe_gap, entropy_gap, entropy_forget, logit_drop, random")


def test_too_random_but_not_too_certain():
    retrained = replace(BASE, retrained=figures(0, 89, entropy_forget=0.4))
    assert keys(figures(0, 88, entropy_gap=ENTROPY_GAP, entropy_forget=0.9)) == ["fine"]
    assert keys(figures(0, 88, entropy_gap=ENTROPY_GAP + 0.01, entropy_forget=0.9)) == ["too random"]
    assert keys(figures(0, 88, entropy_gap=0.6)) == ["fine"]  # above or below, nobody knows
    assert keys(figures(0, 88, entropy_gap=0.3, entropy_forget=0.7), retrained) == ["too random"]
    assert keys(figures(0, 88, entropy_gap=0.3, entropy_forget=0.1), retrained) == ["fine"]
    assert keys(figures(0, 88, entropy_gap=0.3, entropy_forget=0.35), retrained) == ["fine"]
    assert keys(figures(0, 88, entropy_gap=0.3, entropy_forget=0.71)) == ["too random"]  # 1.01 is no share of log C
    assert keys(figures(0, 88, entropy_gap=0.3, entropy_forget=0.69)) == ["fine"]


def test_several_at_once_in_a_fixed_order():
    control = replace(BASE, logit_drop=figures(0, 88, 0), is_mask=True, random=figures(90, 60))
    assert keys(figures(90, 60), control) == ["no-op", "collapsed", "worse than logit drop", "no better than random"]


@pytest.mark.parametrize("forget", [0.0, 33.3, 100.0])
def test_a_model_beside_itself_is_within_noise(forget):
    itself = figures(forget, 50, 0)
    same = replace(BASE, untouched=itself, is_mask=True, random=itself, logit_drop=itself)
    assert keys(itself, same) == ["no-op", "no better than random"]


# --- in an evaluation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated() -> tuple[Context, dict]:
    """A small classifier of DIGITS, and what is recorded of a mask of one weight and of controls."""
    torch.manual_seed(0)
    model = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8)
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, 256, 4)
    images, labels = data.splits["train"].batch(slice(None))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    judged = EvalConfig(methods=("mimu", "random", "logit_drop", "default"), metrics=("core", "UA"), references=0)
    config = PipelineConfig(forget_class=(4,), eval=judged)
    theta = torch.rand(10, 64, 128)
    context = Context(model.eval(), data, config, torch.device("cpu"), lambda topK: theta)
    return context, Eval(context).eval(500, 1)[0]


def test_record_holds_intervals_with_their_counts(evaluated):
    context, record = evaluated
    labels = {split: context.data.splits[split].labels for split in ("train", "test")}
    counts = {
        "forget_score": int((labels["test"] == 4).sum()),
        "retain_score": int((labels["test"] != 4).sum()),
        "UA": int((labels["train"] == 4).sum()),
    }
    assert 0 < record["methods"]["default"]["retain_score"] < 100
    for name, found in record["intervals"].items():
        values = record["methods"][name]
        assert set(found) == {*counts, "forget_probability"}
        for metric, n in counts.items():
            expected = wilson(round(values[metric] * n / 100), n).times(100)
            assert found[metric] == pytest.approx(vars(expected)), (name, metric)
            assert found[metric]["value"] == pytest.approx(values[metric])
        inner = found["forget_probability"]
        assert inner["value"] == pytest.approx(values["forget_probability"])
        assert inner["low"] <= inner["value"] <= inner["high"]


def test_record_holds_verdicts_against_the_right_references(evaluated):
    said = {name: [one["key"] for one in found] for name, found in evaluated[1]["verdicts"].items()}
    assert said == {
        "mimu": ["no-op", "no better than random"],
        "random": ["no-op"],
        "logit_drop": ["outputs only"],
        "default": ["no-op"],
    }


def test_scores_are_measured_whichever_metrics_were_chosen(evaluated):
    """Verdicts, chosen points and the answer in words are made of them."""
    context, record = evaluated
    context.config = replace(context.config, eval=replace(context.config.eval, metrics=("forget_loss",)))
    again = Eval(context).eval(500, 1)[0]
    assert again["verdicts"] == record["verdicts"]
    assert set(again["methods"]["default"]) == {"forget_loss", *SCORES, *again["costs"]}
    assert set(again["metrics"]) == {"forget_loss", *SCORES}
