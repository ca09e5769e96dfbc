"""Attacks on the last layer, against weights that are put there one by one."""

import copy
from dataclasses import replace

import pytest
import torch

from hidden.heads import head_swap_recall, prototype_recall, some_forgotten
from hidden.heads import with_prototypes as prototypes
from measure.metrics import Evidence, Undefined
from measure.probes import accuracy
from rivals.closed_form import DroppedLogits
from tests.helpers.common import evidence
from tests.helpers.three_classes import CLASSES, LABELS, SETS, beside, fitted, fresh, images_of, noise

ASKED = SETS["test"][0][LABELS == 0], LABELS[LABELS == 0]


@pytest.fixture(scope="module")
def judged() -> Evidence:
    model = fitted()
    return evidence(model=model, images=images_of(), original=evidence(model=model, images=images_of()))


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
    images, labels = some_forgotten(e)
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
    few = replace(judged, _values={})
    with pytest.raises(Undefined, match="a forgotten class has fewer than 10 training images"):
        some_forgotten(few)
    assert few.value(prototype_recall) is None
    assert few.why(prototype_recall) == "a forgotten class has fewer than 10 training images"
