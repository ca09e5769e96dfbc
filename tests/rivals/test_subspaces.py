"""Rivals by algebra on activations: what is taken out has no energy, what is solved is what least squares gives."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.config import DataConfig, SupportedDatasets, SupportedVisionModels
from hidden.retraining import with_fresh_head
from model import vision_model_loader
from rivals.closed_form import layer_inputs, training_images
from rivals.compared import METHODS
from rivals.subspaces import (
    collapsed,
    direction_mask,
    last_inputs_of,
    leace_edit,
    partners_of,
    projecting,
    without_directions,
)
from tests.helpers.knowing import CLASSES, CPU, Flat, context_of, digits, knowing, read_by_the_last
from unlearn.registry import Context, NotApplicable, Point
from utils_data import get_unlearning_dataset

POINT = Point(top_k=1, kappa=1, seed=0)


@pytest.fixture(scope="module")
def mlp() -> Context:
    return knowing(digits())


@pytest.fixture(scope="module")
def resnet() -> Context:
    torch.manual_seed(0)
    model = vision_model_loader(SupportedVisionModels.HookedResnet, 10, 1, 8).eval()
    few = DataConfig(max_train_samples=100)
    return context_of(model, get_unlearning_dataset(SupportedDatasets.DIGITS, 32, CLASSES, data=few))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- projections ahead of the last layer ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_esc_leaves_no_energy_in_the_first_directions_of_the_forget_set(kind, share, request):
    """The oracle is numpy's SVD of D_f's features."""
    context = request.getfixturevalue(kind)
    images = training_images(context, True, 10**6).batch(slice(None))[0]
    before = read_by_the_last(context.model, images).double().numpy()
    _, sizes, directions = np.linalg.svd(before, full_matrices=False)
    count = round(share * before.shape[1])
    with METHODS["esc"].enter(context, POINT, share=share) as edit:
        after = read_by_the_last(edit.model, images).double().numpy()
    assert np.abs(after @ directions[:count].T).max() < 1e-4 * sizes[0]
    rest = before - before @ directions[:count].T @ directions[:count]
    assert np.abs(after - rest).max() < 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_a_projection_is_seen_wherever_the_last_layer_is_looked_at(kind, request):
    """By the whole forward pass, from any layer on, by a fresh head; and a plain copy of the weights answers alike."""
    context = request.getfixturevalue(kind)
    model, images = context.model, context.data.splits["test"].batch(slice(20))[0]
    n = model.target(-1).in_features
    kept = without_directions(torch.linalg.qr(randn(n, 5)).Q)
    made = projecting(model, kept)
    with torch.inference_mode():
        features = model.prefix(images, -1).double() @ kept
        wanted = features @ model.target(-1).weight.double().T
        plain = vision_model_loader(SupportedVisionModels[type(model).__name__], 10, 1, 8).eval()
        plain.load_state_dict(made.state_dict())
        scale = float(wanted.abs().max())
        for logits in (made(images), made.head(made.prefix(images, -2), -2), made.head(made.embed(images), 0)):
            assert float((logits - wanted).abs().max()) < 1e-5 * scale
        assert float((plain(images) - wanted).abs().max()) < 1e-5 * scale
        given = made.head(made.prefix(images, -2), -2, [made.target(-2).weight])  # as masks of the layer before do
        assert float((given - wanted).abs().max()) < 1e-5 * scale
        assert float((made.prefix(images, -1) - features).abs().max()) < 1e-5 * float(features.abs().max())
        fresh = with_fresh_head(made, 0)
        told = features @ fresh.target(-1).weight.double().T
        assert float((fresh(images) - told).abs().max()) < 1e-5 * float(told.abs().max())
    assert made.state_dict().keys() == model.state_dict().keys()


def test_stages_of_a_projected_classifier_read_the_projection(mlp):
    """What probes at every layer see: unchanged ahead of the projection, projected behind it."""
    from erasing.stages import Stages, deep

    images = mlp.data.splits["test"].batch(slice(20))[0]
    kept = without_directions(torch.linalg.qr(randn(64, 5)).Q)
    with torch.no_grad():
        seen = [
            Stages(model := deep(of, images[:4], 10))(model.prefix(images))
            for of in (mlp.model, projecting(mlp.model, kept))
        ]
    (before, _), (after, _) = seen
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    torch.testing.assert_close(after[-1].double(), before[-1].double() @ kept, rtol=1e-4, atol=1e-4)


def test_a_learned_mask_finds_the_direction_that_tells_the_class():
    """Class 2 lies along the third axis alone, which no other class uses."""
    centres = 4 * torch.eye(3).double()
    labels = torch.arange(300) % 3
    h = centres[labels] + 0.1 * randn(300, 3)
    gone, generator = labels == 2, torch.Generator().manual_seed(0)
    mask = direction_mask(
        torch.eye(3).double(), torch.eye(3).double(), h[gone], (h[~gone], labels[~gone]), (2,), 0.03, generator
    )
    assert float(mask[2]) < 0.1
    assert float(mask[:2].min()) > 0.9
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1


def test_esc_t_removes_whole_directions(mlp):
    images = training_images(mlp, True, 10**6).batch(slice(None))[0]
    before = read_by_the_last(mlp.model, images).double().numpy()
    _, _, directions = np.linalg.svd(before, full_matrices=True)
    with METHODS["esc_t"].enter(mlp, POINT, lr=0.03, threshold=0.5) as edit:
        ratio = np.linalg.norm(read_by_the_last(edit.model, images).double().numpy() @ directions.T, axis=0)
    energies = np.linalg.norm(before @ directions.T, axis=0)
    share = ratio[energies > 1e-3] / energies[energies > 1e-3]
    assert ((share < 1e-3) | (abs(share - 1) < 1e-3)).all()
    assert 0 < (share < 1e-3).sum() < len(share)


def test_one_linear_layer_has_nothing_to_project():
    context = context_of(Flat((64, 10)), digits())
    with pytest.raises(NotApplicable, match="there is one layer"):
        last_inputs_of(context, True)


# --- layer by layer ---------------------------------------------------------------------------------------


def test_leace_leaves_no_covariance_and_moves_inputs_least():
    h = randn(200, 5) @ randn(5, 5, seed=1) + torch.tensor([1.0, 2, 0, 0, -1])
    concepts = functional.one_hot(torch.arange(200) % 4, 4)[:, :2].double()
    edit = leace_edit(h, concepts)
    edited, centred = h @ edit.T, concepts - concepts.mean(0)
    assert (edited.T @ centred).abs().max() < 1e-9 * (h.T @ centred).abs().max()
    # The best linear map under that bond, row by row, by an independent route: its rows lie in the null space of C.
    basis = np.linalg.svd((h.T @ centred).numpy().T)[2][2:]
    wanted = np.linalg.lstsq(h.numpy() @ basis.T, h.numpy(), rcond=None)[0].T @ basis
    assert np.abs(edit.numpy() - wanted).max() < 1e-9
    # So that no linear regression on what is left does better than the mean.
    slope = np.linalg.lstsq(np.c_[edited.numpy(), np.ones(200)], concepts.numpy(), rcond=None)[0]
    assert np.abs(np.c_[edited.numpy(), np.ones(200)] @ slope - concepts.mean(0).numpy()).max() < 1e-9


def test_leace_with_dead_units():
    h = randn(50, 6)
    h[:, 2] = 0
    concepts = (torch.arange(50) % 5 == 0).double()[:, None]
    edit = leace_edit(h, concepts)
    assert edit.isfinite().all()
    assert ((h @ edit.T).T @ (concepts - concepts.mean(0))).abs().max() < 1e-9


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_leace_on_a_classifier_layer_after_layer(mlp, layers):
    """Outputs of each edited layer do not covary with a forgotten class, whatever the edits before it have made."""
    images = mlp.data.splits["train"]
    with METHODS["leace"].enter(mlp, POINT, layers=layers) as edit:
        inputs = layer_inputs(edit.model, images, CPU)
        for place in range(3):
            z = inputs[place].double() @ edit.model.target(place).weight.double().T
            before = inputs[place].double() @ mlp.model.target(place).weight.double().T
            for label in CLASSES:
                concept = (images.labels == label).double()
                found, was = ((v.T @ (concept - concept.mean())).abs().max() for v in (z, before))
                assert (found < 1e-4 * was) == (place >= 3 - layers)


def test_collapse_is_least_squares():
    """Rows: forgotten inputs give their partners' outputs, retained ones, by mu, their own, weights stay, by eps."""
    weight, forget, partners, retain = randn(3, 5), randn(7, 5, seed=1), randn(7, 5, seed=2), randn(9, 5, seed=3)
    mu = 0.3
    before = forget.T @ forget / 7 + mu * retain.T @ retain / 9
    eps = 1e-3 * float(before.diagonal().mean())
    rows = [forget / 7**0.5, (mu / 9) ** 0.5 * retain, eps**0.5 * torch.eye(5).double()]
    asked = [(partners - forget) @ weight.T / 7**0.5, torch.zeros(14, 3).double()]
    wanted = np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(asked).numpy(), rcond=None)[0].T
    found = collapsed(weight, forget, partners, retain, mu)
    assert np.abs((found - weight).numpy() - wanted).max() < 1e-10
    assert torch.equal(collapsed(weight, forget, forget, retain, mu), weight)  # nothing is asked


def test_partners_are_of_the_class_that_comes_next(mlp):
    forget, retain = (training_images(mlp, side, 10**6) for side in (True, False))
    partners = partners_of(mlp, forget, retain)
    with torch.inference_mode():
        logits = mlp.model(forget.batch(slice(None))[0])
    order = logits.argsort(1, descending=True)
    next_class = [next(int(c) for c in row if int(c) not in CLASSES) for row in order]
    assert partners.labels.tolist() == next_class
    held = set(map(bytes, retain.pixels.numpy()))
    assert all(bytes(one) in held for one in partners.pixels.numpy())
    assert len({bytes(one) for one in partners.pixels.numpy()}) > len(forget) / 3  # drawn, not the first of each class


def test_collapse_brings_forgotten_images_to_other_classes(mlp):
    images, labels = mlp.data.splits["train"].batch(slice(None))
    gone = torch.isin(labels, torch.tensor(CLASSES))
    with METHODS["collapse"].enter(mlp, POINT, mu=3.0, layers=3) as edit, torch.inference_mode():
        answers, before = (model(images).argmax(1) for model in (edit.model, mlp.model))
    assert (answers == labels)[gone].double().mean() < 0.2 < 0.8 < (before == labels)[gone].double().mean()
    assert (answers == labels)[~gone].double().mean() > 0.95


@pytest.mark.parametrize("name", ["esc", "esc_t", "leace", "collapse"])
def test_every_setting_keeps_to_what_it_declares(mlp, name):
    original = {key: value.clone() for key, value in mlp.model.state_dict().items()}
    for settings in METHODS[name].grid:
        with METHODS[name].enter(mlp, POINT, **settings) as edit:
            changed = {key for key, value in edit.model.state_dict().items() if not torch.equal(value, original[key])}
            assert changed == set(edit.allowed)
            assert not any(isinstance(module, nn.Dropout) or module.training for module in edit.model.modules())
    assert all(torch.equal(value, original[key]) for key, value in mlp.model.state_dict().items())
