"""Attacks on the last layer and on a mask's zeros, against weights that are put there one by one."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hidden import heads
from hidden.heads import head_swap_recall, position_attack, prototype_recall, some_forgotten, switched_off
from hidden.heads import with_prototypes as prototypes
from measure.metrics import Evidence
from measure.probes import accuracy
from model import HookedModel
from rivals.closed_form import DroppedLogits
from tests.helpers.common import evidence
from tests.helpers.three_classes import CLASSES, LABELS, SETS, beside, fitted, fresh, images_of, noise

ASKED = SETS["test"][0][LABELS == 0], LABELS[LABELS == 0]


@pytest.fixture(scope="module")
def judged() -> Evidence:
    model = fitted()
    return evidence(model=model, images=images_of(), original=evidence(model=model, images=images_of()))


def masked(model: HookedModel, layer: int, share: float) -> HookedModel:
    """A copy with a share of a layer's weights switched off, the largest first."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight = changed.target(layer).weight
        weight.view(-1)[weight.abs().flatten().topk(int(share * weight.numel())).indices] = 0
    return changed


def test_prototypes_by_hand():
    """Row 1 becomes the mean (3, 4), of length 5, as long as the rows of length 1 and 3 are in the mean: 2."""
    weight = torch.tensor([[1.0, 0.0], [7.0, 7.0], [0.0, 3.0]])
    found = prototypes(weight, torch.tensor([[2.0, 5.0], [4.0, 3.0]]), torch.tensor([1, 1]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [1.2, 1.6], [0.0, 3.0]]))
    assert weight[1].tolist() == [7, 7]
    assert prototypes(weight, torch.zeros(2, 2), torch.tensor([1, 1]))[1].tolist() == [0, 0]


def test_prototype_recall_is_that_of_a_model_with_the_row_and_a_constant(judged, monkeypatch):
    """The oracle tries constants until more than 5 % of the retained training images are taken for class 0."""
    for seed, split in enumerate(("train", "test")):
        images, labels = SETS[split]
        monkeypatch.setitem(SETS, split, (images + noise(seed, *images.shape), labels))
    e = beside(judged, fresh(3))
    found = some_forgotten(e)
    assert found is not None
    images, labels = found
    assert labels.tolist() == [0] * 10
    changed = copy.deepcopy(e.model)
    with torch.no_grad():
        h = images.flatten(1)
        for layer in changed.linears[:-1]:
            h = layer(h).relu()
        row, weight = h.mean(0), changed.target(-1).weight
        weight[0] = row / row.norm() * (weight[1].norm() + weight[2].norm()) / 2
        retained, asked = (changed(SETS[s][0][part]) for s, part in (("train", LABELS != 0), ("test", LABELS == 0)))

    def taken(logits: torch.Tensor, added: float) -> float:
        return float((logits + torch.tensor([added, 0, 0])).argmax(1).eq(0).double().mean())

    assert taken(retained, 0) > 0.8  # of no use without a constant
    fine = [added for added in torch.arange(-12, 2, 1e-3).tolist() if taken(retained, added) <= 0.05]
    assert e.value(prototype_recall) == pytest.approx(100 * taken(asked, max(fine)), abs=2)
    assert 10 < taken(asked, max(fine)) * 100 < 90


def test_a_dropped_logit_falls_to_a_prototype_and_to_a_swap(judged):
    model = fitted()
    model.linears[-1] = DroppedLogits(model.target(-1), (0,))
    e = beside(judged, model.eval())
    assert accuracy(e.model, *ASKED) == 0
    assert e.value(prototype_recall) == 100
    assert e.value(head_swap_recall) == 100


def test_a_swapped_head_is_the_untouched_one(judged):
    e = beside(judged, fresh(3))
    changed = copy.deepcopy(e.model)
    changed.linears[-1] = judged.model.linears[-1]
    assert e.value(head_swap_recall) == pytest.approx(accuracy(changed, *ASKED))
    assert judged.value(head_swap_recall) == pytest.approx(accuracy(judged.model, *ASKED))


def test_too_few_images_are_said(judged, monkeypatch):
    pixels, labels = SETS["train"]
    monkeypatch.setitem(SETS, "train", (pixels[: 9 * CLASSES], labels[: 9 * CLASSES]))
    assert some_forgotten(judged) is None
    assert replace(judged, _values={}).value(prototype_recall) is None
    assert beside(judged, masked(judged.model, 1, 0.1)).value(position_attack) is None


def test_only_a_mask_has_zeros_to_attack(judged):
    model = judged.model
    off = masked(model, 1, 0.01)
    found = switched_off(beside(judged, off))
    assert found is not None
    assert list(found) == ["linears.1.weight"]
    assert torch.equal(found["linears.1.weight"], off.target(1).weight == 0)
    with torch.no_grad():
        off.target(0).weight[0, 0] += 1
    assert switched_off(beside(judged, off)) is None
    assert switched_off(beside(judged, copy.deepcopy(model))) is None
    assert switched_off(replace(judged, original=None)) is None
    assert beside(judged, off).value(position_attack) is None


def test_zeros_get_the_mean_magnitude_against_the_gradient(judged, monkeypatch):
    """Two layers at once; every other weight stays."""
    off = masked(masked(judged.model, 1, 0.05), 2, 0.2)
    e, seen = beside(judged, off), []
    monkeypatch.setattr(heads, "accuracy", lambda model, *rest: seen.append(model) or accuracy(model, *rest))
    value = e.value(position_attack)
    found = some_forgotten(e)
    assert found is not None
    images, labels = found
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


def test_knowing_where_the_zeros_are_brings_a_class_back(judged):
    """By first order, what the class needs most is switched off: the attack finds its signs again."""
    off = copy.deepcopy(judged.model)
    weight = off.target(1).weight
    logits = off(ASKED[0])
    (gradient,) = torch.autograd.grad((logits[:, 0] - logits[:, 1:].amax(1)).mean(), weight)
    with torch.no_grad():
        weight.view(-1)[(weight * gradient).flatten().topk(1500).indices] = 0
    assert accuracy(off, *ASKED) == 0
    assert beside(judged, off).value(position_attack) == 100
