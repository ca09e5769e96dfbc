"""What features tell, against ridge regression written out; partners, and the loss's terms by hand."""

import copy

import pytest
import torch
from torch.nn import functional

from erasing import terms
from erasing.stages import Stages, rows_of
from erasing.terms import LEAST_SPREAD, OWN, RIDGE, Sides, Weights, explained
from model import HookedMLPClassifier
from models.foreign import ForeignClassifier
from models.targets import DEEP


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge(forget: torch.Tensor, partners: torch.Tensor, retained: torch.Tensor, groups: torch.Tensor) -> float:
    """The primal form: one block of weights for all groups, and one for each."""
    spread = retained.std(0)
    spread = spread.clamp_min(float(LEAST_SPREAD * spread.square().mean().sqrt()))
    both = torch.cat([forget, partners]) / spread
    both = both - both.mean(0)
    group = torch.cat([groups, groups])
    blocks = [both] + [OWN**0.5 * both * (group == one)[:, None] for one in group.unique()]
    wide = torch.cat(blocks, 1) / both.shape[1] ** 0.5
    side = torch.cat([torch.ones(len(forget)), -torch.ones(len(partners))]).double()
    weight = torch.linalg.solve(wide.T @ wide + RIDGE * torch.eye(wide.shape[1]), wide.T @ side)
    left = (side - wide @ weight).square().sum() + RIDGE * weight.square().sum()
    return 1 - float(left) / len(side)


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("groups", [[0] * 12, [0, 1, 2] * 4])
def test_what_features_tell_is_the_variance_that_ridge_regression_explains(apart, groups):
    forget, partners, retained = drawn(12, 5), drawn(12, 5, seed=1), drawn(40, 5, seed=2)
    forget[:, 0] += apart
    retained[:, 3] *= 1e-9  # a unit that says nothing
    found = explained(forget, partners, retained, torch.tensor(groups))
    assert float(found) == pytest.approx(ridge(forget, partners, retained, torch.tensor(groups)), abs=1e-6)


def test_a_direction_of_one_group_alone_counts():
    """Two groups that differ from their partners in opposite ways: no common direction tells them."""
    forget, partners = 0.1 * drawn(40, 4), 0.1 * drawn(40, 4, seed=1)
    groups = torch.arange(40) % 2
    forget[:, 0] += torch.where(groups == 0, 1.0, -1.0)
    apart = explained(forget, partners, drawn(60, 4, seed=2), groups)
    assert float(apart) > 3 * float(
        explained(forget, partners, drawn(60, 4, seed=2), torch.zeros(40, dtype=torch.long))
    )


@pytest.fixture(scope="module")
def sides() -> Sides:
    model = HookedMLPClassifier(4, 1, 6).eval().requires_grad_(False)
    images = torch.randn(80, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    deep = ForeignClassifier(model, lambda said: said, images[:4], 4, (DEEP,))
    labels = torch.arange(80) % 4
    labels[labels == 3] = 0  # the classifier knows a class of which there is no image
    stages, rows = Stages(deep), rows_of(deep, [images])
    return Sides(stages, rows, labels, (1,), stages.logits(rows))


def test_the_next_class_is_the_best_other_one_that_has_images(sides):
    logits = sides.stages(sides.h[sides.forget])[1]
    assert sides.next.tolist() == [[0, 2][int(row[[0, 2]].argmax())] for row in logits]
    assert set(sides.next.tolist()) == {0, 2}


def test_forgotten_images_are_answered_as_surely_as_another_classifier_answers_them(sides):
    """Mean entropies by scipy agree; the order of classes stays, and so do the answers of retained images."""
    from scipy.stats import entropy as by_scipy

    model = sides.stages.model
    for factor in (0.3, 4.0):
        ours = Sides(sides.stages, sides.h, sides.labels, (1,), sides.stages.logits(sides.h))
        before, other = ours.answers.clone(), copy.deepcopy(model)
        with torch.no_grad():
            other.net.get_parameter(model.targets[-1].name).mul_(factor)
        ours.as_sure_as(Stages(other))
        logits = Stages(other).logits(ours.h[ours.forget])[:, [0, 2, 3]]
        wanted = by_scipy(logits.softmax(1).numpy(), axis=1).mean()
        found = ours.answers[ours.forget]
        assert by_scipy(found[:, [0, 2, 3]].numpy(), axis=1).mean() == pytest.approx(wanted, abs=1e-4)
        assert not found[:, 1].any()
        assert torch.equal(found.argsort(1), before[ours.forget].argsort(1))
        assert torch.equal(ours.answers[ours.retain], before[ours.retain])


def test_partners_are_of_the_next_class_and_sides_do_not_mix(sides):
    generator = torch.Generator().manual_seed(0)
    following = dict(zip(sides.forget.tolist(), sides.next.tolist(), strict=True))
    met = set()
    for _ in range(20):
        batch = sides.draw(generator)
        assert sides.labels[batch.partners].tolist() == [following[place] for place in batch.forget.tolist()]
        assert set(sides.labels[batch.retain].tolist()) == {0, 2}
        met |= set(batch.partners.tolist())
    assert len(met) > 0.8 * sum(int(label) in sides.next for label in sides.labels)


def test_the_loss_is_its_terms(sides, monkeypatch):
    monkeypatch.setattr(terms, "FORGOTTEN", 8)
    monkeypatch.setattr(terms, "RETAINED", 12)
    deep = sides.stages.model
    weights = [0.5 * weight.detach() for weight in deep.weights()]
    batch = sides.draw(torch.Generator().manual_seed(5))

    def answers(places: torch.Tensor, instead: list | None = None) -> torch.Tensor:
        return sides.stages(sides.h[places], instead)[1][:, [0, 2, 3]].log_softmax(1)

    def fit(places: torch.Tensor) -> torch.Tensor:
        shifted = torch.tensor([0, 9, 1, 2])[sides.labels[places]]
        return functional.nll_loss(answers(places, weights), shifted)

    def far(places: torch.Tensor) -> torch.Tensor:
        ours, theirs = answers(places, weights), answers(places)
        return (theirs.exp() * (theirs - ours)).sum(1).mean()

    kept = 2 * fit(batch.retain) + 3 * far(batch.retain) + 7 * (fit(batch.partners) + far(batch.partners))
    by = Weights(fit=2, far=3, partners=7, forget=5)
    found = sides.terms(weights, torch.Generator().manual_seed(5), by)
    assert float(found.kept) == pytest.approx(float(kept), rel=1e-4)
    assert float(found.forget) == pytest.approx(5 * float(far(batch.forget)), rel=1e-4)
    features = [
        [sides.stages(sides.h[places], weights)[0][stage] for places in (batch.forget, batch.partners, batch.retain)]
        for stage in range(2)
    ]
    groups = sides.labels[batch.partners]
    assert torch.allclose(found.tell, torch.stack([explained(*one, groups) for one in features]), atol=1e-5)
