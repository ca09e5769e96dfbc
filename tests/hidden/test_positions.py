"""Attacks on a mask's places, against weights that are put there one by one, and a sealed file's own noise."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hidden import positions
from hidden.heads import some_forgotten
from hidden.positions import (
    elsewhere,
    guessed,
    guessed_places,
    noise_found,
    noise_relearn,
    noisy,
    position_attack,
    position_attack_random,
    position_relearn,
    position_relearn_random,
    random_places,
    sealed_with_noise,
    switched_off,
    with_signs,
    with_training,
)
from measure.metrics import METRICS, Evidence, Undefined
from measure.probes import accuracy
from mimu import Config, Mask, describe_parent, seal
from mimu.config import Forgotten
from model import HookedModel
from tests.helpers.common import evidence
from tests.helpers.three_classes import CLASSES, LABELS, SETS, beside, fitted, images_of

ASKED = SETS["test"][0][LABELS == 0], LABELS[LABELS == 0]
ALL = [name for name, entry in METRICS.items() if entry.compute.__module__ == "hidden.positions"]


@pytest.fixture(scope="module")
def judged() -> Evidence:
    model = fitted()
    return evidence(model=model, images=images_of(), original=evidence(model=model, images=images_of()))


@pytest.fixture(scope="module")
def attacked(judged) -> Evidence:
    """By first order, what the class needs most is switched off."""
    off = copy.deepcopy(judged.model)
    weight = off.target(1).weight
    logits = off(ASKED[0])
    (gradient,) = torch.autograd.grad((logits[:, 0] - logits[:, 1:].amax(1)).mean(), weight)
    with torch.no_grad():
        weight.view(-1)[(weight * gradient).flatten().topk(1500).indices] = 0
    assert accuracy(off, *ASKED) == 0
    return beside(judged, off)


def masked(model: HookedModel, layer: int, share: float) -> HookedModel:
    """A copy with a share of a layer's weights switched off, the largest first."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight = changed.target(layer).weight
        weight.view(-1)[weight.abs().flatten().topk(int(share * weight.numel())).indices] = 0
    return changed


def test_a_model_without_zeros_has_none_to_attack(judged):
    model = judged.model
    off = masked(model, 1, 0.01)
    found = switched_off(beside(judged, off))
    assert list(found) == ["linears.1.weight"]
    assert torch.equal(found["linears.1.weight"], off.target(1).weight == 0)
    with torch.no_grad():
        off.target(0).weight[0, 0] += 1  # an edit may change other weights as well: zeros show all the same
        off.target(-1).weight[0] = 1.5
    assert list(switched_off(beside(judged, off))) == ["linears.1.weight"]
    for e, why in (
        (beside(judged, copy.deepcopy(model)), "no weight is switched off"),
        (replace(judged, original=None, _values={}), "no untouched classifier"),
    ):
        with pytest.raises(Undefined, match=why):
            switched_off(e)
        assert {e.value(METRICS[name].compute) for name in ALL} == {None}
        assert all(why in (e.why(METRICS[name].compute) or "") for name in ALL)


def test_zeros_of_the_parent_are_no_places(judged):
    parent = masked(judged.model, 2, 0.3)
    off = masked(parent, 1, 0.01)
    e = replace(judged, model=off, original=evidence(model=parent), _values={})
    assert list(switched_off(e)) == ["linears.1.weight"]


def test_zeros_get_the_mean_magnitude_against_the_gradient(judged, monkeypatch):
    """Two layers at once; every other weight stays."""
    off = masked(masked(judged.model, 1, 0.05), 2, 0.2)
    e, seen = beside(judged, off), []
    monkeypatch.setattr(positions, "accuracy", lambda model, *rest: seen.append(model) or accuracy(model, *rest))
    value = e.value(position_attack)
    images, labels = some_forgotten(e)
    again = copy.deepcopy(off).requires_grad_(True)
    nn.functional.cross_entropy(again(images), labels).backward()
    for place in range(3):
        weight, gradient = off.target(place).weight.detach(), again.target(place).weight.grad
        zero = (weight == 0) & (judged.model.target(place).weight != 0)
        expected = torch.where(zero, -weight[~zero].abs().mean() * gradient.sign(), weight)
        torch.testing.assert_close(seen[0].target(place).weight.detach(), expected)
        assert bool(zero.any()) == (place > 0)
    assert value == pytest.approx(accuracy(seen[0], *ASKED))
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), e.model.parameters(), strict=True))


def test_training_moves_the_places_and_nothing_else(attacked):
    """The first step of Adam is as long as its rate, against the gradient; the images are all there are."""
    images, labels = some_forgotten(attacked)
    places = switched_off(attacked)
    off = places["linears.1.weight"]
    trained = with_training(attacked.model, places, images, labels)
    for place in range(3):
        moved = trained.target(place).weight != attacked.model.target(place).weight
        assert bool(moved.any()) == (place == 1)
        assert place != 1 or not bool(moved[~off].any())
    once = _one_step(attacked.model, places, images, labels)
    again = copy.deepcopy(attacked.model).requires_grad_(True)
    nn.functional.cross_entropy(again(images), labels).backward()
    slope = again.target(1).weight.grad
    clear = off & (slope.abs() > 1e-4)
    torch.testing.assert_close(once.target(1).weight[clear], -1e-2 * slope.sign()[clear], rtol=0, atol=1e-4)
    assert not attacked.model.target(1).weight[off].any()


def _one_step(*given) -> HookedModel:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(positions, "STEPS", 1)
        return with_training(*given)


def test_random_places_are_as_many_and_none_of_the_mask_s():
    off = torch.zeros(20, 30, dtype=torch.bool)
    off[0] = True
    more = torch.ones(4, 4, dtype=torch.bool)
    more[0, 0] = False
    found = elsewhere({"a": off, "b": more}, seed=1)
    assert int(found["a"].sum()) == 30
    assert not bool((found["a"] & off).any())
    assert int(found["b"].sum()) == 15  # of 16: one is free, 14 are not
    assert bool(found["b"][0, 0])
    assert not torch.equal(found["a"], elsewhere({"a": off}, seed=2)["a"])
    assert torch.equal(found["a"], elsewhere({"a": off}, seed=1)["a"])


def test_noise_is_what_seal_writes(attacked, tmp_path):
    """The same numbers, to the bit, as in a checkpoint that is sealed with noise of the same seed."""
    parent, places = attacked.original.model, switched_off(attacked)
    where = {name: off.flatten().nonzero().flatten() for name, off in places.items()}
    mask = Mask(where, Config((Forgotten(0, "zero"),), describe_parent(parent, where)))
    save_file(parent.state_dict(), tmp_path / "parent.safetensors")
    seal(tmp_path / "parent.safetensors", mask, tmp_path / "sealed.safetensors", fill="noise", seed=7)
    sealed = load_file(tmp_path / "sealed.safetensors")
    for name, value in noisy(attacked.model, places, 7).state_dict().items():
        assert torch.equal(value, sealed[name])
    noise = sealed["linears.1.weight"][places["linears.1.weight"]]
    assert len(noise.unique()) > 1400


def test_guesses_are_the_largest_gradients(attacked):
    images, labels = some_forgotten(attacked)
    found = guessed(attacked.model, {"linears.1.weight": 5}, images, labels)
    again = copy.deepcopy(attacked.model).requires_grad_(True)
    nn.functional.cross_entropy(again(images), labels).backward()
    slope = again.target(1).weight.grad.abs().flatten()
    assert found["linears.1.weight"].flatten().nonzero().flatten().tolist() == sorted(slope.topk(5).indices.tolist())


def test_what_is_found_is_the_share_of_places_guessed_rightly(attacked, monkeypatch):
    off = switched_off(attacked)["linears.1.weight"]
    third = torch.zeros_like(off)
    third.view(-1)[off.flatten().nonzero().flatten()[:500]] = True
    e = replace(attacked, _values={guessed_places: {"linears.1.weight": third}})
    assert e.value(noise_found) == pytest.approx(100 * 500 / 1500)


def test_knowing_where_the_zeros_are_brings_a_class_back(attacked):
    """By both attacks; each value is the accuracy of the copy that the attack makes."""
    images, labels = some_forgotten(attacked)
    assert attacked.value(position_attack) == 100
    assert attacked.value(position_relearn) == 100
    elsewhere_ = attacked.value(random_places)
    signs = with_signs(attacked.model, elsewhere_, images, labels)
    assert attacked.value(position_attack_random) == pytest.approx(accuracy(signs, *ASKED))
    everything = positions.training_images(attacked, "positions", 10)
    assert len(everything[1]) == 10 * CLASSES
    again = with_training(attacked.model, elsewhere_, *everything)
    assert attacked.value(position_relearn_random) == pytest.approx(accuracy(again, *ASKED))
    sealed, places = attacked.value(sealed_with_noise), attacked.value(guessed_places)
    again = with_training(sealed, places, *everything)
    assert attacked.value(noise_relearn) == pytest.approx(accuracy(again, *ASKED))


def test_too_few_images_are_said(attacked, monkeypatch):
    pixels, labels = SETS["train"]
    monkeypatch.setitem(SETS, "train", (pixels[: 9 * CLASSES], labels[: 9 * CLASSES]))
    e = replace(attacked, _values={})
    assert e.value(position_attack) is None
    assert e.why(position_attack) == "a forgotten class has fewer than 10 training images"


def test_the_model_is_left_as_it_is_and_no_global_seed_is_read(attacked):
    before = {name: value.clone() for name, value in attacked.model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = {name: replace(attacked, _values={}).value(METRICS[name].compute) for name in ALL}
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in attacked.model.state_dict().items())
    torch.manual_seed(4)
    assert first == {name: replace(attacked, _values={}).value(METRICS[name].compute) for name in ALL}
