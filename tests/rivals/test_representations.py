"""Rivals that train features: losses as naive loops, what is learned from which images, and that features move."""

import math

import pytest
import torch
from torch import Tensor

from rivals import representations
from rivals.compared import METHODS
from rivals.representations import (
    class_directions,
    drawn_to_retained,
    read_inside,
    supervised_contrastive,
)
from rivals.subspaces import last_inputs_of
from tests.helpers.knowing import CLASSES, Flat, digits, knowing, read_by_the_last
from unlearn.finetuning import Finetuner
from unlearn.registry import Context, NotApplicable, Point

NAMES = [name for name, entry in METHODS.items() if entry.module == representations.__name__]


@pytest.fixture(scope="module")
def mlp() -> Context:
    return knowing(digits())


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr(representations, "EPOCHS", 4)


def edited(context: Context, name: str, seed: int = 0, **settings):
    with METHODS[name].enter(context, Point(1, 1, seed), **(settings or METHODS[name].grid[0])) as edit:
        return edit.model


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- losses -----------------------------------------------------------------------------------------------


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def share(z: list[list[float]], i: int, j: int, temperature: float) -> float:
    below = sum(math.exp(cosine(z[i], z[k]) / temperature) for k in range(len(z)) if k != i)
    return math.exp(cosine(z[i], z[j]) / temperature) / below


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_supervised_contrastive_loss_as_naive(temperature):
    z, labels = randn(9, 4), [0, 1, 0, 2, 1, 0, 3, 1, 2]  # class 3 has one image, which has no pair
    rows, total, counted = z.tolist(), 0.0, 0
    for i in range(9):
        partners = [j for j in range(9) if j != i and labels[j] == labels[i]]
        if partners:
            total -= sum(math.log(share(rows, i, j, temperature)) for j in partners) / len(partners)
            counted += 1
    assert float(supervised_contrastive(z, torch.tensor(labels), temperature)) == pytest.approx(
        total / counted, rel=1e-9
    )


def test_supervised_contrastive_loss_at_its_bounds():
    """Classes that are points far apart: only images of one's own class count. No pairs: nothing to learn."""
    z = torch.eye(2).double().repeat_interleave(3, 0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert float(supervised_contrastive(z, labels, 0.01)) == pytest.approx(math.log(2), abs=1e-9)
    alone = torch.eye(3).double().requires_grad_()
    loss = supervised_contrastive(alone, torch.arange(3))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not alone.grad.any()


def test_drawn_to_retained_as_naive():
    forget, retain = randn(4, 3), randn(5, 3, seed=1)
    rows = torch.cat([forget, retain]).tolist()
    logs = [math.log(share(rows, i, j, 0.1)) for i in range(4) for j in range(4, 9)]
    assert float(drawn_to_retained(forget, retain)) == pytest.approx(-sum(logs) / len(logs), rel=1e-9)


def test_class_directions_by_hand():
    forget = torch.tensor([[3.0, 0, 1], [5.0, 0, 1]]).double()
    retain = torch.tensor([[0.0, 2, 1], [0.0, 0, 1], [2.0, 4, 1], [2.0, 0, 1]]).double()  # mean of all: (2, 1, 1)
    found = class_directions(forget, torch.tensor([4, 4]), retain)  # (4, 0, 1) - (2, 1, 1) = (2, -1, 0)
    wanted = torch.tensor([2.0, -1, 0]).double() / 5**0.5
    assert torch.allclose(found[:, 0] * found[0].sign(), wanted)
    two = class_directions(forget, torch.tensor([4, 7]), retain)
    assert torch.allclose(two.T @ two, torch.eye(2).double())
    assert (two[2].abs() < 1e-12).all()  # the third axis says nothing


# --- what they see and do ---------------------------------------------------------------------------------


def test_features_are_those_that_parameters_reach(mlp):
    images = mlp.data.splits["train"].batch(slice(5))[0]
    features, logits = read_inside(mlp.model, images)
    assert [tuple(h.shape) for h in features] == [(5, 128), (5, 64)]  # not the pixels
    assert torch.equal(logits, mlp.model(images))
    torch.testing.assert_close(features[-1], read_by_the_last(mlp.model, images), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotApplicable, match="no layer ahead of its last"):
        read_inside(Flat((64, 10)), images)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_seeds(mlp, name, monkeypatch):
    seen, load = [], Finetuner._load

    def recording(engine: Finetuner, indices: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(indices)
        return load(engine, indices)

    monkeypatch.setattr(Finetuner, "_load", recording)
    first = edited(mlp, name)
    labels = mlp.data.splits["train"].labels[torch.cat(seen)]
    gone = torch.isin(labels, torch.tensor(CLASSES))
    forget = int(mlp.data.is_forgotten(mlp.data.splits["train"].labels).sum())
    assert len(labels) == 3 * forget * representations.EPOCHS
    assert int(gone.sum()) == (0 if name == "cola" else forget * representations.EPOCHS)
    again, other = edited(mlp, name), edited(mlp, name, seed=1)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())


def test_collapse_then_align(mlp):
    """Contrastive epochs never touch the last layer; cross-entropy does, and brings the retained classes back."""
    old = mlp.model.state_dict()
    alone = edited(mlp, "cola", lr=1e-3, collapse=4).state_dict()
    both = edited(mlp, "cola", lr=1e-3, collapse=2).state_dict()
    last = "linears.2.weight"
    assert torch.equal(alone[last], old[last])
    assert not torch.equal(both[last], old[last])
    assert all(not torch.equal(alone[key], old[key]) for key in old if key != last)
    images, labels = mlp.data.splits["train"].batch(slice(None))
    kept = ~mlp.data.is_forgotten(labels)
    spread = [
        float(supervised_contrastive(read_by_the_last(model, images[kept]), labels[kept]))
        for model in (mlp.model, edited(mlp, "cola", lr=1e-3, collapse=4))
    ]
    assert spread[1] < spread[0] - 0.3


def test_forgotten_features_are_drawn_to_retained_ones(mlp):
    images, labels = mlp.data.splits["train"].batch(slice(None))
    gone = mlp.data.is_forgotten(labels)
    near = [
        float(drawn_to_retained(h[gone][:60], h[~gone][:200]))
        for h in (
            read_by_the_last(model, images) for model in (mlp.model, edited(mlp, "contrastive", lr=1e-3, weight=1.0))
        )
    ]
    assert near[1] < near[0] - 0.1


def test_a_student_comes_closer_to_the_projected_teacher(mlp):
    (forget, true), (retain, _) = (last_inputs_of(mlp, side) for side in (True, False))
    along = class_directions(forget, true, retain).float()
    images, labels = mlp.data.splits["train"].batch(slice(None))
    gone = mlp.data.is_forgotten(labels)
    before, after = (read_by_the_last(model, images) for model in (mlp.model, edited(mlp, "pour_d", lr=1e-3)))
    assert (after[gone] @ along).norm() < 0.6 * (before[gone] @ along).norm()
    taught = before - before @ along @ along.T
    assert (after - taught).norm() < 0.7 * (before - taught).norm()


@pytest.mark.parametrize("name", NAMES)
def test_settings_differ_and_are_few(name):
    grid = METHODS[name].grid
    assert 2 <= len({tuple(settings.items()) for settings in grid}) == len(grid) <= 5
