"""Deep metrics against values by hand, properties and naive counts; nothing they do shows on the judged model."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from measure import probes
from measure.metrics import METRICS, Evidence, Outputs
from measure.probes import (
    MOST_PROBED_CLASSES,
    accuracy,
    drawn,
    drawn_of_some,
    features_of,
    linear_cka,
    probe_recall,
    regaining_steps,
    relearning,
    steps_until,
    training_images,
)
from model import HookedMLPClassifier, HookedModel, HookedResnet
from rivals.closed_form import DroppedLogits
from tests.helpers.common import evidence
from tests.helpers.three_classes import CLASSES, LABELS, SETS, beside, fitted, fresh, images_of, noise

DEEP = [name for name, entry in METRICS.items() if entry.group == "deep"]


@pytest.fixture(scope="module")
def judged() -> Evidence:
    """A model that knows all three classes, beside one that never saw class 0; they are their own originals."""
    model = fitted()
    original = evidence(model=model, images=images_of())
    whole = evidence(model=fitted((1, 2), seed=1), images=images_of(), original=original)
    return evidence(model=model, images=images_of(), retrained=(whole,))


def figures(e: Evidence) -> dict[str, float | None]:
    return {name: e.value(METRICS[name].compute) for name in DEEP}


# --- drawing ---


def test_a_larger_draw_holds_the_smaller_and_every_class_counts_alike():
    labels = torch.tensor([5, 7, 7, 5, 5, 7, 5, 9])
    few, more = drawn(labels, 2, seed=3), drawn(labels, 3, seed=3)
    assert sorted(labels[few].tolist()) == [5, 5, 7, 7, 9]  # class 9 has one image only
    assert set(few.tolist()) < set(more.tolist())
    assert len(set(more.tolist())) == 7
    assert drawn(labels, 3, seed=4).tolist() != more.tolist()


def test_a_probe_is_fitted_to_a_few_of_many_classes():
    few, many = torch.arange(MOST_PROBED_CLASSES).repeat(5), torch.arange(300).repeat(5)
    assert torch.equal(drawn_of_some(few, 3, seed=1), drawn(few, 3, seed=1))
    places = drawn_of_some(many, 3, seed=1)
    counts = torch.bincount(many[places])
    assert sorted(counts[counts > 0].tolist()) == [3] * MOST_PROBED_CLASSES
    assert len(set(places.tolist())) == len(places)
    assert torch.equal(places, drawn_of_some(many, 3, seed=1))
    assert set(many[places].tolist()) != set(many[drawn_of_some(many, 3, seed=2)].tolist())


def test_training_images_are_forgotten_ones_first(judged):
    images, labels = training_images(judged, "relearn", 5)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for image, label in zip(images, labels, strict=True):
        assert ((SETS["train"][0] == image).flatten(1).all(1) & (label == LABELS)).sum() == 1


def test_positions_and_functions_choose_alike():
    images = images_of((1,))
    by_place = images("val", True, torch.tensor([4, 2]))
    by_function = images("val", True, lambda labels: torch.tensor([4, 2]))
    assert torch.equal(by_place[0], by_function[0])
    assert torch.equal(by_place[0], images("val", True)[0][[4, 2]])


# --- probes ---


def test_a_probe_finds_what_is_linearly_separable_and_nothing_in_noise():
    labels = torch.arange(4).repeat(100)
    separable = nn.functional.one_hot(labels, 4).double() @ noise(1, 4, 6).double() * 9 + noise(2, 400, 6)
    assert probe_recall(separable[:200], labels[:200], separable[200:], labels[200:]) == 100.0
    chance = probe_recall(noise(3, 400, 6).double(), labels, noise(4, 2000, 6).double(), torch.arange(4).repeat(500))
    assert chance == pytest.approx(25, abs=4)


def test_a_probe_is_blind_to_scale_and_dead_features():
    labels = torch.arange(2).repeat(30)
    features = torch.cat([noise(5, 60, 3).double() + labels[:, None], torch.full((60, 1), -1e4)], 1)
    scaled = features * torch.tensor([1e-3, 1.0, 1e3, 5.0]) + 7
    plain = probe_recall(features[:, :3], labels, features[:, :3], labels)
    assert probe_recall(scaled, labels, scaled, labels) == plain
    assert plain is not None
    assert 60 < plain < 100


def test_a_probe_of_features_that_are_no_numbers_says_nothing():
    labels = torch.tensor([0, 1])
    assert probe_recall(torch.tensor([[1.0], [float("nan")]]), labels, torch.ones(2, 1), labels) is None


@pytest.mark.parametrize(
    ("mask_layer", "first", "last"), [(-2, 1, 1), (0, 0, 0), ((0, 1), 0, 1), (None, 0, 2), (-1, 2, 2)]
)
def test_features_are_what_the_target_layers_read_and_say(judged, mask_layer, first, last):
    e, (images, labels) = replace(judged, mask_layer=mask_layer), SETS["val"]
    with torch.no_grad():
        inputs, x = [], images.flatten(1)
        for layer in e.model.linears:
            inputs.append(x)
            x = layer(x).relu()
        said = e.model.linears[last](inputs[last])
    features = features_of(e, images, labels)
    torch.testing.assert_close(features.input.float(), inputs[first])
    torch.testing.assert_close(features.output.float(), said)


def test_the_probe_gap_is_against_the_mean_of_the_retrained_models(judged):
    first, second = judged.retrained[0], beside(judged, fresh())
    two = tuple(replace(e, _values={probes.probe_output: value}) for e, value in ((first, 60.0), (second, 70.0)))
    ours = replace(judged, retrained=two, _values={probes.probe_output: 90.0})
    assert ours.value(probes.probe_gap) == 25.0


# --- CKA ---


def test_cka_by_hand():
    """Centred x = (-1, 0, 1), y = ((-1, 1), (0, -2), (1, 1)): (y^T x)^2 = 4, |x^T x| = 2, |y^T y| = sqrt(4 + 36)."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    y = torch.tensor([[0.0, 6.0], [1.0, 3.0], [2.0, 6.0]])
    assert linear_cka(x, y) == pytest.approx(4 / (2 * 40**0.5))


def test_cka_sees_neither_rotation_nor_scale_nor_shift_nor_order():
    x, other = noise(1, 50, 6), noise(2, 50, 4)
    rotation = torch.linalg.qr(noise(3, 6, 6)).Q
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    assert linear_cka(x[order], other[order]) == pytest.approx(linear_cka(x, other))
    assert linear_cka(x, other) == pytest.approx(linear_cka(other, x))
    stretched = linear_cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1])))
    assert stretched is not None
    assert stretched < 0.9


def test_cka_of_features_that_say_nothing_is_not_a_number_but_none():
    assert linear_cka(torch.ones(5, 3), noise(1, 5, 3)) is None
    assert linear_cka(torch.full((5, 3), float("nan")), noise(1, 5, 3)) is None


# --- relearning ---


@pytest.mark.parametrize(
    ("scores", "steps"),
    [([95.0], 0), ([10.0, 94.9, 95.0, 10.0], 2), ([10.0, 20.0, 30.0, 40.0, 50.0, 95.0], 4), ([1.0], 4)],
)
def test_steps_are_counted_from_the_untouched_model_on(scores, steps):
    assert steps_until(95.0, itertools.chain(scores, itertools.repeat(0.0)), most=4) == steps


def test_no_step_is_taken_after_the_goal_or_the_most():
    read = []
    scores = (read.append(step) or float(step) for step in itertools.count())
    assert steps_until(3.0, scores, most=9) == 3
    assert read == [0, 1, 2, 3]


def test_ain_is_a_ratio_of_counted_steps(judged, monkeypatch):
    """A fake learner: a model named by the step at which it is right again."""
    needs = {id(judged.model): 6, id(judged.retrained[0].model): 8}
    fake = lambda model, *rest: ((needs[id(model)], step) for step in itertools.count())  # noqa: E731
    monkeypatch.setattr(probes, "relearning", fake)
    monkeypatch.setattr(probes, "_judged_accuracy", lambda e: 80.0)
    read = lambda state, *rest: 76.0 if state[1] >= state[0] else 75.9  # noqa: E731
    monkeypatch.setattr(probes, "accuracy", read)
    assert replace(judged, _values={}, retrained=(replace(judged.retrained[0], _values={}),)).value(
        probes.anamnesis_index
    ) == pytest.approx(6 / 8)


def test_relearning_starts_at_the_model_and_steps_as_adam_does(judged):
    """One step from a single batch moves every weight with a gradient by the learning rate, against its sign."""
    images, labels = training_images(judged, "relearn", 5)
    learners = relearning(judged.model, images, labels, 0)
    start = next(learners)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), judged.model.parameters(), strict=True))
    before = [parameter.detach().clone() for parameter in start.parameters()]
    loss = nn.functional.cross_entropy(start(images), labels)
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    after = next(learners)
    for old, new, gradient in zip(before, after.parameters(), gradients, strict=True):
        clear = gradient.abs() > 1e-4
        wanted = old - probes.LEARNING_RATE * gradient.sign()
        torch.testing.assert_close(new.detach()[clear], wanted[clear], rtol=0, atol=probes.LEARNING_RATE * 1e-3)


def test_an_untouched_model_relearns_from_the_top_and_a_retrained_one_from_the_bottom(judged):
    asked = SETS["test"][0][LABELS == 0], LABELS[LABELS == 0]
    assert accuracy(judged.model, *asked) == 100
    assert accuracy(judged.retrained[0].model, *asked) == 0
    assert [judged.value(METRICS[f"relearn_{shots}"].compute) for shots in (1, 10, 50)] == [100, 100, 100]
    assert judged.value(regaining_steps) == 0
    assert judged.value(probes.anamnesis_index) == 0
    assert judged.retrained[0].value(regaining_steps) > 0


def test_with_fewer_images_than_shots_nothing_is_said(judged, monkeypatch):
    pixels, labels = SETS["train"]
    monkeypatch.setitem(SETS, "train", (pixels[: 40 * CLASSES], labels[: 40 * CLASSES]))
    few = replace(judged, _values={})
    assert few.value(probes.relearn_10) == 100
    assert few.value(probes.relearn_50) is None


def test_a_dropped_logit_stays_dropped_and_its_features_tell_all(judged):
    model = fitted()
    model.linears[-1] = DroppedLogits(model.target(-1), (0,))
    e = beside(judged, model.eval())
    assert [e.value(METRICS[f"relearn_{shots}"].compute) for shots in (1, 10, 50)] == [0, 0, 0]
    assert e.value(regaining_steps) == probes.MOST_STEPS
    assert (e.value(probes.probe_output), e.value(probes.cka_original)) == (100, pytest.approx(1))
    assert not model.linears[-1].weight.requires_grad


# --- all of them ---


def bits(model: HookedModel) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", [HookedMLPClassifier, pytest.param(HookedResnet, marks=pytest.mark.slow)])
def test_the_judged_model_is_left_to_the_bit(judged, kind, monkeypatch):
    """BatchNorm's statistics, modes, flags and gradients too; nor does a copy's BatchNorm move."""
    monkeypatch.setattr(probes, "STEPS", 2)
    monkeypatch.setattr(probes, "MOST_STEPS", 2)
    model = fresh(0, kind)
    model.linears[0].weight.requires_grad_(False)
    before = bits(model)
    values = figures(beside(judged, model))
    assert all(value is not None for value in values.values())
    assert bits(model) == before
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.linears.parameters()] == [False, *[True] * (len(model.linears) - 1)]
    assert all(parameter.grad is None for parameter in model.parameters())
    *_, learned = itertools.islice(relearning(model, *SETS["train"], 0), 2)
    assert bits(learned) != before
    assert {name: value for name, value in bits(learned).items() if "running" in name} == {
        name: value for name, value in before.items() if "running" in name
    }


def test_nothing_hangs_on_a_global_seed(judged):
    e, seen = beside(judged, fresh(3)), []
    images, labels = training_images(e, "relearn", 50)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        *_, learned = itertools.islice(relearning(e.model, images, labels, 0), 4)
        seen.append((figures(replace(e, _values={})), bits(learned)))
        assert torch.equal(before, torch.random.get_rng_state())
    assert seen[0] == seen[1]


def test_the_run_s_seed_draws_images_and_their_order(judged):
    drawn_by = [training_images(replace(judged, seed=seed), "relearn", 1)[0] for seed in (0, 0, 1)]
    assert torch.equal(drawn_by[0], drawn_by[1])
    assert not torch.equal(drawn_by[0], drawn_by[2])
    images, labels = training_images(judged, "relearn", 50)
    ordered = [bits(next(itertools.islice(relearning(judged.model, images, labels, seed), 1, None))) for seed in (0, 1)]
    assert ordered[0] != ordered[1]


def test_the_size_of_a_forward_batch_moves_nothing(judged, monkeypatch):
    untrained = fresh(3)
    whole = figures(beside(judged, untrained))
    monkeypatch.setattr(probes, "CHUNK", 7)
    assert figures(beside(judged, untrained)) == pytest.approx(whole, abs=1e-6)


def test_without_retrained_models_what_needs_them_is_none(judged):
    alone = replace(judged, retrained=(), _values={})
    values = figures(alone)
    assert {name for name, value in values.items() if value is None} == {"AIN", "probe_gap", "CKA_retrain"}


def test_several_classes_to_forget_are_asked_for_together(judged):
    e = beside(replace(judged, forget_class=(0, 2), images=images_of((0, 2))), judged.model)
    _, labels = training_images(e, "relearn", 2)
    assert labels.tolist() == [0, 0, 2, 2, 1, 1]
    assert e.value(probes.relearn_10) == 100


def test_a_logit_that_is_no_number_is_not_recognised():
    model = fresh()
    with torch.no_grad():
        model.linears[-1].weight.fill_(float("nan"))
    first = LABELS == 0
    assert Outputs(model(SETS["test"][0][first]), LABELS[first]).score() == 0
    assert accuracy(model, SETS["test"][0][first], LABELS[first]) == 0
