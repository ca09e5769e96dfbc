"""An erasing edit as a whole: how many weights, which rows, that a class is gone, and that nothing else moves."""

import copy

import pytest
import torch
from torch import nn

from core.config import UserError, derive_seed
from erasing.descent import Descent, Schedule, started, usual
from erasing.erasure import Eraser
from erasing.head import BATCH, LEAST_STEPS, RATE, NoLinearHead, last_layer, new_rows
from erasing.proxies import Proxies, fresh
from erasing.stages import Stages, rows_of
from erasing.terms import Sides
from model import HookedMLPClassifier
from models.foreign import ForeignClassifier
from models.targets import DEEP
from tests.helpers.foreign import resnet

SHORT = Schedule(steps=40)


def opened(module: nn.Module, images: torch.Tensor, outputs: int) -> ForeignClassifier:
    return ForeignClassifier(module, lambda said: said, images, outputs, (DEEP,))


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes of noisy 8 x 8 pictures; 0 and 1 resemble each other, and so do 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 1, 8, 8, generator=generator)
    images[:, 0, :4] += torch.where(labels < 2, 1.0, -1.0)[:, None, None]
    images[:, 0, 4:, :4] += torch.where(labels % 2 == 0, 0.7, -0.7)[:, None, None]
    return images, labels


@pytest.fixture(scope="module")
def trained() -> tuple[HookedMLPClassifier, torch.Tensor, torch.Tensor]:
    images, labels = pictures(600, 0)
    torch.manual_seed(0)
    model = HookedMLPClassifier(4, 1, 8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), images, labels


@pytest.fixture(scope="module")
def eraser(trained) -> Eraser:
    model, images, labels = trained
    deep = opened(model, images[:4], 4)
    return Eraser(deep, rows_of(deep, [images]), labels, 0)


@pytest.fixture(scope="module")
def erasure(eraser):
    return eraser.erase((1,), 300, SHORT)


def test_the_class_is_gone_and_others_stay(trained, erasure):
    model = copy.deepcopy(trained[0])
    images, labels = pictures(400, 1)
    before = model(images).argmax(1) == labels
    erasure.write(model)
    said = model(images).argmax(1)
    assert before[labels == 1].double().mean() > 0.9
    assert not (said == 1).any()
    assert (said == labels)[labels > 1].double().mean() > before[labels > 1].double().mean() - 0.05
    assert (said == 0)[labels == 1].double().mean() > 0.6  # what it resembles most


def test_features_tell_less_and_about_as_much_as_they_may(erasure):
    assert (erasure.may < erasure.before).all()
    assert (erasure.after < erasure.before - 0.5 * (erasure.before - erasure.may)).all()


def test_as_many_weights_as_asked_for_and_none_in_the_new_rows(trained, erasure):
    model, changed = trained[0], copy.deepcopy(trained[0])
    touched = erasure.write(changed)
    assert sum(int(part.sum()) for part in erasure.off.values()) == 300
    assert not erasure.off.get("linears.2.weight", torch.zeros(4, 64))[1].any()
    for name, value in changed.named_parameters():
        moved = value != model.get_parameter(name)
        assert not (moved & ~touched.get(name, torch.zeros_like(moved))).any()
        if name != "linears.2.weight":
            assert not value[touched[name]].any()
    assert torch.equal(changed.get_parameter("linears.2.weight")[1], erasure.rows[0])


def test_the_same_seed_gives_the_same_edit_whatever_came_before(eraser, erasure):
    torch.rand(17)
    again = eraser.erase((1,), 300, SHORT)
    assert all(torch.equal(again.off[name], part) for name, part in erasure.off.items())
    assert torch.equal(again.rows, erasure.rows)
    other = Eraser(eraser.model, eraser.h, eraser.labels, 1).erase((1,), 300, SHORT)
    assert any(not torch.equal(other.off.get(name, ~part), part) for name, part in erasure.off.items())


def test_the_classifier_is_left_as_it_was(trained, erasure):
    images, labels = trained[1:]
    assert (trained[0](images).argmax(1) == labels).double().mean() > 0.9


@pytest.mark.parametrize("kappa", [0, 10**6])
def test_a_number_of_weights_that_there_is_not(eraser, kappa):
    with pytest.raises(UserError, match="kappa"):
        eraser.erase((1,), kappa, SHORT)


def test_without_a_push_on_features_they_tell_more(eraser, erasure):
    """What the term of features is worth: the same descent with a target that is met from the start."""
    sides = Sides(eraser.stages, eraser.h, eraser.labels, (1,), eraser.logits)
    nothing = torch.zeros(eraser.model.weight_graph().shape, dtype=torch.bool)
    descent = Descent(sides, torch.ones(2), 0, SHORT, nothing)
    weights = descent.graph.split(descent.weight.masked_fill(descent.run(300), 0))
    told = sides.tells(eraser.stages, torch.Generator().manual_seed(0), 6, weights)
    assert (told > erasure.after + 0.02).all()


def test_the_soft_mask_grows_and_cools():
    how = Schedule(steps=100, ramp=0.3)
    assert [how.size(step, 90) for step in (0, 9, 19, 29, 99)] == [3, 30, 60, 90, 90]
    assert Schedule(ramp=0).size(0, 90) == 90
    assert how.size(0, 1) == 1
    assert how.temperature(0) == how.hot
    assert how.temperature(99) == pytest.approx(how.cold)


def test_candidates_are_those_that_the_start_prefers(eraser):
    """With as many as kappa there is nothing to choose: the mask is the first-order one."""
    sides = Sides(eraser.stages, eraser.h, eraser.labels, (1,), eraser.logits)
    nothing = torch.zeros(eraser.model.weight_graph().shape, dtype=torch.bool)

    def seek(schedule: Schedule) -> tuple[Descent, torch.Tensor]:
        descent = Descent(sides, torch.zeros(2), 0, schedule, nothing)
        return descent, descent.run(50)

    first = seek(Schedule(steps=0))[1]
    assert torch.equal(seek(Schedule(steps=5, candidates=1))[1], first)
    some, chosen = seek(Schedule(steps=5, candidates=3))
    assert len(some.places) == 150
    assert not (first.flatten().nonzero().flatten()[:, None] != some.places).all(1).any()
    assert set(chosen.flatten().nonzero().flatten().tolist()) <= set(some.places.tolist())


def test_of_very_many_weights_a_share_takes_part():
    assert usual(1000) == Schedule()
    assert usual(2**20).candidates == 8


def test_descent_starts_at_a_standardised_tail():
    scores = started(torch.tensor([0.5, 3.0, -1.0, 2.0]))
    assert scores.argsort(descending=True).tolist() == [1, 3, 0, 2]
    raw = -torch.log((torch.arange(4) + 0.5) / 4)
    needed = ((raw - raw.mean()) / raw.std())[torch.tensor([2, 0, 3, 1])]
    assert torch.allclose(scores, needed)


# --- proxies ----------------------------------------------------------------------------------------------


def test_a_fresh_copy_keeps_what_lies_ahead_and_nothing_behind():
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    module, layers = resnet().eval(), ("layer3.0.conv1.weight", "layer4.0.conv1.weight")
    model = ForeignClassifier(module, lambda said: said, images, module(images).shape[1], layers)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other, again = fresh(model, 7), fresh(model, 7)
    ahead = model.in_prefix()
    for name, value in other.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])
        if ahead(name):
            assert torch.equal(value, before[name]), name
        elif value.dim() > 1:
            assert not torch.equal(value, before[name]), name
            assert float(value.abs().max()) <= (value[0].numel()) ** -0.5 + 1e-6, name
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {ahead(name) for name in before} == {True, False}


def test_a_proxy_without_a_class_has_never_seen_it(eraser):
    proxies = Proxies(eraser.model, eraser.h, eraser.labels, 0)
    without, whole = proxies.trained((1,)), proxies.trained(())
    said, known = (one(eraser.h)[1].argmax(1) for one in (without, whole))
    gone = eraser.labels == 1
    assert not (said == 1)[gone].any()
    assert (known == 1)[gone].double().mean() > 0.9
    assert (said == eraser.labels)[~gone].double().mean() > 0.9


# --- the last layer ---------------------------------------------------------------------------------------


def test_new_rows_do_not_depend_on_the_class_that_they_are_of(eraser):
    """Neither its images nor the old row have a part in them."""
    kept = eraser.labels != 1
    given = eraser.h[kept], (1,), 0
    rows = new_rows(eraser.stages, None, *given)
    weights = [weight.detach().clone() for weight in eraser.model.weights()]
    weights[2][1] = 100.0
    assert torch.equal(new_rows(eraser.stages, weights, *given), rows)
    hidden = eraser.stages(eraser.h[kept])[0][1]
    others = eraser.stages(eraser.h[kept])[1][:, [0, 2, 3]].amax(1)
    assert (hidden @ rows[0] < others).double().mean() > 0.99


def test_new_rows_are_what_the_cross_entropy_trains(eraser):
    """The same steps with autograd, over the logits of all classes."""
    h, labels = eraser.h[eraser.labels % 3 == 0], eraser.labels[eraser.labels % 3 == 0]
    rows = new_rows(eraser.stages, None, h, (1, 2), 0)
    features, logits = eraser.stages(h)
    generator = torch.Generator().manual_seed(derive_seed(0, "erasing", "rows", 1, 2))
    row = features[1].shape[1] ** -0.5 * (2 * torch.rand(rows.shape, generator=generator) - 1)
    row.requires_grad_()
    optimizer = torch.optim.Adam([row], RATE)
    for _ in range(-(-LEAST_STEPS * BATCH // len(h))):
        order = torch.randperm(len(h), generator=generator)
        said = logits[order].index_copy(1, torch.tensor([1, 2]), features[1][order] @ row.T)
        loss = nn.functional.cross_entropy(said, labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(rows, row.detach(), atol=1e-4)


def test_the_bias_that_stays_counts():
    """A class whose bias alone lifts it above all others gets a row that keeps it down all the same."""
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    module = resnet().eval()
    outputs = module(images).shape[1]
    module.fc.bias.data[1] = 2.0
    model = ForeignClassifier(module, lambda said: said, images[:4], outputs, (DEEP,))
    h = rows_of(model, [images])
    assert (model.head(h).argmax(1) == 1).double().mean() > 0.5
    module.fc.weight.data[1] = new_rows(Stages(model), None, h, (1,), 0)[0]
    assert (model.head(h).argmax(1) == 1).double().mean() < 0.1


def test_a_head_that_is_no_linear_layer_is_refused():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.first(images))).mean((2, 3))

    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoLinearHead, match="last is no linear layer"):
        last_layer(Stages(opened(Pooled().eval(), images, 5)))
