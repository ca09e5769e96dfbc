"""Closed-form edits and the Fisher information behind some: each against a naive form or figures worked out by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.config import DataConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels
from model import HookedModel, vision_model_loader
from rivals import closed_form as edits
from rivals.closed_form import (
    Spectrum,
    batch_fisher,
    damp_edit,
    dampened,
    fisher_of,
    fisher_ratio,
    layer_inputs,
    residual_directions,
    sample_fisher,
    svd_edit,
    training_images,
)
from rivals.compared import METHODS, mask_of
from unlearn.registry import Context, Point, Shared
from utils_data import Images, get_unlearning_dataset

CPU = torch.device("cpu")
POINT = Point(top_k=1, kappa=200, seed=0)
WHOLE_MODEL_EDITS = ("head_row_zero", "ssd", "ssd_per_sample", "svd_projection", "damp")


def context_of(architecture: SupportedVisionModels, **given) -> Context:
    torch.manual_seed(0)
    model = vision_model_loader(architecture, 10, 1, 8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that training mode would not use, and would change
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    few = DataConfig(max_train_samples=200 if architecture is SupportedVisionModels.HookedResnet else None)
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, 32, 4, data=few)
    return Context(model, data, PipelineConfig(forget_class=(4,), **given), CPU, lambda top_k: torch.zeros(0))


@pytest.fixture(scope="module")
def mlp() -> Context:
    return context_of(SupportedVisionModels.HookedMLPClassifier)


@pytest.fixture(scope="module")
def resnet() -> Context:
    return context_of(SupportedVisionModels.HookedResnet)


def naive_fisher(model: HookedModel, images: Images, batch_size: int) -> dict[str, Tensor]:
    """One backward pass per batch."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    batches = range(0, len(images), batch_size)
    for begin in batches:
        pixels, labels = images.batch(slice(begin, begin + batch_size))
        model.zero_grad()
        functional.cross_entropy(model(pixels), labels).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.double() ** 2 / len(batches)
    model.zero_grad()
    return total


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


# --- Fisher information -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_fisher_is_the_mean_square_of_autograd(kind, batch_size, request):
    context = request.getfixturevalue(kind)
    model, images = context.model, context.data.splits["train"].only(torch.arange(11))  # the last batch is short
    before = bits(model)
    quick = sample_fisher(model, images, CPU) if batch_size == 1 else batch_fisher(model, images, CPU, batch_size)
    assert bits(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    wanted = naive_fisher(model, images, batch_size)
    assert list(quick) == list(wanted)
    for name, value in wanted.items():
        assert float(value.sum()) > 0
        assert float((quick[name] - value).abs().max()) <= 1e-4 * float(value.max()), name


def test_fisher_of_batches_shrinks_with_the_batch_and_that_of_samples_does_not_know_it(mlp):
    images = mlp.data.splits["train"].only(torch.arange(64))
    total = {size: sum(float(v.sum()) for v in batch_fisher(mlp.model, images, CPU, size).values()) for size in (1, 64)}
    samples = sum(float(value.sum()) for value in sample_fisher(mlp.model, images, CPU).values())
    assert total[1] == pytest.approx(samples, rel=1e-5)
    assert total[64] < samples / 2


def test_fisher_is_computed_once_and_charged_to_later_settings(mlp):
    fresh = replace(mlp, shared=Shared())
    first = fresh.shared.timed(lambda: fisher_of(fresh, True, True))
    again = fresh.shared.timed(lambda: fisher_of(fresh, True, True))
    assert again.value is first.value
    assert first.standing == again.standing == 0
    kept = fresh.shared.once(("fisher", (4,), True, True), dict)
    assert kept.value is first.value
    assert kept.seconds < first.seconds < kept.seconds + 0.02  # on the clock, not charged on top of it
    assert kept.seconds < again.seconds < kept.seconds + 0.02  # charged, not on the clock
    assert fisher_of(fresh, None, True) is not first.value
    other = replace(fresh, config=PipelineConfig(forget_class=(5,)))
    assert fisher_of(other, True, True) is not first.value
    whole = fresh.shared.timed(lambda: fisher_of(fresh, None, True))
    assert fisher_of(other, None, True) is whole.value  # of all classes: it serves any request
    assert 0 < whole.standing <= whole.seconds < whole.standing + 0.02


def test_nested_shared_work_is_charged_whole():
    shared = Shared()
    inner = shared.once("inner", lambda: time.sleep(0.05)).seconds
    assert inner >= 0.05
    outer = shared.once("outer", lambda: shared.once("inner", lambda: 0)).seconds
    assert inner <= outer < inner + 0.02  # found, not computed again, and charged
    both = shared.timed(lambda: (shared.once("outer", lambda: 0), shared.once("inner", lambda: 0))).seconds
    assert outer <= both < outer + 0.02  # who starts from nothing makes it once
    assert shared.timed(lambda: shared.once("inner", lambda: 0, charged=False)).seconds < 0.02


def test_training_images_are_of_one_side_and_each_once(mlp):
    train = mlp.data.splits["train"]
    for side, wanted in ((True, train.labels == 4), (False, train.labels != 4), (None, train.labels >= 0)):
        drawn = training_images(mlp, side, 10**6)
        assert sorted(map(bytes, drawn.pixels.numpy())) == sorted(map(bytes, train.only(wanted).pixels.numpy()))
        assert torch.equal(training_images(mlp, side, 30).pixels, drawn.pixels[:30])


# --- selective synaptic dampening -------------------------------------------------------------------------


def test_dampening_by_hand():
    weights = {"a": torch.tensor([2.0, -3.0, 5.0]), "b": torch.tensor([[4.0]])}
    forget = {"a": torch.tensor([40.0, 9.0, 0.0]).double(), "b": torch.tensor([[20.0]]).double()}
    whole = {"a": torch.tensor([2.0, 1.0, 0.0]).double(), "b": torch.tensor([[1.0]]).double()}
    new, chosen = dampened(weights, forget, whole, alpha=10, weight=1)
    assert new["a"].tolist() == pytest.approx([2.0 * 2 / 40, -3.0, 5.0])  # 40 > 10 x 2; 9 < 10; 0 is not above 0
    assert new["b"].tolist() == [[pytest.approx(4 / 20)]]
    assert chosen["a"].tolist() == [True, False, False]
    new, chosen = dampened(weights, forget, whole, alpha=5, weight=30)
    assert new["a"].tolist() == [2.0, -3.0, 5.0]  # lambda I_D / I_f is 1.5 and 3.3: never a growth
    assert chosen["a"].tolist() == [True, True, False]
    boundary = {"b": 10 * whole["b"]}
    assert not dampened({"b": weights["b"]}, boundary, whole, alpha=10, weight=1)[1]["b"].any()


@pytest.mark.parametrize("name", ["ssd", "ssd_per_sample"])
def test_ssd_selects_and_says_how_many(mlp, name, capsys):
    estimate = sample_fisher if name.endswith("sample") else batch_fisher
    forget, whole = (estimate(mlp.model, training_images(mlp, side, 10**6), CPU) for side in (True, None))
    chosen = {key: forget[key] > 2 * whole[key] for key in forget}
    count = sum(int(value.sum()) for value in chosen.values())
    assert 0 < count < sum(value.numel() for value in chosen.values())
    with METHODS[name].enter(mlp, POINT, alpha=2.0, weight=0.5) as edit:
        new, old = dict(edit.model.named_parameters()), dict(mlp.model.named_parameters())
        assert edit.allowed is not None
        for key, value in chosen.items():
            assert torch.equal(edit.allowed[key], value)
            factor = torch.where(value, 0.5 * whole[key] / forget[key], 1.0)
            assert torch.allclose(new[key], (old[key] * factor).float(), rtol=1e-5, atol=0)
    assert f"{name}: alpha 2, lambda 0.5 select {count:,} of 17,024 weights" in capsys.readouterr().err


# --- projections ------------------------------------------------------------------------------------------


def test_scaled_projection_by_hand():
    h = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # energies 4, 1, 0: shares 0.8, 0.2, 0
    wanted = torch.tensor([4 * 0.8 / (3 * 0.8 + 1), 4 * 0.2 / (3 * 0.2 + 1), 0.0]).double()
    assert torch.allclose(Spectrum.of(h).projection(4), wanted.diag(), atol=1e-12)
    assert torch.allclose(Spectrum.of(h).projection(1), torch.tensor([0.8, 0.2, 0.0]).double().diag(), atol=1e-12)


def test_svd_maps_the_forget_space_to_0_and_keeps_a_disjoint_retain_space():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    forget, retain = torch.randn(30, 2, generator=generator).double(), torch.randn(30, 3, generator=generator).double()
    forget, retain = forget @ basis[:, :2].T, retain @ basis[:, 2:5].T
    edit = svd_edit(Spectrum.of(forget), Spectrum.of(retain), 1e8, 1e8)
    assert torch.allclose(forget @ edit.T, torch.zeros_like(forget), atol=1e-6)
    assert torch.allclose(retain @ edit.T, retain, atol=1e-6)
    assert torch.allclose(basis[:, 5] @ edit.T, basis[:, 5], atol=1e-6)  # what neither side uses stays
    shared = svd_edit(Spectrum.of(forget), Spectrum.of(forget), 1e8, 1e8)
    assert torch.allclose(shared, torch.eye(6).double(), atol=1e-6)  # what both use stays


def test_damp_removes_the_direction_and_leaves_the_rest():
    d = torch.tensor([[3.0], [4.0], [0.0]]).double() / 5
    weight = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 2.0]]).double()
    new = weight @ damp_edit(d, 0.75)
    assert torch.allclose(new @ d, 0.25 * weight @ d)
    across = torch.tensor([[4.0, 0.0], [-3.0, 0.0], [0.0, 1.0]]).double()
    assert torch.allclose(new @ across, weight @ across)
    assert (weight @ damp_edit(d, 1.0) @ d).abs().max() < 1e-12


def test_residual_directions_by_hand():
    prototypes = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [5.0, 2, 0, 3], [7.0, 0, 0, 0]]).double()
    d = residual_directions(prototypes, torch.tensor([False, False, True, False]))
    assert torch.allclose(d.abs(), torch.tensor([[0.0], [0], [0], [1]]).double(), atol=1e-12)
    two = residual_directions(prototypes, torch.tensor([True, False, True, True]))
    assert torch.allclose(two.T @ two, torch.eye(two.shape[1]).double(), atol=1e-12)
    assert two.shape == (4, 2)  # of three classes: two share what they have beyond (1, 1, 0, 0)
    assert (two.T @ prototypes[1]).abs().max() < 1e-12
    inside = residual_directions(prototypes, torch.tensor([False, False, False, True]))
    assert inside.shape == (4, 0)  # nothing of its own: nothing is removed


@pytest.mark.parametrize("kind", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
def test_damp_on_a_classifier(kind, request):
    context = request.getfixturevalue(kind)
    train, layers = context.data.splits["train"], len(context.model.linears)
    inputs = [h.double() for h in layer_inputs(context.model, train, CPU)]
    with METHODS["damp"].enter(context, POINT, strength=1.0, layers=1) as edit:
        new, old = edit.model.target(-1).weight.double(), context.model.target(-1).weight.double()
        assert set(edit.allowed) == {f"linears.{layers - 1}.weight"}
        means = torch.stack([inputs[-1][train.labels == label].mean(0) for label in range(10)])
        others = means[[label for label in range(10) if label != 4]]
        assert torch.allclose(others @ new.T, others @ old.T, atol=1e-6)
        inside = torch.linalg.lstsq(others.T, means[4]).solution @ others
        assert torch.allclose(new @ means[4], old @ inside, atol=1e-6)  # what is left of the prototype


def test_layer_inputs_are_what_the_layers_read(mlp):
    images = mlp.data.splits["train"].only(torch.arange(20))
    h = layer_inputs(mlp.model, images, CPU, batch_size=7)
    x = images.batch(slice(None))[0].flatten(1)
    for got, layer in zip(h, mlp.model.linears, strict=True):
        assert torch.allclose(got, x, atol=1e-5)
        x = torch.relu(layer(x)).detach()


# --- trivial edits and masks ------------------------------------------------------------------------------


def test_head_row_zero_changes_its_rows_alone(mlp):
    with METHODS["head_row_zero"].enter(mlp, POINT) as edit:
        old, new = mlp.model.state_dict(), edit.model.state_dict()
        row = new["linears.2.weight"][4]
        assert row.view(torch.int32).tolist() == [0] * 64  # +0, bit by bit
        assert edit.allowed is not None
        assert list(edit.allowed) == ["linears.2.weight"]
        assert edit.allowed["linears.2.weight"].nonzero().tolist() == [[4, j] for j in range(64)]
        kept = [label for label in range(10) if label != 4]
        assert torch.equal(new["linears.2.weight"][kept], old["linears.2.weight"][kept])
        assert all(torch.equal(new[name], old[name]) for name in old if name != "linears.2.weight")


@pytest.mark.parametrize("layers", [(-2,), (-2, -1)])
def test_masks_against_argsort(layers):
    context = context_of(SupportedVisionModels.HookedMLPClassifier, mask_layer=layers)
    names = [f"linears.{layer + 3}.weight" for layer in layers]
    state = context.model.state_dict()
    images = (training_images(context, side, 10**6) for side in (True, False))
    forget, retain = (sample_fisher(context.model, part, CPU) for part in images)
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # a weight that only class 4 uses comes first, an idle one last
        ratios = [np.nan_to_num(forget[name].numpy() / retain[name].numpy(), nan=0, posinf=np.inf) for name in names]
    scores = {"magnitude": [state[name].abs().numpy() for name in names], "fisher_mask": ratios}
    for name, parts in scores.items():
        off = ~mask_of(name, context, POINT).keep.flatten().numpy()
        order = np.argsort(-np.concatenate([part.ravel() for part in parts]), kind="stable")
        assert set(off.nonzero()[0]) == set(order[:200]), name


def test_fisher_ratio_where_nothing_is_known():
    ratio = fisher_ratio(torch.tensor([6.0, 0.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, 0.0]))
    assert ratio.tolist() == [3.0, 0.0, float("inf"), 0.0]


@pytest.mark.parametrize("kind", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WHOLE_MODEL_EDITS)
def test_edits_leave_the_classifier_and_keep_to_what_they_declare(kind, name, request, monkeypatch):
    monkeypatch.setattr(edits, "SINGLE_SAMPLES", 8)
    context = request.getfixturevalue(kind)
    before = bits(context.model)
    for settings in METHODS[name].grid if kind == "mlp" else METHODS[name].grid[:1]:
        with METHODS[name].enter(context, POINT, **settings) as edit:
            assert not any(module.training for module in edit.model.modules())
            for key, value in edit.model.state_dict().items():
                free = edit.allowed.get(key, torch.zeros_like(value, dtype=torch.bool))
                assert torch.equal(value[~free], context.model.state_dict()[key][~free]), (settings, key)
        assert bits(context.model) == before
