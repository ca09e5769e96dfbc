"""Scores with new BatchNorm statistics, against statistics computed by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hidden import normalisation
from hidden.normalisation import forget_score_renewed, renewed, retain_score_renewed
from measure.metrics import Evidence, Outputs
from measure.probes import accuracy, drawn_of_all, relearning
from model import HookedModel
from tests.helpers.common import evidence
from tests.helpers.three_classes import CLASSES, LABELS, SETS, fitted, images_of

RETAINED = SETS["train"][0][LABELS != 0]


class Normed(HookedModel):
    """Pixels, normalised by a BatchNorm layer -> 8 -> classes."""

    def __init__(self):
        super().__init__((16, 8, CLASSES))
        self.norm = nn.BatchNorm1d(16)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(images.flatten(1))


@pytest.fixture(scope="module")
def model() -> HookedModel:
    """It knows all classes, with the statistics that BatchNorm begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Normed().eval()
    learners = relearning(start, *SETS["train"], 0)
    return [next(learners) for _ in range(60)][-1]


def judged(model: HookedModel, images=None) -> Evidence:
    labels = [LABELS[LABELS == 0], LABELS[LABELS != 0]]
    outputs = [Outputs(torch.zeros(len(one), CLASSES), one) for one in labels]
    return evidence(model=model, images=images or images_of(), test=tuple(outputs))


def by_hand(model: HookedModel, mean: torch.Tensor, variance: torch.Tensor) -> HookedModel:
    changed = copy.deepcopy(model)
    changed.norm.load_state_dict({"running_mean": mean, "running_var": variance}, strict=False)
    return changed


@pytest.mark.parametrize("batch", [256, 50, 119])
def test_statistics_are_means_over_batches_of_retained_images(model, monkeypatch, batch):
    """Of 120: one batch; 50, 50 and 20; 119, and a last one of a single image, which has no variance."""
    monkeypatch.setattr(normalisation, "CHUNK", batch)
    seed = normalisation.derive_seed(0, "BatchNorm")
    rows = RETAINED.flatten(1)[drawn_of_all(LABELS[LABELS != 0], 2000, seed)]
    parts = [part for part in rows.split(batch) if len(part) > 1]
    mean = torch.stack([part.mean(0) for part in parts]).mean(0)
    variance = torch.stack([part.var(0, correction=1) for part in parts]).mean(0)
    e = judged(model)
    found = e.value(renewed)
    torch.testing.assert_close(found.norm.running_mean, mean)
    torch.testing.assert_close(found.norm.running_var, variance)
    assert not found.norm.training
    expected = by_hand(model, mean, variance)
    for metric, mine in ((forget_score_renewed, LABELS == 0), (retain_score_renewed, LABELS != 0)):
        assert e.value(metric) == pytest.approx(accuracy(expected, SETS["test"][0][mine], LABELS[mine]))


def test_a_class_that_statistics_hide_comes_back(model):
    """The edit moves the layer's mean, so that class 0 is recognised no more; new statistics undo what it did."""
    centre = SETS["train"][0][LABELS == 0].flatten(1).mean(0)
    hidden_ = by_hand(model, 3 * centre, torch.ones(16))
    asked = SETS["test"][0][LABELS == 0], LABELS[LABELS == 0]
    assert accuracy(hidden_, *asked) == 0
    found = judged(hidden_).value(forget_score_renewed)
    assert found is not None
    assert found > 90
    assert torch.equal(hidden_.norm.running_mean, 3 * centre)


def test_without_such_a_layer_it_is_said_why():
    e = judged(fitted())
    assert [e.value(one) for one in (forget_score_renewed, retain_score_renewed)] == [None, None]
    assert e.why(forget_score_renewed) == e.why(retain_score_renewed) == "the network has no BatchNorm layer"


def test_without_images_it_is_said_why(model, monkeypatch):
    monkeypatch.setitem(SETS, "train", (SETS["train"][0][:2], LABELS[:2]))
    e = replace(judged(model), _values={})
    assert e.value(forget_score_renewed) is None
    assert "no two retained training images" in (e.why(forget_score_renewed) or "")
