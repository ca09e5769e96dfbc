"""Relearning at several rates and from a fresh last layer: means of what `relearn` says, and steps by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from hidden import retraining
from hidden.retraining import RATES, area, fresh_head_10, relearn_area_10, with_fresh_head
from measure import probes
from measure.metrics import METRICS, Evidence, Undefined
from measure.probes import relearn, relearning, training_images
from model import HookedModel
from rivals.closed_form import DroppedLogits
from tests.helpers.common import evidence
from tests.helpers.three_classes import CLASSES, SETS, beside, fitted, fresh, images_of

AREAS = tuple(f"{kind}_{shots}" for kind in ("relearn_area", "fresh_head") for shots in (1, 10, 50))


@pytest.fixture(scope="module")
def judged() -> Evidence:
    model = fitted((1, 2))
    original = evidence(model=fitted(), images=images_of())
    return evidence(model=model, images=images_of(), original=original)


def dropped(judged: Evidence) -> Evidence:
    """A model that knows class 0 and whose logit of it is gone."""
    model = fitted()
    model.linears[-1] = DroppedLogits(model.target(-1), (0,))
    return beside(judged, model.eval())


def test_each_area_is_of_its_own_number_of_images(judged, monkeypatch):
    monkeypatch.setattr(retraining, "relearn", lambda e, shots, rate, start: float(shots + 100 * (start is not None)))
    fresh_e = replace(judged, _values={})
    assert [fresh_e.value(METRICS[name].compute) for name in AREAS] == [1, 10, 50, 101, 110, 150]


@pytest.mark.parametrize("rate", RATES)
def test_a_step_is_as_long_as_the_rate(judged, rate):
    """Adam's first step moves every weight with a gradient by the learning rate."""
    images, labels = training_images(judged, "relearn", 5)
    learners = relearning(judged.model, images, labels, 0, rate)
    start = next(learners)
    before = [weight.detach().clone() for weight in start.parameters()]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(start(images), labels), list(start.parameters()))
    for old, new, gradient in zip(before, next(learners).parameters(), gradients, strict=True):
        clear = gradient.abs() > 1e-4
        moved = (new.detach() - old)[clear]
        torch.testing.assert_close(moved, -rate * gradient.sign()[clear], rtol=0, atol=rate * 1e-2)


def test_the_area_is_the_mean_over_rates(judged, monkeypatch):
    by_rate = {5e-4: 10.0, 2e-3: 20.0, 8e-3: 60.0}
    monkeypatch.setattr(retraining, "relearn", lambda e, shots, rate, start: by_rate[rate] + shots)
    assert area(judged, 10) == 40
    monkeypatch.setattr(retraining, "relearn", lambda e, shots, rate, start: None)
    with pytest.raises(Undefined, match="fewer than 10 training images"):
        area(judged, 10)


def test_the_middle_of_the_area_is_relearn_itself(judged):
    assert relearn(judged, 10, 2e-3) == relearn(judged, 10) == judged.value(probes.relearn_10)
    recalls = [relearn(judged, 10, rate) for rate in RATES]
    assert judged.value(relearn_area_10) == pytest.approx(sum(float(value or 0) for value in recalls) / 3)


def test_a_fresh_head_is_uniform_and_alone_is_new(judged):
    model = judged.model
    learner = with_fresh_head(model, 3)
    n = model.target(-1).in_features
    drawn = learner.target(-1).weight
    expected = torch.empty(CLASSES, n).uniform_(-(n**-0.5), n**-0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, expected)
    for place in (0, 1):
        assert torch.equal(learner.target(place).weight, model.target(place).weight)
        assert learner.target(place).weight is not model.target(place).weight
    assert not torch.equal(with_fresh_head(model, 4).target(-1).weight, drawn)


def test_a_fresh_head_is_where_relearning_starts(judged, monkeypatch):
    starts: list[HookedModel] = []
    rates: list[float] = []

    def noted(model, images, labels, seed, rate):
        starts.append(model)
        rates.append(rate)
        return itertools.repeat(model)

    monkeypatch.setattr(probes, "relearning", noted)
    replace(judged, _values={}).value(fresh_head_10)
    assert rates == [5e-4, 2e-3, 8e-3]
    weights = [start.target(-1).weight for start in starts]
    assert torch.equal(weights[0], weights[2])  # alike at every rate, and for every model of the run
    assert not torch.equal(weights[0], judged.model.target(-1).weight)
    assert torch.equal(starts[0].target(0).weight, judged.model.target(0).weight)
    other = beside(judged, fresh(7))
    other.value(fresh_head_10)
    assert torch.equal(starts[3].target(-1).weight, weights[0])


def test_nothing_hides_behind_a_fresh_head(judged):
    """The old head's guard holds at every rate; from a fresh head features bring the class back."""
    guarded = dropped(judged)
    assert [guarded.value(METRICS[name].compute) for name in AREAS[:3]] == [0, 0, 0]
    again = guarded.value(METRICS["fresh_head_50"].compute)
    assert again is not None
    assert again > 60


def test_with_too_few_images_nothing_is_said(judged, monkeypatch):
    pixels, labels = SETS["train"]
    monkeypatch.setitem(SETS, "train", (pixels[: 40 * CLASSES], labels[: 40 * CLASSES]))
    few = replace(judged, _values={})
    assert [few.value(METRICS[name].compute) is None for name in AREAS] == [False, False, True, False, False, True]
    reasons = {few.why(METRICS[name].compute) for name in AREAS}
    assert reasons == {None, "a forgotten class has fewer than 50 training images"}


def test_the_model_is_left_as_it_is_and_no_global_seed_is_read(judged):
    e = replace(judged, _values={})
    before = {name: value.clone() for name, value in e.model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = e.value(fresh_head_10)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in e.model.state_dict().items())
    torch.manual_seed(2)
    assert replace(judged, _values={}).value(fresh_head_10) == first
