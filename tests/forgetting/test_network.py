"""The graph network that is shipped, on a layer of a model that somebody else made."""

import pytest
import torch
from torch import Tensor, nn

from forgetting.answers import BY_NETWORK, SHIPPED, Answering, Ways
from forgetting.pictures import Loader
from forgetting.samples import read_samples
from graphs.subsets import hard_topk
from models.foreign import ForeignClassifier
from tests.helpers.foreign import bits
from unlearn.features import ClassStatistics
from unlearn.requests import FrozenHead, Request, Unlearner

CLASSES = 5


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    )


@pytest.fixture(scope="module")
def images(net) -> tuple[Tensor, Tensor]:
    """Images of five patterns and noise; the network is trained on them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(120)
    found = torch.randn(CLASSES, 3, 4, 4, generator=generator)[labels]
    found = found + 0.7 * torch.randn(len(labels), 3, 4, 4, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(80):
        loss = nn.functional.cross_entropy(net(found), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    return found, labels


@pytest.fixture(scope="module")
def asking(net, images) -> Answering:
    classifier = ForeignClassifier(net, lambda said: said, images[0][:4], CLASSES, ("3",))
    return Answering(classifier, read_samples(classifier, Loader([images], CLASSES)))


@pytest.mark.parametrize("label", range(CLASSES))
def test_its_scores_are_those_that_it_gives_to_statistics_made_by_hand(label, asking, net, images):
    """Means of activations and gradients by plain torch, layer by layer."""
    samples, layer = asking.parts.train, net[3]
    h, z, gradients = [], [], []
    for one in range(CLASSES):
        given = net[:3](images[0][samples.places[samples.labels == one]])
        weight = layer.weight.detach().clone().requires_grad_()
        said = nn.functional.linear(given, weight, layer.bias)
        loss = nn.functional.cross_entropy(net[5](net[4](said)), torch.full((len(given),), one))
        gradients.append(torch.autograd.grad(loss, weight)[0])
        h.append(given.mean(0))
        z.append(said.detach().mean(0))
    counts = torch.bincount(samples.labels, minlength=CLASSES)
    graph = asking.head.graph
    weight = graph.join([layer.weight.detach()])
    every = [graph.join([one]) for one in gradients]
    statistics = ClassStatistics(graph, weight, counts, [torch.stack(h)], [torch.stack(z)], lambda one: every[one])
    head = FrozenHead(asking.model, None, statistics, asking.head.h, asking.head.labels)
    network, _ = Unlearner.load(SHIPPED)
    with torch.no_grad():
        expected = network.theta(head, Request((label,), 30))
    found = asking.by_network(Request((label,), 30))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(asking.answer((label,), 30, Ways.network).off, hard_topk(found, 30))


def test_it_forgets_alone_and_refining_does_not_undo_it(asking, net):
    """On average over classes: a tenth is left at most, and with descent from there next to nothing."""
    before, val = bits(net), asking.parts.val
    left = {}
    for way in BY_NETWORK:
        answers = [asking.answer((label,), 30, way) for label in range(CLASSES)]
        found = [asking.attempt(one, asking.predictions(val), None) for one in answers]
        left[way] = sum(one.forget_score for one in found) / CLASSES
        assert sum(one.retain_drop for one in found) / CLASSES < 10
    assert left[Ways.network] < 10
    assert left[Ways.network_refined] < 5
    assert bits(net) == before


def test_a_class_without_images_does_not_stop_it(net, images):
    pixels, labels = images
    some = labels < CLASSES - 1
    classifier = ForeignClassifier(net, lambda said: said, pixels[:4], CLASSES, ("3",))
    asking = Answering(classifier, read_samples(classifier, Loader([(pixels[some], labels[some])], CLASSES)))
    assert bool(asking.by_network(Request((0,), 30)).isfinite().all())
