"""The equalities that the whole project rests on, each against a naive form of the same thing."""

import copy

import pytest
import torch
from torch import nn

from core.config import (
    Activations,
    Aggregations,
    GCNConfig,
    GraphConfig,
    PipelineConfig,
    SupportedDatasets,
    SupportedVisionModels,
    TopKSamplers,
    Trackers,
)
from core.observe import Tracker
from data import GraphDataset, GraphGenerator, Vectors
from eval import Eval
from graphs import subsets
from graphs.edge_list import edge_index
from graphs.layout import layer_graph
from graphs.subsets import SAMPLERS, exact_budget, hard_topk
from measure.metrics import Outputs, chosen_metrics
from model import HookedModel, MaskingGCN, vision_model_loader
from tests.helpers.common import APART, MIXED, NET_5432, evidence, held
from trainer import GCNTrainer
from unlearn.masks import Mask, masked, random_mask
from unlearn.objectives import Elbo, categorical_kl, log_prior
from unlearn.registry import Context
from utils_data import Images, UnlearningDataset


def tiny_data(channels: int, size: int, count: int = 60) -> UnlearningDataset:
    generator = torch.Generator().manual_seed(5)

    def part() -> Images:
        pixels = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % 10
        return Images(pixels, labels, torch.full((channels, 1, 1), 127.0), torch.full((channels, 1, 1), 70.0))

    return UnlearningDataset(SupportedDatasets.MNIST, {s: part() for s in ("train", "val", "test")}, 7, 3, 0)


CASES = [(SupportedVisionModels.HookedMLPClassifier, 1, 8), (SupportedVisionModels.HookedResnet, 3, 32)]


@pytest.fixture(params=CASES, ids=["mlp", "resnet"])
def setting(request):
    architecture, channels, size = request.param
    torch.manual_seed(1)
    model = vision_model_loader(architecture, 10, channels, size)
    model.train()
    with torch.no_grad():  # BatchNorm statistics that are not those of a fresh model
        model(torch.randn(16, channels, size, size) * 2 + 1)
    return model.eval(), tiny_data(channels, size)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", list(Activations))
@pytest.mark.parametrize("aggregation", list(Aggregations))
@pytest.mark.parametrize("graph", [*map(layer_graph, (2, 5, 1, 8), (3, 4, 6, 16)), NET_5432, APART, MIXED])
def test_closed_form_is_the_edge_list(aggregation, activation, residual, graph):
    torch.manual_seed(0)
    gcn = MaskingGCN(4, 3, 8, aggregation, activation, residual).double()
    x = torch.randn(2, *graph.shape, 4, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, *graph.shape, dtype=torch.float64)
    edges = edge_index(graph)
    slow = torch.stack([gcn.forward_edges(one.reshape(-1, 4), edges).view(graph.shape) for one in x])
    fast = gcn(x) if len(graph.shapes) == 1 else gcn(x, graph)
    inputs = [x, *gcn.parameters()]
    slow_gradients = torch.autograd.grad((slow * probe).sum(), inputs)
    fast_gradients = torch.autograd.grad((fast * probe).sum(), inputs)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for ours, oracle in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (4, 5), (1, 4)])
def test_edges_are_shared_rows_and_columns(shape):
    m, n = shape
    naive = {
        (a * n + b, c * n + d)
        for a in range(m)
        for b in range(n)
        for c in range(m)
        for d in range(n)
        if (a == c) != (b == d)
    }
    edges = edge_index(layer_graph(m, n)).T.tolist()
    assert len(edges) == layer_graph(m, n).num_edges == m * n * (m + n - 2) == len(naive)
    assert {tuple(edge) for edge in edges} == naive


def naive_features(model: HookedModel, image, label) -> torch.Tensor:
    """[m, n, 4] of one sample: autograd on the weight itself, dense columns standardised over the nodes."""
    target = model.target(-2)
    seen = {}
    handle = target.register_forward_hook(lambda _, args, out: seen.update(h=args[0][0], z=out[0]))
    loss = nn.functional.cross_entropy(model(image[None]), label[None])
    handle.remove()
    (g,) = torch.autograd.grad(loss, target.weight)
    m, n = g.shape
    columns = [seen["h"].expand(m, n), seen["z"][:, None].expand(m, n), target.weight, g]
    return torch.stack([(c - c.mean()) / (c.std(correction=0) + 1e-8) for c in columns], -1).detach()


def test_rank_one_features_are_those_of_per_sample_autograd(setting, tmp_path):
    model, data = setting
    generator = GraphGenerator(model, data, -2, GraphConfig(num_samples=20, min_per_class=2, batch_size=7))
    generator.generate(tmp_path)
    graphs = GraphDataset(tmp_path)
    chosen = generator.choose_samples()
    images, labels = data.splits["train"].batch(torch.from_numpy(chosen))
    oracle = torch.stack([naive_features(model, images[i], labels[i]) for i in range(len(labels))])
    torch.testing.assert_close(graphs.features(range(len(graphs))), oracle, rtol=1e-3, atol=2e-4)
    for label in range(10):
        torch.testing.assert_close(graphs.class_features(label), oracle[labels == label].mean(0), rtol=1e-3, atol=2e-4)


def test_evidence_takes_the_images_that_are_asked_for(setting):
    model, data = setting
    context = Context(model, data, PipelineConfig(forget_class=3), torch.device("cpu"), lambda top_k: torch.zeros(1))
    e = Eval(context).reference("test")
    images, labels = e.images("val", False)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert set(e.images("val", True)[1].tolist()) == {3}
    assert torch.equal(labels, e.outputs("val", False).labels)  # in the order of the outputs
    for choose in (torch.tensor([5, 2]), lambda asked: torch.tensor([5, 2]) if torch.equal(asked, labels) else None):
        some, true = e.images("val", False, choose)
        assert torch.equal(some, images[[5, 2]])
        assert torch.equal(true, labels[[5, 2]])


def test_prefix_cache_is_the_full_forward_pass(setting):
    model, data = setting
    context = Context(model, data, PipelineConfig(forget_class=3), torch.device("cpu"), lambda top_k: torch.zeros(1))
    evaluation = Eval(context)
    m, n = model.target(-2).weight.shape
    with masked(model.target(-2).weight, random_mask(layer_graph(m, n), m * n // 3, torch.Generator().manual_seed(0))):
        assert evaluation.prefix_unchanged(model)
        cached = evaluation.outputs(model, "test", True, "")
        full = evaluation.inference(model, evaluation.context.images("test", True), True, "")
        whole = nn.Module.__call__(
            model, data.splits["test"].only(data.splits["test"].labels == 3).batch(slice(None))[0]
        )
    torch.testing.assert_close(held(cached), held(full), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(held(cached), whole.detach(), rtol=1e-4, atol=1e-5)
    changed = copy.deepcopy(model)
    early = next(p for name, p in changed.named_parameters() if evaluation.in_prefix(name))
    with torch.no_grad():
        early.mul_(1.5)
    assert not evaluation.prefix_unchanged(changed)
    expected = changed(data.splits["test"].only(data.splits["test"].labels == 3).batch(slice(None))[0])
    got = evaluation.outputs(changed, "test", True, "")
    torch.testing.assert_close(held(got), expected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(held(got), held(cached))


@pytest.mark.parametrize("name", list(TopKSamplers))
@pytest.mark.parametrize(("size", "k"), [(10, 3), (64, 1), (64, 63), (500, 250)])
def test_samplers_keep_k_and_pass_gradients(name, size, k):
    theta = torch.randn(4, size, generator=torch.Generator().manual_seed(2)).requires_grad_()
    sampler = SAMPLERS[name]
    degrees = sampler(theta, k, 0.3, torch.Generator().manual_seed(3))
    again = sampler(theta, k, 0.3, torch.Generator().manual_seed(3))
    assert torch.equal(degrees, again)
    if name is TopKSamplers.sinkhorn:
        torch.testing.assert_close(degrees.sum(-1), torch.full((4,), float(k)), rtol=1e-5, atol=1e-4)
        for row, scores in zip(degrees, theta, strict=True):
            assert torch.equal(row >= row.sort().values[-k], hard_topk(scores, k))
    else:
        assert ((degrees >= 0.5).sum(-1) == k).all()
    (gradient,) = torch.autograd.grad((degrees * torch.randn_like(degrees)).sum(), theta)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


@pytest.mark.parametrize(("size", "k"), [(6, 2), (15, 14), (15, 1), (40, 20)])
def test_exact_budget_and_its_implicit_gradient(size, k):
    """gradcheck in double precision, with the temperature (constant for the gradient) held still."""

    def budget(values: torch.Tensor) -> torch.Tensor:
        return exact_budget(values, k, torch.full_like(values[..., :1], 0.4), tolerance=1e-15)

    theta = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()
    assert torch.autograd.gradcheck(budget, theta, eps=1e-6, atol=1e-6)
    whole = budget(theta)
    torch.testing.assert_close(whole.sum(-1), torch.full((3,), float(k), dtype=torch.float64), rtol=1e-12, atol=0)
    for row, alone in zip(whole, theta, strict=True):
        torch.testing.assert_close(row, budget(alone), rtol=1e-12, atol=1e-15)
    (gradient,) = torch.autograd.grad((whole * torch.rand_like(whole)).sum(), theta)
    assert gradient.sum(-1).abs().max() < 1e-12  # pushing every logit up gains nothing


@pytest.mark.parametrize("k", [1, 200, 4095])
def test_exact_budget_in_bfloat16(k):
    theta = torch.randn(2, 4096, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).requires_grad_()
    degrees = SAMPLERS[TopKSamplers.sinkhorn](theta, k, 0.25)
    assert degrees.dtype == torch.bfloat16
    assert degrees.float().sum(-1).tolist() == pytest.approx([k, k], rel=4e-3)  # rounding of the degrees alone
    (gradient,) = torch.autograd.grad(degrees.float().square().sum(), theta)
    exact = theta.detach().float().requires_grad_()
    oracle = SAMPLERS[TopKSamplers.sinkhorn](exact, k, 0.25)
    (wanted,) = torch.autograd.grad(oracle.square().sum(), exact)
    assert float((gradient.float() - wanted).norm()) < 0.02 * float(wanted.norm())


def trainer_of(setting, tmp_path, sampler=TopKSamplers.sinkhorn, **settings) -> GCNTrainer:
    model, data = setting
    GraphGenerator(model, data, -2, GraphConfig(num_samples=20, min_per_class=2)).generate(tmp_path)
    torch.manual_seed(0)
    config = GCNConfig(hidden_dim=4, sampler=sampler, batch_size=6, **settings)
    gcn = MaskingGCN(4, 2, 4)
    tracker = Tracker(Trackers.none, "test", {})
    objective = Elbo(gcn, model, GraphDataset(tmp_path), -2, 2000, config, 0, torch.device("cpu"))
    return GCNTrainer(objective, tracker)


@pytest.mark.parametrize("sampler", list(TopKSamplers))
def test_first_term_of_the_elbo_moves_theta(sampler, monkeypatch):
    """Autograd of the expected loss equals a finite difference; the temperature is constant for the gradient."""
    monkeypatch.setattr(subsets, "_scale", lambda theta, temperature: torch.full_like(theta[..., :1], temperature))
    torch.manual_seed(4)
    model = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8).eval().double()
    h, labels = torch.rand(5, 128, dtype=torch.float64), torch.arange(5)
    weight = model.target(-2).weight.detach()
    theta = torch.randn(5, 64, 128, dtype=torch.float64, requires_grad=True)

    def first_term(values):
        draw = torch.Generator().manual_seed(1)
        degrees = SAMPLERS[sampler](values.flatten(1), 2000, 0.5, draw).view_as(values)
        return nn.functional.cross_entropy(model.head(h, -2, [weight * degrees]), labels)

    (gradient,) = torch.autograd.grad(first_term(theta), theta)
    direction, step = torch.randn_like(theta), 1e-6
    with torch.no_grad():
        plus, minus = (first_term(theta + sign * step * direction) for sign in (1, -1))
    expected = float((plus - minus) / (2 * step))
    assert abs(expected) > 1e-6
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3)


def test_training_lowers_the_loss_and_repeats_itself(setting, tmp_path):
    first = trainer_of(setting, tmp_path / "a", steps=12, beta=0.1)
    first.train(tmp_path)
    terms = first.tracker.history
    assert terms[-1]["loss"] < terms[0]["loss"]
    second = trainer_of(setting, tmp_path / "b", steps=12, beta=0.1)
    second.train(tmp_path)
    for ours, again in zip(first.gcn.parameters(), second.gcn.parameters(), strict=True):
        assert torch.equal(ours, again)


def test_gradients_in_parts_are_those_of_the_whole_batch(setting, tmp_path):
    objective, whole = (trainer_of(setting, tmp_path / name).objective for name in "ab")
    parts = list(objective.parts(0.2))
    assert len(parts) > 1
    for part in parts:
        part.weigh(part.terms["loss"]).backward()
    assert isinstance(whole, Elbo)
    whole.losses(next(whole.batches), 0.2)["loss"].backward()
    gathered = [parameter.grad for parameter in objective.gcn.parameters()]
    for ours, parameter in zip(gathered, whole.gcn.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_kl_by_hand():
    theta = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    log_p = torch.log(torch.tensor([[0.25, 0.25, 0.5]]))
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.25 * torch.log(torch.tensor(0.5))
    torch.testing.assert_close(categorical_kl(theta, log_p), expected[None])
    assert float(categorical_kl(log_p + 7, log_p)) == pytest.approx(0, abs=1e-6)


def test_prior_of_a_sample_without_gradient_is_uniform():
    from core.config import GCNPriorDistribution

    vectors = Vectors([torch.zeros(1, 3)], [torch.zeros(1, 2)], [torch.zeros(1, 2)])
    for kind in GCNPriorDistribution:
        p = log_prior(kind, layer_graph(2, 3), torch.randn(2, 3), vectors).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-6)
        if "GRADIENT" in kind.value or kind is GCNPriorDistribution.SALIENCY:
            torch.testing.assert_close(p, torch.full((1, 6), 1 / 6))


MISSION = ("forget_loss", "retain_loss", "forget_probability", "forget_score", "retain_score")


def test_metrics_by_hand():
    """Two forget images of class 0 (one right), two retained of class 1 (both right); logits are log-probabilities."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    forget = Outputs(p[:2].log(), torch.tensor([0, 0]))
    retain = Outputs(p[2:].log(), torch.tensor([1, 1]))
    judged = evidence(test=(forget, retain))
    values = {name: judged.value(metric.compute) for name, metric in chosen_metrics(MISSION).items()}
    assert values == pytest.approx(
        {
            "forget_loss": (0.6931472 + 1.3862944) / 2,
            "retain_loss": (0.6931472 + 0.2231436) / 2,
            "forget_probability": 0.375,
            "forget_score": 50.0,
            "retain_score": 100.0,
        },
        rel=1e-5,
    )


def test_a_mask_acts_and_lifts_to_the_bit():
    weight = nn.Parameter(torch.tensor([[-1.5, 0.0], [-0.0, 3.0]]))
    before = weight.detach().numpy().tobytes()

    def fails_inside() -> None:
        with masked(weight, Mask(torch.tensor([[False, True], [True, False]]), layer_graph(2, 2))):
            assert weight.detach().tolist() == [[0.0, 0.0], [-0.0, 0.0]]
            assert not torch.signbit(weight.detach()[0, 0])
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()
    assert weight.detach().numpy().tobytes() == before
