"""Every metric against values worked out by hand, and what they say where there is nothing to say."""

import math
import subprocess
import sys

import pytest
import torch

import hidden
import measure
from core.config import PROJECT_ROOT, UserError
from measure import comparisons
from measure.attacks import caught, logistic_calls, separation, svc_calls
from measure.comparisons import AVERAGED, js, kl, total_variation
from measure.metrics import METRICS, Evidence, Outputs, Undefined, chosen_metrics, forget_loss, metric
from model import NO_ANSWER
from tests.helpers.common import evidence, held, twice

LN2, LOW = math.log(2), -1e4
# Four classes, 0 is forgotten. Distributions by the class that they are for: two leaning ones of 1.75 bits, one-hots.
A, B, C = (1 / 2, 1 / 4, 1 / 8, 1 / 8), (1 / 4, 1 / 2, 1 / 8, 1 / 8), (1 / 4, 1 / 8, 1 / 2, 1 / 8)
TWO, THREE = (1 / 8, 1 / 8, 1 / 2, 1 / 4), (1 / 8, 1 / 8, 1 / 4, 1 / 2)
SURE = tuple(tuple(float(c == k) for c in range(4)) for k in range(4))
EVEN = (1 / 4,) * 4


def said(labels: list[int], *p: tuple[float, ...]) -> Outputs:
    """Outputs with the probabilities p; a probability of 0 has the logit of a dropped class."""
    return Outputs(torch.tensor(p).log().clamp(min=LOW), torch.tensor(labels))


def right(count: int, of: int, label: int) -> Outputs:
    """`count` of `of` images recognised, the others taken for class 3."""
    return said([label] * of, *[SURE[label]] * count, *[SURE[3]] * (of - count))


def world(**changes: object) -> Evidence:
    """The judged model beside the untouched one, one retrained and one untrained."""
    retained = [1, 1, 2, 3]
    retrained = evidence(
        train=(said([0] * 4, SURE[1], SURE[1], SURE[1], B), said([1, 2], SURE[1], SURE[2])),
        test=(said([0] * 3, B, B, SURE[1]), said(retained, B, B, C, THREE)),
        untrained=lambda split, is_forget_set: twice(said([0] * 4, *[EVEN] * 4)),
    )
    facts = {
        "train": (said([0] * 4, SURE[0], SURE[1], A, B), said([1, 2], SURE[1], SURE[2])),
        "test": (said([0] * 3, A, B, C), said(retained, B, A, TWO, THREE)),
        "original": evidence(test=(said([0] * 3, A, A, A), said(retained, B, B, TWO, TWO))),
        "retrained": (retrained,),
        "untrained": retrained.untrained,
    }
    return evidence(**(facts | changes))


LEAN = 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3)  # JS(A, B), JS(A, even): both halves are this
JS_SURE_C = (math.log2(16 / 9) + 7 / 8 - math.log2(4.5) / 8) / 2
JS_SURE_EVEN = (math.log2(1.6) + 3 / 4 - math.log2(2.5) / 4) / 2
ZRF, ZRF_RETRAINED = 1 - (2 * JS_SURE_EVEN + 2 * LEAN) / 4, 1 - (3 * JS_SURE_EVEN + LEAN) / 4
BY_HAND = {
    "forget_loss": 5 / 3 * LN2,  # (1 + 2 + 2) / 3 bits
    "retain_loss": 5 / 4 * LN2,
    "forget_probability": 1 / 3,
    "forget_score": 100 / 3,
    "retain_score": 75.0,
    "worst_retained_drop": 50.0,  # class 1: from 2 of 2 to 1 of 2; class 3 gains
    "UA": 50.0,
    "RA": 100.0,
    "entropy_forget": 0.4375,  # (0 + 0 + 1.75 + 1.75) / 4 bits of 2
    "confident_wrong": 25.0,
    "MIA_efficacy": 75.0,  # members at 1, others at 0.25 and 0.5; asked 1, 0, 0.5, 0.25
    "entropy_MIA": 50.0,  # members at 0 bits, others at 1.75; asked 0, 0, 1.75, 1.75
    "class_MIA_auc": 6.5 / 12,  # 1, 0, 0.5, 0.25 against 0.5, 0.25, 0.25: 3 + 0 + 2.5 + 1 of 12
    "class_MIA_tpr1": 25.75,  # from (0, 1/4) to (1/3, 1/2), three hundredths of the way
    "avg_gap": 25.0,  # |50 - 100|, 0, |75 - 100|, |75 - 100|
    "ToW": 0.5 * 1 * 0.75,
    "KL_forget": 3.25 / 3 * LN2,
    "KL_test": (0.25 + 0.125) / 4 * LN2,
    "JS_forget": (LEAN + JS_SURE_C) / 3,
    "TV_forget": (1 / 4 + 0 + 7 / 8) / 3,
    "activation_distance": (math.sqrt(2) + math.sqrt(0.84375)) / 4,
    "routing_TV": 2 / 3,  # to classes 0, 1, 2 against 1, 1, 1
    "entropy_gap": 0.21875,
    "ZRF": ZRF,
    "ZRF_gap": ZRF - ZRF_RETRAINED,
}
HERE = [
    name for name, entry in METRICS.items() if entry.compute.__module__ in ("measure.metrics", "measure.comparisons")
]


def test_every_metric_has_a_value_by_hand():
    assert set(HERE) == set(BY_HAND)


@pytest.mark.parametrize("name", HERE)
def test_by_hand(name):
    assert world().value(METRICS[name].compute) == pytest.approx(BY_HAND[name], rel=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_a_metric_says_what_it_is(name):
    """Definition, unit, direction, target and source travel with every value."""
    entry = METRICS[name]
    assert len(entry.definition) > 20
    assert entry.definition.endswith(".")
    assert all((entry.unit, entry.target, entry.source))
    assert set(entry.about()) == {"unit", "better", "target", "definition", "first"}


# --- several retrained models, and none -------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HERE if METRICS[name].group == "retrain" and name != "ZRF"])
def test_nothing_is_said_without_retrained_models(name):
    assert world(retrained=()).value(METRICS[name].compute) is None


def test_nothing_is_said_without_the_others():
    assert world(original=None).value(METRICS["worst_retained_drop"].compute) is None
    for name in ("ZRF", "ZRF_gap"):
        assert world(untrained=None).value(METRICS[name].compute) is None


def test_the_gap_is_to_each_retrained_model_not_to_their_mean():
    """UA 50 between retrained models of UA 100 and 0 is 50 away from both; their mean would hide it."""
    sets = {"test": (right(1, 1, 0), right(2, 2, 1))}
    low, high = (evidence(train=(right(count, 2, 0), right(2, 2, 1)), **sets) for count in (2, 0))
    judged = evidence(train=(right(1, 2, 0), right(2, 2, 1)), retrained=(low, high), **sets)

    def figures(e: Evidence) -> torch.Tensor:
        return torch.tensor([e.value(of) for of in AVERAGED], dtype=torch.float64)

    gaps = [float((figures(judged) - figures(r)).abs().mean()) for r in (low, high)]
    assert min(gaps) >= 50 / 4
    assert judged.value(comparisons.avg_gap) == pytest.approx(sum(gaps) / 2)
    assert judged.value(comparisons.tug_of_war) == pytest.approx(0.5)


def test_tow_multiplies_all_three():
    sets = {"train": (right(3, 4, 0), right(1, 2, 1)), "test": (right(1, 1, 0), right(4, 5, 2))}
    gold = {"train": (right(0, 4, 0), right(2, 2, 1)), "test": (right(0, 1, 0), right(5, 5, 2))}
    judged = evidence(retrained=(evidence(**gold),), **sets)
    assert judged.value(comparisons.tug_of_war) == pytest.approx(0.25 * 0.5 * 0.8)


@pytest.mark.parametrize("name", HERE)
def test_a_retrained_model_has_no_gap_to_itself(name):
    """Lower-is-better comparisons are 0 and ToW is 1 where the two models say the same."""
    (gold,) = world().retrained
    sets = {"train": (gold.train_forget, gold.train_retain), "test": (gold.forget, gold.retain)}
    value = evidence(retrained=(gold,), untrained=gold.untrained, original=gold, **sets).value(METRICS[name].compute)
    best = {"0": 0.0, "1": 1.0}.get(METRICS[name].target) if METRICS[name].group == "retrain" else None
    if best is not None:
        assert value == pytest.approx(best, abs=1e-12)
    assert value is not None


# --- extreme logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HERE)
def test_dropped_logits_give_finite_numbers(name):
    """A logit of -1e4 on either side, judged or retrained."""
    for who in ("judged", "retrained"):
        e = world()
        target = e if who == "judged" else e.retrained[0]

        def dropped(split: str, is_forget_set: bool, of=target.outputs) -> Outputs:
            outputs = of(split, is_forget_set)
            logits = held(outputs).clone()
            logits[:, 0] = LOW
            return Outputs(logits, outputs.labels)

        object.__setattr__(target, "outputs", dropped)
        value = e.value(METRICS[name].compute)
        assert value is not None
        assert math.isfinite(value)


@pytest.mark.parametrize("name", HERE)
def test_logits_that_diverged_say_nothing_and_stop_nothing(name):
    """NaN logits: figures of probabilities are None, not NaN, which JSON has no word for; nothing is recognised."""
    nan = Outputs(torch.full((2, 4), math.nan), torch.tensor([0, 1]))
    sets = {"train": (nan, nan), "test": (nan, nan)}
    sure = Outputs(9 * torch.eye(4)[[0, 1]], torch.tensor([0, 1]))
    gold = evidence(train=(sure, sure), test=(sure, sure), untrained=lambda *_: sure)
    value = evidence(retrained=(gold,), untrained=gold.untrained, original=gold, **sets).value(METRICS[name].compute)
    nothing = {"forget_score": 0, "retain_score": 0, "worst_retained_drop": 100, "UA": 100, "RA": 0, "ToW": 0}
    assert value == (nothing | {"routing_TV": 1}).get(name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_image_with_a_logit_that_is_not_finite_is_recognised_by_no_accuracy(bad):
    """`argmax` calls NaN the largest: every image would be of class 0. Only the images concerned are lost."""
    logits = torch.tensor([[9.0, 0.0], [9.0, bad], [bad, 9.0], [bad, bad], [0.0, 9.0]])
    outputs = Outputs(logits, torch.tensor([0, 0, 1, 0, 1]))
    assert outputs.predicted.tolist() == [0, NO_ANSWER, NO_ANSWER, NO_ANSWER, 1]
    assert outputs.right.tolist() == [True, False, False, False, True]
    assert outputs.score() == 40
    assert outputs.class_scores().tolist() == pytest.approx([100 / 3, 50])
    assert comparisons.routes(outputs).tolist() == pytest.approx([0.2, 0.2, 0.6])


# --- the parts --------------------------------------------------------------------------------------------


def test_divergences_by_hand():
    p, q = (torch.tensor([row], dtype=torch.float64).log() for row in ((1 / 2, 1 / 2), (1 / 4, 3 / 4)))
    assert float(kl(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(kl(q, p)) == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert float(total_variation(p.exp(), q.exp())) == pytest.approx(1 / 4)


def test_kl_of_impossible_classes():
    """p = 0 adds nothing, q = 0 where p > 0 is infinite."""
    sure, even = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]]).log()
    assert float(kl(sure, even)) == pytest.approx(LN2)
    assert float(kl(even, sure)) == math.inf
    assert float(js(sure, sure)) == 0


def test_svc_cuts_between_symmetric_sides():
    members, others = torch.full((30,), 0.9), torch.full((50,), 0.1)
    asked = torch.tensor([0.95, 0.8, 0.55, 0.45, 0.2])
    assert svc_calls(members, others, asked) == pytest.approx(3 / 5)
    assert svc_calls(others, members, asked) == pytest.approx(2 / 5)


def test_logistic_regression_cuts_between_symmetric_sides():
    """Members are the certain ones: 0.2 and 1.0 nats, boundary 0.6 although there are ten times as many others."""
    members, others = torch.full((20,), 0.2), torch.full((200,), 1.0)
    assert logistic_calls(members, others, torch.tensor([0.0, 0.55, 0.65, 2.0])) == pytest.approx(1 / 2)


def test_weights_are_the_same_as_copies():
    """The grid's counts as weights give scikit-learn's answer to the very images, one by one."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    draw = torch.Generator().manual_seed(0)
    members, others = ((100 * torch.rand(60, generator=draw) ** power).round() / 100 for power in (0.3, 1.0))
    asked = torch.arange(101) / 100
    values, truth = torch.cat([others, members])[:, None].numpy(), [0] * 60 + [1] * 60
    for calls, plain in ((svc_calls, SVC(C=3, gamma="auto")), (logistic_calls, LogisticRegression())):
        expected = plain.fit(values, truth).predict(asked[:, None].numpy()).mean()
        assert calls(members, others, asked) == pytest.approx(expected, abs=0.011)
        assert 0.05 < expected < 0.95


def test_membership_is_a_coin_flip_where_all_figures_are_equal():
    zeros = torch.zeros(7)
    assert separation(zeros, zeros[:5]) == 0.5
    assert caught(zeros, zeros[:5]) == pytest.approx(0.01)


def test_catching_by_hand():
    """One of 200 others lies above all members (0.5 % false alarms), 2 of 4 members above all the rest."""
    members = torch.tensor([0.8, 0.7, 0.2, 0.1])
    others = torch.cat([torch.tensor([0.9]), torch.linspace(0.3, 0.6, 199)])
    assert caught(members, others) == pytest.approx(0.5)
    assert caught(members, others, 0.004) == 0
    assert separation(members, others) == pytest.approx(2 * 199 / 800)
    assert caught(members, others, 1.0) == 1


def test_unknown_names_and_groups():
    with pytest.raises(UserError, match="there is no metric or group 'entropie': choose from all, core, train, attack"):
        chosen_metrics(("core", "entropie"))
    assert set(chosen_metrics(("retrain", "UA"))) >= {"avg_gap", "ZRF_gap", "UA"}
    assert "RA" not in chosen_metrics(("retrain", "UA"))


def test_a_figure_is_computed_once_and_never_not_a_number():
    asked = []

    def infinite(e: Evidence) -> float:
        """Of no use."""
        asked.append(e)
        return math.inf

    try:
        metric("infinite", "1", "lower")(infinite)
        e = world()
        assert (e.value(infinite), e.value(infinite), len(asked)) == (None, None, 1)
        assert e.value(forget_loss) is not None
    finally:
        del METRICS["infinite"]


def test_a_figure_that_is_not_there_says_why():
    """Also through one that needs it; where no reason is known, that is said."""
    asked = []

    def without(e: Evidence) -> float:
        asked.append(e)
        raise Undefined("the network is too small")

    def resting_on(e: Evidence) -> float:
        return 2 * e.needed(without)

    def on_nothing(e: Evidence) -> float:
        return e.needed(lambda e: math.nan)

    e = world()
    assert e.why(without) is None  # nobody asked yet
    assert [e.value(of) for of in (resting_on, without, resting_on, on_nothing)] == [None] * 4
    assert e.why(without) == e.why(resting_on) == "the network is too small"
    assert e.why(on_nothing) == "a value that it rests on is no finite number"
    assert len(asked) == 1
    assert e.value(forget_loss) == e.needed(forget_loss)
    assert e.why(forget_loss) is None


def test_a_name_is_registered_once():
    first = METRICS["UA"]
    with pytest.raises(
        ValueError,
        match=rf"{__name__} registers a second metric 'UA', measure\.metrics registers one: choose another name",
    ):
        metric("UA", "%", "lower")(lambda e: 0.0)
    assert METRICS["UA"] is first


@pytest.mark.slow
@pytest.mark.parametrize("room", [measure, hidden], ids=lambda room: room.__name__)
def test_every_module_that_registers_metrics_is_listed(room):
    """Importing any file of the room imports the listed ones, so that no metric is ever missing."""
    name, listed = room.__name__, set(room.__all__)
    for path in sorted((PROJECT_ROOT / name).glob("[!_]*.py")):
        registers = "\n@metric(" in path.read_text(encoding="utf-8")
        assert registers == (path.stem in listed), path.name
    file = {"measure": "integrity", "hidden": "words"}[name]
    wanted = [one for one, entry in METRICS.items() if entry.compute.__module__.startswith(("measure.", f"{name}."))]
    assert registered(f"{name}.{file}") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["pipeline", "eval", "commands.docs", "forgetting.comparison"])
def test_who_reads_the_registry_has_all_of_it(entry):
    """`hidden` stands below `measure`, which cannot import it."""
    assert registered(entry) == list(METRICS)


def registered(module: str) -> list[str]:
    """The metrics that a fresh process knows which imports one module."""
    code = f"import {module}, sys; print(*sys.modules['measure.metrics'].METRICS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()
