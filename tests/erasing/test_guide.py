"""What a graph network that guides descents reads, against autograd; its passes; how it learns; its file."""

import math
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from core.config import PROJECT_ROOT, GCNConfig, Trackers, UserError
from core.observe import Tracker
from erasing import terms
from erasing.descent import Descent, Schedule, guided
from erasing.guide import COLUMNS, Asked, Guide, Look, standardised, started
from erasing.stages import Stages, rows_of
from erasing.teaching import Teaching
from erasing.terms import Sides
from graphs.layout import WeightGraph
from graphs.subsets import sinkhorn_topk
from model import HookedMLPClassifier, MaskingGCN
from models.foreign import ForeignClassifier
from models.targets import DEEP
from trainer import GCNTrainer
from unlearn.methods import GUIDE

KAPPA = 1000
GRAPH = WeightGraph(((3, 4), (2, 3)), (False,))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(terms, "FORGOTTEN", 16)
    monkeypatch.setattr(terms, "RETAINED", 32)


@cache
def asked() -> tuple[Sides, torch.Tensor]:
    """A request to a trained MLP of four classes, in double precision; one weight may not be switched off."""
    torch.manual_seed(0)
    model = HookedMLPClassifier(4, 1, 4).double()
    images, labels = torch.randn(200, 1, 4, 4, dtype=torch.float64), torch.arange(200) % 4
    images[torch.arange(200), 0, labels] += 1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    deep = ForeignClassifier(model, lambda said: said, images[:4], 4, (DEEP,))
    stages = Stages(deep)
    rows = rows_of(deep, [images])
    sides = Sides(stages, rows, labels, (1,), stages.logits(rows))
    barred = torch.zeros(deep.weight_graph().shape, dtype=torch.bool)
    barred[5] = True
    return sides, barred


def descent(schedule: Schedule | None = None, target: float = 0.1) -> Descent:
    """Seeks a mask for it."""
    sides, barred = asked()
    return Descent(sides, torch.full((2,), target), 0, schedule or Schedule(), barred)


@dataclass
class Stub:
    """A request whose terms do not depend on the mask; remembers where it was looked at."""

    weight: torch.Tensor
    looks: Look
    graph: WeightGraph = GRAPH
    places: torch.Tensor = field(default_factory=lambda: torch.tensor([0, 2, 3, 5, 7, 8, 11, 12, 16]))
    seen: list[torch.Tensor] = field(default_factory=list)

    def look(self, degrees: torch.Tensor) -> Look:
        self.seen.append(degrees)
        return self.looks


@pytest.fixture
def stub() -> Stub:
    generator = torch.Generator().manual_seed(1)
    weight, *falls = (torch.randn(GRAPH.shape, generator=generator) for _ in range(4))
    return Stub(weight, Look(*falls, excess=0.05))


def spoken(guide: Guide, seed: int = 2) -> Guide:
    """With a readout that is not 0."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(guide.gcn.readout.weight)
    return guide


# --- what is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.1, 0.99])
def test_a_look_is_the_slope_of_the_terms(target):
    """Against the gradient by how far each weight is switched off, of features while they tell more than they may."""
    asked = descent(target=target)
    degrees = torch.rand(asked.weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    free = degrees[asked.places].requires_grad_()
    degrees[5] = 0  # where none may be switched off, none is
    asked.generator.manual_seed(7)
    found = asked.terms(free)
    told = found.tell.detach()
    pushed = asked.how.by.features * found.tell[told > target + 0.02].sum()  # in full from there on
    assert (told > target + 0.02).all() or not (told > target).any()
    asked.generator.manual_seed(7)
    look = asked.look(degrees)
    assert look.excess == pytest.approx(float(told.mean()) - target)
    for fall, of in ((look.kept, found.kept), (look.forget, found.forget), (look.features, pushed)):
        slope = torch.autograd.grad(of, free, retain_graph=True, materialize_grads=True)[0]
        assert torch.allclose(fall[asked.places], -slope, rtol=1e-4, atol=1e-7)
        assert bool(fall.any()) == bool(slope.any())


def test_columns_are_what_they_are_called(stub):
    guide, read = Guide.fresh(), []
    guide.passes = 1
    guide.gcn.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0]))
    next(guide.thetas(stub, 3))
    columns = dict(zip(COLUMNS, read[0].unbind(-1), strict=True))
    first, last = slice(12), slice(12, 18)
    assert torch.allclose(columns["W"][last], stub.weight[last] / stub.weight[last].std())
    together = stub.looks.kept + stub.looks.forget + stub.looks.features
    for name, of in (("kept", stub.looks.kept), ("features", stub.looks.features), ("together", together)):
        needed = [math.copysign(math.log1p(abs(v) / float(of.abs().mean())), v) for v in of.tolist()]
        assert columns[name].tolist() == pytest.approx(needed, rel=1e-5)
    assert torch.equal(columns["theta"], started(together))
    assert not columns["degree"].any()
    assert columns["excess"].tolist() == pytest.approx([0.5] * 18)
    for name in ("depth", "last"):
        assert not columns[name][first].any()
        assert (columns[name][last] == 1).all()


# --- passes -----------------------------------------------------------------------------------------------


def test_an_untrained_guide_says_the_first_order_start(stub):
    together = stub.looks.kept + stub.looks.forget + stub.looks.features
    assert torch.equal(Guide.fresh().theta(stub, 3), started(together))


def test_a_pass_looks_at_the_mask_of_the_one_before(stub):
    guide = spoken(Guide.fresh())
    thetas = list(guide.thetas(stub, 3))
    assert len(stub.seen) == len(thetas) == guide.passes
    assert not stub.seen[0].any()
    barred = torch.ones(18, dtype=torch.bool).index_fill(0, stub.places, False)
    for seen, theta in zip(stub.seen[1:], thetas, strict=False):
        assert float(seen.sum()) == pytest.approx(3, abs=1e-5)
        assert not seen[barred].any()
        assert set(seen.topk(3).indices.tolist()) == set(stub.places[theta[stub.places].topk(3).indices].tolist())
    assert all(not torch.equal(a, b) for a, b in pairwise(thetas))


def test_a_gradient_reaches_the_own_correction_of_a_pass_alone(stub):
    """The third pass adds to the second theta as data: the gradient is that of the network's last output."""
    guide, outputs = spoken(Guide.fresh()), []
    guide.gcn.register_forward_hook(lambda *given: outputs.append(given[-1]))
    theta = list(guide.thetas(stub, 3))[2]
    found = torch.autograd.grad(theta.square().sum(), guide.gcn.readout.weight, retain_graph=True)[0]
    own = torch.autograd.grad((2 * theta.detach() * outputs[2][0]).sum(), guide.gcn.readout.weight)[0]
    assert torch.allclose(found, own, rtol=1e-4)


@pytest.mark.parametrize("joined", [(), (True,)])
def test_messages_cross_layers_only_if_they_are_joined(stub, joined):
    guide, met = Guide.fresh(joined), []
    guide.gcn.register_forward_pre_hook(lambda _, inputs: met.append(inputs[1]))
    list(guide.thetas(stub, 3))
    assert all(graph == WeightGraph(GRAPH.shapes, joined or (False,)) for graph in met)


def test_scores_that_are_not_finite_are_refused(stub):
    guide = Guide.fresh()
    guide.gcn.readout.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        guide.theta(stub, 3)


# --- descent ----------------------------------------------------------------------------------------------


def test_descent_starts_where_the_guide_says():
    """Without a step the mask is the network's; the barred weight stays out though its score is the largest."""

    class Says(Guide):
        def theta(self, asked: Asked, kappa: int) -> torch.Tensor:
            scores = torch.randn(asked.weight.shape, generator=torch.Generator().manual_seed(4))
            scores[5] = 100.0
            return scores

    off = descent(guided(Says(Guide.fresh().gcn), steps=0)).run(KAPPA)
    scores = torch.randn(off.shape, generator=torch.Generator().manual_seed(4))
    scores[5] = -100.0
    assert set(off.nonzero().flatten().tolist()) == set(scores.topk(KAPPA).indices.tolist())


def test_a_standardised_score_keeps_distances():
    assert standardised(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1, 0, 1])


# --- learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [True, False])
def test_a_taught_guide_has_a_smaller_loss_than_the_start_that_it_began_with(messages, tmp_path):
    """The first-order start takes weights that retained classes need; the network learns to leave these."""
    guide = Guide.fresh(messages=messages)
    guide.gcn.double()

    def loss() -> float:
        lesson, found = descent(target=1.0), 0.0
        theta = guide.theta(lesson, KAPPA).flatten()[lesson.places]
        for _ in range(8):
            one = lesson.terms(sinkhorn_topk(theta, KAPPA, 0.3))
            found += float(one.kept + one.forget)
        return found / 8

    before = loss()
    config = GCNConfig(steps=20, lr=1e-2, requests_per_step=1, temperature_start=0.3, temperature_end=0.3)
    lessons = [descent(target=1.0)]
    GCNTrainer(Teaching(guide, lessons, KAPPA, config, 0), Tracker(Trackers.none, "test", {})).train(tmp_path)
    assert loss() < 0.2 * before
    assert all(bool(matrix.any()) == messages for matrix in guide.gcn.neighbours)


def test_the_loss_of_a_lesson_is_that_of_the_soft_mask():
    guide, lesson = Guide.fresh(), descent(target=0.2)
    guide.gcn.double()
    guide.passes = 1
    config = GCNConfig(requests_per_step=2)
    parts = Teaching(guide, [lesson], KAPPA, config, 0).parts(0.2)
    part = next(parts)
    weighed = lesson.how.by.features * part.terms["excess"]
    needed = part.terms["kept"] + part.terms["forget"] + weighed
    assert float(part.terms["loss"].detach()) == pytest.approx(float(needed.detach()))
    assert part.weigh(6.0) == pytest.approx(3)
    assert len(list(parts)) == 1


# --- the file ---------------------------------------------------------------------------------------------


def test_a_guide_comes_back_from_its_file(stub, tmp_path):
    guide = spoken(Guide.fresh((True,)))
    guide.passes = 3
    guide.save(tmp_path / "guide.safetensors", {"note": "x"})
    again, facts = Guide.load(tmp_path / "guide.safetensors")
    assert torch.equal(again.theta(stub, 3), guide.theta(stub, 3))
    assert (again.passes, again.joined, facts["note"]) == (3, (True,), "x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "unlearning"},
        {"columns": ["W"]},
        {"passes": 0},
        {"passes": "3"},
        {"passes": 10**9},
        {"joined": "yes"},
    ],
)
def test_a_file_of_another_kind_is_refused(wrong, tmp_path, monkeypatch):
    path, guide = tmp_path / "guide.safetensors", Guide.fresh()
    saved = MaskingGCN.save
    monkeypatch.setattr(MaskingGCN, "save", lambda gcn, where, facts: saved(gcn, where, facts | wrong))
    guide.save(path, {})
    with pytest.raises(UserError, match=path.name):
        Guide.load(path)


def test_a_network_that_unlearns_in_one_layer_is_no_guide():
    with pytest.raises(UserError, match="another objective"):
        Guide.load(Path(PROJECT_ROOT, "pretrained", "gcn_mlp.safetensors"))


def test_the_guide_that_ships_says_what_it_learned_on():
    guide, facts = Guide.load(GUIDE)
    assert facts["shapes"] == [[128, 784], [64, 128], [10, 64]]
    assert facts["trained_on"] == {"seeds": list(range(200, 212)), "classes": [0, 1, 3, 4, 6, 7, 9]}
    assert (guide.passes, guide.joined) == (4, ())
    assert not any(value.requires_grad for value in guide.gcn.parameters())
