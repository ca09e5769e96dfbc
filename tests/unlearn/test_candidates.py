"""Requests in layers of many weights: refinement among a few candidates, starts by rank, and sums over classes."""

import math

import pytest
import torch
from torch import Tensor, nn

from core.config import RefineConfig, UserError
from forgetting.answers import Answering
from forgetting.pictures import Loader
from forgetting.samples import Samples, read_samples
from graphs.layout import WeightGraph
from graphs.subsets import hard_topk
from models.foreign import ForeignClassifier
from tests.helpers.foreign import resnet
from unlearn import features
from unlearn.features import ClassStatistics
from unlearn.requests import FrozenHead, Request, _refine_among, refine, tail_start

CONFIG = RefineConfig(steps=6, lr=0.3)
REQUEST = Request((1,), 40)


def head_of(module: nn.Module, images: Tensor, labels: Tensor, outputs: int, *layers: str) -> FrozenHead:
    model = ForeignClassifier(module, lambda output: output, images, outputs, layers or ("auto",))
    return Answering(model, read_samples(model, Loader([(images, labels)], outputs))).head


@pytest.fixture(scope="module")
def head() -> FrozenHead:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 3, 32, 32, generator=generator), torch.arange(60) % 5
    return head_of(resnet(), images, labels, 5, "layer3.0.conv1")


def test_refinement_among_all_is_plain_refinement(head):
    theta = tail_start(head, (1,))
    plain = refine(head, theta, REQUEST, CONFIG)
    assert torch.equal(refine(head, theta, REQUEST, CONFIG, candidates=theta.numel()), plain)
    among = _refine_among(head, theta, REQUEST, CONFIG, theta.numel())
    assert torch.allclose(among, plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, (theta - theta.mean()) / theta.std(), rtol=1e-3, atol=1e-3)
    kept = hard_topk(plain, REQUEST.kappa) & hard_topk(among, REQUEST.kappa)
    assert int(kept.sum()) >= REQUEST.kappa - 1


@pytest.mark.parametrize("candidates", [1, 40, 41, 80, 320])
def test_no_weight_is_chosen_that_is_no_candidate(candidates, head):
    """Candidates are those where theta starts largest; fewer than kappa cannot be."""
    theta = tail_start(head, (1,))
    found = refine(head, theta, REQUEST, CONFIG, candidates)
    allowed = torch.zeros(theta.numel(), dtype=torch.bool)
    allowed[sorted(range(theta.numel()), key=lambda at: -float(theta.flatten()[at]))[: max(40, candidates)]] = True
    assert torch.equal(found.isfinite().flatten(), allowed)
    chosen = hard_topk(found, REQUEST.kappa).flatten()
    assert int(chosen.sum()) == REQUEST.kappa
    assert not (chosen & ~allowed).any()


def test_refinement_changes_what_is_chosen_and_lowers_the_loss(head):
    theta = tail_start(head, (1,))
    found = refine(head, theta, REQUEST, RefineConfig(steps=15, lr=0.3, lambda_retain=1.0), 320)

    def loss(theta: Tensor) -> float:
        forget, retain = head.losses(hard_topk(theta, REQUEST.kappa).float(), (1,), RefineConfig().forget_loss)
        return float((forget + retain).detach())

    assert not torch.equal(hard_topk(found, REQUEST.kappa), hard_topk(theta, REQUEST.kappa))
    assert loss(found) < loss(theta)


def test_the_start_is_the_logarithm_of_a_rank(head):
    """By a loop over weights; of equal scores the first comes first."""
    score = head.statistics.signed_taylor((1,)).flatten().tolist()
    assert len(set(score)) < len(score)  # zeros of ReLUs that are never on
    order = sorted(range(len(score)), key=lambda at: (-score[at], at))
    naive = [0.0] * len(score)
    for rank, at in enumerate(order):
        naive[at] = -math.log((rank + 0.5) / len(score))
    theta = tail_start(head, (1,))
    assert theta.shape == head.weight.shape
    assert torch.allclose(theta.flatten(), torch.tensor(naive), rtol=1e-5, atol=1e-6)


# --- sums over classes ------------------------------------------------------------------------------------

GRAPH = WeightGraph(((4, 5),), ())


def statistics(counts: list[int]) -> ClassStatistics:
    """Of random gradients; a class without images has a gradient of zeros, as a mean over nothing."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(GRAPH.shape, generator=generator)
    gradients = [torch.randn(GRAPH.shape, generator=generator) * (count > 0) for count in counts]
    return ClassStatistics(GRAPH, weight, torch.tensor(counts), [], [], gradients.__getitem__)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("classes", [(0,), (2, 4), (4, 0, 1)])
def test_a_total_over_classes_gives_what_a_pass_for_each_request_gives(classes, kept, monkeypatch):
    monkeypatch.setattr(features, "MOST_KEPT", 2**28 if kept else 0)
    found = statistics([3, 5, 2, 9, 4])
    for weight_retain in (9.0, 0.5):
        expected = found.contributions(classes).signed_taylor(weight_retain)
        assert torch.allclose(found.signed_taylor(classes, weight_retain), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_classes_without_images_are_in_no_mean(kept, monkeypatch):
    """The oracle has never heard of them."""
    monkeypatch.setattr(features, "MOST_KEPT", 2**28 if kept else 0)
    counts = [3, 0, 2, 9, 0, 4]
    present = [label for label, count in enumerate(counts) if count]
    whole = statistics(counts)
    kept_ = [gradient for gradient, count in zip(whole.gradients(), counts, strict=True) if count]
    fewer = ClassStatistics(GRAPH, whole.weight, torch.tensor([3, 2, 9, 4]), [], [], kept_.__getitem__)
    for classes in ((0,), (2, 5)):
        expected = fewer.contributions([present.index(label) for label in classes]).signed_taylor()
        assert torch.allclose(whole.signed_taylor(classes), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(whole.signed_taylor((0, 1)), whole.signed_taylor((0,)))
    with pytest.raises(UserError, match="images of 0 classes to forget and of 4 to retain"):
        whole.signed_taylor((1, 4))
    with pytest.raises(UserError, match="images of 4 classes to forget and of 0 to retain"):
        whole.signed_taylor((0, 2, 3, 5))


class Viewing(nn.Module):
    """Flattens by `view(B, -1)`, which no empty batch can be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Linear(36, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(images)).view(len(images), -1))


def test_a_class_without_images_costs_no_pass():
    torch.manual_seed(0)
    module, images, labels = Viewing().eval(), torch.randn(30, 3, 8, 8), torch.arange(30) % 3
    head = head_of(module, images, labels, 6)
    assert head.statistics.counts.tolist()[3:] == [0, 0, 0]
    assert not list(head.statistics.gradients())[4].any()
    none = torch.zeros(0, dtype=torch.long)
    empty = Samples(head.h, none, none)
    assert empty.logits(head.model).shape == (0, 6)
