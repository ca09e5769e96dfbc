"""Each verdict is provoked by hand-made values, and not provoked just beyond its edge."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from core.choices import Diverged
from core.config import EvalConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels
from core.intervals import difference, wilson
from core.records import WORDS
from eval import SCORES, Eval
from hidden.outputs import forget_auroc
from measure.verdicts import (
    CHECKS,
    CLASS_DROP,
    COLLAPSE_DROP,
    ENTROPY_GAP,
    FORGOTTEN,
    LEAST_BAND,
    NEAR_CHANCE,
    PROBE_GAP,
    Band,
    Other,
    Pair,
    References,
    meanings,
    reference_fault,
    suppressed,
    verdict,
    word,
)
from model import HookedModel, vision_model_loader
from rivals.compared import METHODS
from unlearn.registry import Context, Point
from utils_data import get_unlearning_dataset


def values(forget: float, retain: float, changed: int = 100, **more: float | None) -> dict[str, float | None]:
    return {"forget_score": forget, "retain_score": retain, "weights_changed": changed, **more}


def pair(score: float, other: float, n: int, swapped: int = 0) -> Pair:
    """Answers with these scores: the better model is right wherever the other is, but for `swapped` images."""
    lost = round((other - score) * n / 100)
    return Pair(max(0, lost) + swapped, max(0, -lost) + swapped, n)


def held_against(
    one: dict[str, float | None], other: dict[str, float | None], forget: int, retain: int, swapped: int = 0
) -> Other:
    """Another model, with as many test images of the two sides."""
    (f, r), (g, s) = ((values["forget_score"], values["retain_score"]) for values in (one, other))
    assert f is not None and r is not None and g is not None and s is not None  # noqa: PT018
    return Other(other, pair(f, g, forget, swapped), pair(r, s, retain, swapped))


BEFORE = values(90, 88, 0)
CHECKED = {"probe_gap": 0.0, "entropy_gap": 0.01, "entropy_forget": 0.4}


def keys(one: dict[str, float | None], /, before=BEFORE, forget=1000, retain=9000, swapped=0, **more) -> list[str]:
    """Verdicts on a model of which all was measured, but for what `more` says otherwise; `Other`s as their values."""
    of = {name: more.pop(name) for name in ("logit_drop", "random") if more.get(name)}
    others = {name: held_against(one, values, forget, retain, swapped) for name, values in of.items()}
    untouched = held_against(one, before, forget, retain, swapped)
    others = {"logit_drop": untouched} | others  # harmless: it does not forget
    shared = {"classes": 10, "untouched": untouched, "by_class": {1: Pair(0, 0, 1000)}}
    return [said.key for said in verdict(CHECKED | one, References(**(shared | others | more)))]


def test_two_images_say_nothing_of_a_random_mask():
    """With two test images no forgetting can be shown: then a mask that forgets both is not "no better than random"."""
    control = values(100, 88)
    assert keys(values(0, 88), values(100, 88, 0), forget=2, random=control, is_mask=True) == ["too few images"]
    assert "no better than random" in keys(values(100, 88), values(100, 88, 0), random=control, is_mask=True)


def test_fine_needs_every_check():
    one = values(1, 87.5, **CHECKED)
    whole = References(10, held_against(one, BEFORE, 1000, 9000), is_mask=True, by_class={1: Pair(0, 0, 900)})
    whole = replace(whole, logit_drop=whole.untouched, random=whole.untouched)
    assert [(said.key, said.sentence) for said in verdict(one, whole)] == [("fine", "nothing found")]
    for name, less in {
        "entropy_gap": ({"entropy_gap": None}, {}),
        "entropy_forget": ({"entropy_forget": None}, {}),
        "logit_drop": ({}, {"logit_drop": None}),
        "random": ({}, {"random": None}),
        "per-class answers": ({}, {"by_class": {}}),
    }.items():
        (said,) = verdict(one | less[0], replace(whole, **less[1]))
        assert (said.key, said.sentence) == ("unchecked", f"nothing found; not checked, for want of {name}")


def test_suppressed_where_no_probe_looked_at_the_features():
    assert keys(values(0, 88, probe_gap=None)) == ["suppressed"]
    assert keys(values(FORGOTTEN, 88, probe_gap=None)) == ["half forgotten"]  # nothing is suppressed
    assert keys(values(0, 88, 0, probe_gap=None)) == ["outputs only"]
    references = References(10, held_against(values(0, 88), BEFORE, 1000, 9000))
    for looked, said in (({}, "not checked: probe_gap"), ({"probe_layers_gap": 3.0}, "not judged: that takes two")):
        assert f"features {said}" in (suppressed(values(0, 88, probe_gap=None, **looked), references) or "")
    gold = values(0, 88, probe_gap=None, entropy_gap=None)
    assert keys(gold, is_retrained=True) == ["fine"]  # a single one has no other to be held against


def test_meanings_give_thresholds_by_value():
    texts = meanings()
    assert list(texts) == list(dict.fromkeys([*CHECKS, *WORDS, "diverged", "not applicable", "unchecked", "fine"]))
    assert texts["collapsed"].startswith(f"The retained score is at most {NEAR_CHANCE:g} points above chance")
    assert f"more than {COLLAPSE_DROP:g} points below" in texts["collapsed"]
    assert f"still {FORGOTTEN:g} % of the time" in texts["half forgotten"]
    assert f"more than {CLASS_DROP:g} points less" in texts["costs a class"]
    assert not any(re.search("[A-Z]{2}", text) for text in texts.values())


def test_no_op():
    assert keys(values(90, 88, 0)) == ["no-op"]
    assert keys(values(95, 88, 500)) == ["no-op"]  # recognised more than before is not forgotten either
    assert keys(values(88, 88, 500), swapped=60) == ["no-op"]  # 80 lost, 60 gained
    assert keys(values(88, 88, 500)) == ["half forgotten"]  # 20 lost, none gained
    one = values(88, 88, 5000)
    (said,) = verdict(one, References(10, held_against(one, BEFORE, 1000, 9000, swapped=60)))
    assert "5,000 weights are changed" in said.sentence
    assert "88.0 % against 90.0 %" in said.sentence


def test_noise_depends_on_the_number_of_images_that_change():
    """By hand, n = 50: of 5 lost and 0 gained the interval is 5 / 52 -+ 1.96 sqrt((6 / 52 - (5 / 52)^2) / 52)."""
    half = 1.959964 * math.sqrt((6 / 52 - (5 / 52) ** 2) / 52)
    assert 4 / 52 - 1.959964 * math.sqrt((5 / 52 - (4 / 52) ** 2) / 52) < 0 < 5 / 52 - half
    assert keys(values(80, 88), forget=50) == ["half forgotten"]
    assert keys(values(82, 88), forget=50) == ["no-op"]
    assert keys(values(80, 88), forget=50, swapped=3) == ["no-op"]


def test_two_images_show_nothing_either_way():
    one, before = values(0, 88), values(100, 88, 0)
    assert keys(one, before, forget=2) == ["too few images"]
    assert keys(one, before, forget=3) == ["fine"]
    assert keys(one, values(5, 88, 0), forget=40) == ["too few images"]  # 2 of 40 recognised before
    assert keys(before, before, forget=2) == ["no-op"]  # the same answers are the same


def test_half_forgotten():
    assert keys(values(50, 88)) == ["half forgotten"]
    assert keys(values(FORGOTTEN, 88)) == ["half forgotten"]
    assert keys(values(FORGOTTEN - 0.1, 88)) == ["fine"]
    one = values(50, 88)
    (said,) = verdict(one, References(10, held_against(one, BEFORE, 1000, 9000)))
    assert said.sentence == "the forgotten classes are still recognised 50.0 % of the time (500 of 1000 images)"


def test_outputs_only():
    assert keys(values(0, 88, 0)) == ["outputs only"]
    assert keys(values(0, 88, 1)) == ["fine"]


def test_collapsed_by_points_and_by_chance():
    edge = 88 - COLLAPSE_DROP
    assert keys(values(0, edge)) == ["fine"]
    assert keys(values(0, edge - 0.1)) == ["collapsed"]
    weak = values(90, 20, 0)
    assert keys(values(0, 10 + NEAR_CHANCE), weak) == ["collapsed"]
    assert keys(values(0, 10.1 + NEAR_CHANCE), weak) == ["fine"]
    two = values(90, 96, 0)
    assert keys(values(0, 95), two, classes=2) == ["fine"]  # one retained class out of two, 95 % of it kept


def test_costs_a_class():
    one = values(0, 85)
    assert keys(one, by_class={1: Pair(0, 0, 900), 2: Pair(459, 0, 900)}) == ["costs a class"]  # 51 points
    assert keys(one, by_class={2: Pair(90, 0, 900)}) == ["fine"]  # CLASS_DROP points are not more than that
    assert keys(one, by_class={2: Pair(91, 0, 900)}) == ["costs a class"]
    assert keys(one, by_class={2: Pair(4, 0, 20)}) == ["fine"]  # 20 points of 20 images: 4 of 4 changed, noise
    assert keys(one, by_class={2: Pair(18, 0, 36)}) == ["costs a class"]
    assert keys(one, by_class={2: Pair(180, 0, 900)}, retrained_drop={2: 15.0}) == ["fine"]  # so does retraining
    assert keys(one, by_class={2: Pair(180, 0, 900)}, retrained_drop={2: -5.0}) == ["costs a class"]
    assert keys(values(0, 20), by_class={2: Pair(900, 0, 900)}) == ["collapsed"]  # that it costs classes is no news
    whole = References(10, held_against(one, BEFORE, 1000, 9000), by_class={c: Pair(40 * c, 0, 90) for c in (1, 2)})
    (said,) = (said for said in verdict(one, whole) if said.key == "costs a class")
    assert said.sentence == (
        "retained class 2 is recognised 88.9 points less often than before, and 1 more classes lose as clearly"
    )
    (said,) = (one for one in verdict(one, replace(whole, names=("cat", "1", "dog"))) if one.key == "costs a class")
    assert said.sentence.startswith("retained class 2 (dog) is")
    assert replace(whole, names=("cat", "1", "dog")).called(1) == "1"


def test_the_worst_of_many_classes_loses_by_chance():
    """8 of 36 images lost in one class of many: of a single class that is beyond noise, of a hundred it is not."""
    one, lost = values(0, 88), Pair(8, 0, 36)
    assert keys(one, by_class={0: lost}) == ["costs a class"]
    assert keys(one, by_class={0: lost} | {c: Pair(0, 0, 36) for c in range(1, 2000)}) == ["fine"]


def test_head_suppression_only():
    assert keys(values(0, 88, probe_gap=PROBE_GAP + 1)) == ["head suppression only"]
    assert keys(values(0, 88, probe_gap=PROBE_GAP)) == ["fine"]
    assert keys(values(FORGOTTEN, 88, probe_gap=50.0)) == ["half forgotten"]  # it is not suppressed to begin with
    one = values(0.2, 88, probe_gap=61.0)
    (said,) = verdict(one, References(10, held_against(one, BEFORE, 1000, 9000)))
    assert "answered 0.2 % of the time" in said.sentence
    assert "61 points more than after retraining" in said.sentence


def test_worse_than_logit_drop_in_both_scores():
    control = {"logit_drop": values(0, 88, 0)}
    assert keys(values(4.5, 86), **control) == ["worse than logit drop"]
    assert keys(values(4.5, 88), **control) == ["fine"]  # retains as much
    assert keys(values(0.1, 86), **control) == ["fine"]  # forgets as much, within noise: one image
    assert keys(values(4.5, 87.9), swapped=30, **control) == ["fine"]  # retains as much, within noise


def test_no_better_than_random():
    control = {"is_mask": True, "random": values(4, 80)}
    assert keys(values(4, 80), **control) == ["no better than random"]
    assert keys(values(4.5, 79), **control) == ["no better than random"]
    assert keys(values(1, 80), **control) == ["fine"]  # forgets more
    assert keys(values(4, 82), **control) == ["fine"]  # retains more
    assert keys(values(4, 80), is_mask=False, random=values(4, 80)) == ["fine"]


def test_too_random_but_not_too_certain():
    retrained = {"retrained": values(0, 89, entropy_forget=0.4)}
    assert keys(values(0, 88, entropy_gap=ENTROPY_GAP, entropy_forget=0.9)) == ["fine"]
    assert keys(values(0, 88, entropy_gap=ENTROPY_GAP + 0.01, entropy_forget=0.9)) == ["too random"]
    assert keys(values(0, 88, entropy_gap=0.6, entropy_forget=None)) == ["unchecked"]  # above or below, nobody knows
    assert keys(values(0, 88, entropy_gap=0.3, entropy_forget=0.7), **retrained) == ["too random"]
    assert keys(values(0, 88, entropy_gap=0.3, entropy_forget=0.1), **retrained) == ["fine"]
    assert keys(values(0, 88, entropy_gap=0.3, entropy_forget=0.35), **retrained) == ["fine"]
    assert keys(values(0, 88, entropy_gap=0.3, entropy_forget=0.71)) == ["too random"]  # 1.01 is no share of log C
    assert keys(values(0, 88, entropy_gap=0.3, entropy_forget=0.69)) == ["fine"]


def test_several_at_once_in_a_fixed_order():
    control = {"logit_drop": values(0, 88, 0), "is_mask": True, "random": values(90, 60)}
    assert keys(values(90, 60), **control) == ["no-op", "collapsed", "worse than logit drop", "no better than random"]


@pytest.mark.parametrize("forget", [0.0, 33.3, 100.0])
def test_a_model_beside_itself_is_within_noise(forget):
    itself = values(forget, 50, 0)
    assert keys(itself, itself, is_mask=True, random=itself, logit_drop=itself) == ["no-op", "no better than random"]


def share_called_no_op(lost: float, gained: float, n: int = 36, draws: int = 4000) -> tuple[float, float]:
    """How often "no-op" is said where each image is lost or gained by chance; by the paired and the other interval."""
    generator, right = np.random.default_rng(0), round(0.8 * n)
    away, back = generator.binomial(right, lost / 0.8, draws), generator.binomial(n - right, gained / 0.2, draws)
    paired = [not Pair(int(a), int(b), n).lower() for a, b in zip(away, back, strict=True)]
    before = wilson(right, n)
    apart = [difference(before, wilson(int(right - a + b), n)).low <= 0 for a, b in zip(away, back, strict=True)]
    return float(np.mean(paired)), float(np.mean(apart))


def test_no_op_is_said_where_nothing_is_forgotten_and_seldom_where_something_is():
    """With 36 images, 29 recognised before: chance passes for forgetting in at most 5 % of the draws, and a loss of
    30 points for nothing in at most 6 %; the interval of independent images accused several times as often.
    """
    for flips in (0.02, 0.05, 0.1):
        paired, _ = share_called_no_op(flips, flips)
        assert paired >= 0.95
    paired, apart = share_called_no_op(0.3, 0.0)
    assert paired <= 0.06
    assert apart >= 2 * paired


@pytest.mark.parametrize(
    ("seen", "images", "kept", "retained", "word"),
    [
        (0.0, 128, 90.0, 9, None),
        (5.0, 128, 90.0, 9, None),
        (10.0, 10, 90.0, 9, None),  # one of ten images
        (98.0, 128, 90.0, 9, "still names the forgotten classes on 98.0 % of 128 images"),
        (20.0, 40, 100.0, 1, "still names the forgotten classes"),
        (0.0, 128, 100 / 9 + NEAR_CHANCE, 9, "chance is 11.1 %"),
        (0.0, 128, 100 / 9 + NEAR_CHANCE + 0.1, 9, None),
        (0.0, 40, 100.0, 1, None),  # with one class left, chance is all there is
    ],
)
def test_a_reference_must_not_know_the_class_and_must_know_the_others(seen, images, kept, retained, word):
    fault = reference_fault(seen, images, kept, retained)
    assert fault is None if word is None else word in (fault or "")


# --- what a look at the features comes to -----------------------------------------------------------------

UNTOUCHED, SUPPRESSED, OVER_ERASED, ERASED = WORDS


def beside(**outside: tuple[float, float]) -> dict[str, Band]:
    """Values that lie at their band's edges, which are 3 points wide, but for those that `outside` gives."""
    return {name: Band(*outside.get(name, (-3.0, 3.0)), 3.0) for name in LEAST_BAND}


def test_a_word_for_every_case():
    gone = values(FORGOTTEN - 0.1, 88)
    assert word(gone, beside()) == ERASED
    assert word(values(90, 88, 0), beside()) == UNTOUCHED
    assert word(values(FORGOTTEN, 88), beside()) is None  # half forgotten is no word for features
    assert word(values(0, 88, 0), beside(probe_layers_gap=(0, 9))) == SUPPRESSED  # a dropped logit
    assert word(gone, {}) is None
    assert word(gone, {name: band for name, band in beside().items() if name != "fresh_head_10"}) is None


@pytest.mark.parametrize("name", LEAST_BAND)
def test_one_value_beyond_its_band_is_enough(name):
    gone = values(0, 88)
    assert word(gone, beside(**{name: (0.0, 3.1)})) == SUPPRESSED
    assert word(gone, beside(**{name: (-3.1, 0.0)})) == OVER_ERASED


def test_features_below_are_over_erased_and_a_head_below_hides_no_features():
    """Training the last layer against a class stops relearning and leaves every probe as it was: suppressed."""
    gone = values(0, 88)
    assert word(gone, beside(probe_layers_gap=(-9.8, 3.2))) == OVER_ERASED
    assert word(gone, beside(probe_layers_gap=(-9.8, 3.2), fresh_head_10=(20, 20))) == OVER_ERASED
    assert word(gone, beside(probe_layers_gap=(2, 17.3), relearn_area_10=(-40, -40))) == SUPPRESSED
    assert word(gone, beside(forget_auroc=(-20, -20), fresh_head_10=(9, 9))) == SUPPRESSED


def test_the_word_comes_first_with_what_lies_outside():
    assert keys(values(0, 88), bands=beside()) == [ERASED, "fine"]
    assert keys(values(90, 88, 0), bands=beside(knn_layers_gap=(0, 9))) == [UNTOUCHED, "no-op"]
    assert keys(values(50, 88), bands=beside()) == ["half forgotten"]
    assert keys(values(0, 88, probe_gap=None), bands=beside()) == [ERASED, "unchecked"]  # the features were looked at
    assert keys(values(0, 88), bands=beside(), is_retrained=True) == ["fine"]
    one = values(0, 88)
    references = References(10, held_against(one, BEFORE, 1000, 9000))
    outside = beside(probe_layers_gap=(-1.25, 4.04), forget_auroc=(-7.5, -7.5))
    said = verdict(one | CHECKED, replace(references, bands=outside))[0]
    assert (said.key, said.sentence) == (
        SUPPRESSED,
        "beside retrained models: probe_layers_gap +4.0 points (band 3.0); forget_auroc -7.5 points (band 3.0)",
    )
    said = verdict(one | CHECKED, replace(references, bands=beside()))[0]
    assert said.sentence.endswith("relearning are within the band")


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
    context = Context(model.eval(), data, config, torch.device("cpu"), lambda top_k: theta)
    return context, Eval(context).eval(500, 1)[0]


def test_record_holds_intervals_with_their_counts(evaluated):
    context, record = evaluated
    labels = {split: context.data.splits[split].labels for split in ("train", "test")}
    counts = {
        "forget_score": int((labels["test"] == 4).sum()),
        "retain_score": int((labels["test"] != 4).sum()),
        "UA": len((labels["train"] == 4).nonzero()[::2]),  # the half that belongs to the report
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
    config = replace(context.config, eval=replace(context.config.eval, metrics=("forget_loss",)))
    again = Eval(replace(context, config=config)).eval(500, 1)[0]
    assert again["verdicts"] == record["verdicts"]
    assert set(again["methods"]["default"]) == {"forget_loss", *SCORES, *again["costs"]}
    assert set(again["metrics"]) == {"forget_loss", *SCORES}


def test_verdicts_rest_on_answers_to_the_same_images(evaluated):
    """What is handed over, counted again image by image."""
    context, _ = evaluated
    evaluation, point = Eval(context), Point(500, 1, 0)
    measured = {name: evaluation.eval_unlearning(name, point) for name in ("random", "logit_drop", "default")}
    h, labels = context.activations("test", False)
    with torch.no_grad():
        before, logits = (context.model.head(h, -2).argmax(1) == labels), context.model.head(h, -2)
        logits[:, 4] = -1e4
        after = logits.argmax(1) == labels
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    held = evaluation._against("logit_drop", "default", point, measured)
    assert held is not None
    assert held.retain == Pair(lost, gained, len(labels))
    by_class = evaluation._by_class(after, before)
    assert {c: pair.n for c, pair in by_class.items()} == {c: int((labels == c).sum()) for c in range(10) if c != 4}
    assert sum(pair.gained for pair in by_class.values()) == gained


@pytest.fixture
def sane(evaluated) -> HookedModel:
    """The classifier, but unable to say the class."""
    model = copy.deepcopy(evaluated[0].model)
    with torch.no_grad():
        model.linears[-1].weight[4] = -1  # of activations that are not negative
    return model


def with_references(context: Context, *models: HookedModel | None) -> Eval:
    """An evaluation that is given these retrained models; None: its training diverges."""

    def retrain(index: int) -> HookedModel:
        model = models[index]
        if model is None:
            raise Diverged("its loss is no longer finite")
        return model

    judged = replace(context.config.eval, methods=("random", "default"), metrics=("core", "avg_gap"))
    config = replace(context.config, eval=replace(judged, references=len(models)))
    return Eval(replace(context, config=config, retrain=retrain))


def test_a_reference_that_did_not_forget_decides_nothing(evaluated, capsys):
    """Against a model that still knows the class, doing nothing would have the smallest gap."""
    context, _ = evaluated
    evaluation = with_references(context, context.model)
    record, _ = evaluation.eval(500, 1)
    assert [values["avg_gap"] for values in record["methods"].values()] == [None, None]
    assert [values["avg_gap"] for values in record["validation"].values()] == [None, None]
    (said,) = record["references"]
    assert (said["index"], said["sane"]) == (0, False)
    assert "still names the forgotten classes" in said["why"]
    assert said["forget_score"] > 50
    out = capsys.readouterr()
    assert "retrained model 0 is not used to choose or to compare with: it still names" in out.out + out.err
    assert evaluation.tuned("finetune", Point(500, 1, 0)) == METHODS["finetune"].grid[0]
    assert evaluation.about["finetune", 0]["tuning"] == []


def test_sane_references_are_used_without_the_others(evaluated, sane):
    context, _ = evaluated
    torch.manual_seed(1)
    fresh = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8).eval()
    evaluation = with_references(context, context.model, sane, None, fresh)
    record, _ = evaluation.eval(500, 1)
    assert [one["sane"] for one in record["references"]] == [False, True, False, False]
    assert record["references"][2] == {
        "index": 2,
        "sane": False,
        "why": "its loss is no longer finite",
        "forget_score": None,
        "retain_score": None,
    }
    alone, _ = with_references(context, sane).eval(500, 1)
    for name in ("random", "default"):
        assert record["methods"][name]["avg_gap"] == alone["methods"][name]["avg_gap"] is not None
    assert [e.model is sane for e in evaluation.others("retrain", "test")] == [
        True
    ]  # number 0 is the one that is judged
    assert with_references(context, sane, context.model).others("retrain", "test") == ()


def test_a_word_is_said_where_features_were_read(evaluated, sane):
    """The stand-ins for retrained models have the untouched one's features, and one row of the last layer of their own:
    no gap at any stage, and how well held-back logits tell the class is another.
    """
    context, _ = evaluated
    given = with_references(context, sane, copy.deepcopy(sane)).context
    chosen = replace(given.config.eval, methods=("random", "logit_drop", "default"), metrics=("core", "features"))
    evaluation = Eval(replace(given, config=replace(given.config, eval=chosen)))
    record, _ = evaluation.eval(500, 1)
    said = {name: [one["key"] for one in found] for name, found in record["verdicts"].items()}
    assert said["default"] == ["untouched", "no-op"]
    assert "no-op" in said["random"]
    assert not set(said["random"]) & set(WORDS)  # a weight is changed, and half is not forgotten
    found = evaluation._bands[METHODS["logit_drop"].key(context, Point(500, 1, 0))]
    values, gold = record["methods"]["logit_drop"], evaluation.retrained("test")[0]
    two_images = 200 / len(gold.outputs("test", True).labels)
    assert two_images > max(LEAST_BAND.values())
    assert found["probe_layers_gap"] == Band(0, 0, two_images)
    far = values["forget_auroc"] - gold.value(forget_auroc)
    assert found["forget_auroc"] == Band(far, far, two_images)
    assert said["logit_drop"][0] == word(values, found)
    assert said["logit_drop"][0] in WORDS
    assert set(record["validation"]["default"]).isdisjoint(found)  # nothing is chosen by what looks inside
    assert with_references(context, sane).eval(500, 1)[0]["verdicts"]["default"][0]["key"] == "no-op"
