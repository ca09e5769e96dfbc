"""What stages tell, against features computed layer by layer and neighbours counted one by one."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hidden import layers
from hidden.layers import (
    PER_STAGE,
    Stage,
    binary_auc,
    by_stage,
    differences,
    features,
    nearest_mean_recall,
    neighbour_recall,
    probe_recalls,
    retained_rank,
    retained_rank_of,
    standardised,
)
from measure.attacks import separation
from measure.metrics import METRICS, Evidence
from measure.probes import probe_recall, probed_images
from model import HookedResnet
from rivals.closed_form import DroppedLogits
from tests.helpers.common import evidence
from tests.helpers.three_classes import LABELS, SETS, beside, fitted, fresh, images_of, noise

PAIRS = {name: METRICS[name] for name in METRICS if name.endswith(("_layers", "_layers_gap"))}


def stage(train: list, labels: list[int], forget: list, true: list[int], retain: list | None = None) -> Stage:
    """A stage from numbers, taken for standardised ones."""
    sides = (torch.tensor(side, dtype=torch.float64) for side in (train, forget, retain or forget))
    train_, forget_, retain_ = (side[:, None] if side.dim() == 1 else side for side in sides)
    return Stage(train_, torch.tensor(labels), forget_, torch.tensor(true), retain_)


@pytest.fixture(scope="module")
def judged() -> Evidence:
    """A model of all classes beside two that never saw class 0."""
    model = fitted()
    original = evidence(model=model, images=images_of())
    gold = tuple(evidence(model=fitted((1, 2), seed), images=images_of(), original=original) for seed in (1, 2))
    return evidence(model=model, images=images_of(), original=original, retrained=gold)


def test_features_are_what_every_layer_but_the_first_reads(judged):
    images, labels = probed_images(judged)
    with torch.no_grad():
        first = judged.model.linears[0](images.flatten(1)).relu()
        second = judged.model.linears[1](first).relu()
        asked = judged.model.linears[0](SETS["test"][0][LABELS == 0].flatten(1)).relu()
    found = judged.value(features)
    assert found is not None
    assert len(found) == 2
    for one, naive in zip(found, (first, second), strict=True):
        naive = naive.double()
        deviation = naive.std(0, correction=0)
        expected = (naive - naive.mean(0)) / torch.where(deviation > 0, deviation, 1)
        torch.testing.assert_close(one.train, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.labels, labels)
    shift, scale = first.double().mean(0), first.double().std(0, correction=0)
    expected = (asked.double() - shift) / torch.where(scale > 0, scale, 1)
    torch.testing.assert_close(found[0].forget, expected, rtol=1e-4, atol=1e-4)
    assert (found[0].true.unique().tolist(), len(found[0].retain)) == ([0], 120)


def test_a_stack_of_convolutions_has_features_too():
    model = fresh(0, HookedResnet)
    found = evidence(model=model, images=images_of()).value(features)
    assert found is not None
    assert len(found) >= 3
    with torch.no_grad():
        last = model.linears[0](model.embed(SETS["test"][0][LABELS == 0]))
        train = model.linears[0](model.embed(probed_images(evidence(images=images_of()))[0]))
    torch.testing.assert_close(found[-1].forget, standardised(train.double(), last.double())[1], rtol=1e-3, atol=1e-3)


def test_neighbours_are_counted():
    """Naive: sort by distance, count labels; a tie goes to the side whose ranks are lower."""
    train, labels = noise(1, 90, 3).double(), torch.arange(3).repeat(30)
    asked, true = noise(2, 70, 3).double(), torch.arange(3).repeat(30)[:70]
    right = 0
    for row, label in zip(asked, true.tolist(), strict=True):
        order = sorted(range(90), key=lambda place, row=row: float((train[place] - row).norm()))[:10]
        ranks = {c: [rank for rank, place in enumerate(order) if labels[place] == c] for c in range(3)}
        right += max(ranks, key=lambda c: (len(ranks[c]), -sum(ranks[c]))) == label
    found = neighbour_recall(Stage(train, labels, asked, true, asked))
    assert found == pytest.approx(100 * right / 70)
    assert 20 < found < 60


def test_a_tie_goes_to_the_nearer_ones():
    one = stage([0.0, 9.0, 9.5, 1.0], [1, 0, 0, 1], [2.0], [1])
    assert neighbour_recall(one, 4) == 100
    assert neighbour_recall(replace(one, labels=torch.tensor([0, 1, 1, 0])), 4) == 0


def test_nearest_means_by_hand():
    """Means 1, 10 and 20: 5.4 is nearest to the first, 5.6 to the second, 14 to the second, 16 to the third."""
    asked = [5.4, 5.6, 14.0, 16.0]
    one = stage([0.0, 2.0, 9.0, 11.0, 20.0], [4, 4, 7, 7, 9], asked, [7, 7, 7, 7])
    assert nearest_mean_recall(one) == 50
    assert nearest_mean_recall(replace(one, true=torch.tensor([4, 7, 4, 9]))) == 75


def test_ranks_of_similarity_by_hand():
    """Cosines to the nearest of (1, 0) and (0, 1): .71 and 0 of forgotten images, 1, .89 and -.71 of retained ones. The
    training image of the forgotten class, to which one is most similar, does not count.
    """
    train, labels = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [1, 2, 0]
    one = stage(train, labels, [[3.0, 3.0], [-2.0, 0.0]], [0, 0], [[5.0, 0.0], [1.0, 2.0], [-1.0, -1.0]])
    assert retained_rank_of(one, (0,)) == pytest.approx(2 / 6)
    level = replace(one, retain=torch.tensor([[6.0, 6.0], [-4.0, 0.0]], dtype=torch.float64))
    assert retained_rank_of(level, (0,)) == pytest.approx(0.5)
    assert retained_rank_of(one, (0, 1)) == pytest.approx(3.5 / 6)  # to (0, 1) alone .71 and 0; 0, .89 and -.71


def test_the_area_of_a_single_feature_is_counted_in_pairs():
    """A probe of one feature orders images as the feature does, on either side."""
    one = stage(
        [3.0, 4.0, 5.0, 0.0, 1.0, -1.0], [2, 2, 2, 0, 1, 1], [4.0, 1.0, -2.0], [2, 2, 2], [3.0, 1.0, -4.0, -5.0]
    )
    assert binary_auc(one, (2,)) == pytest.approx(100 * (4 + 2.5 + 2) / 12)
    assert binary_auc(replace(one, train=-one.train), (2,)) == pytest.approx(100 * (12 - 8.5) / 12)


def test_the_probe_of_two_sides_weighs_them_alike():
    """30 forgotten against 90 retained is as each forgotten one three times, all with the weight 120 / (2 x 90)."""
    shift = torch.tensor([1.0, 0.5, 0, 0, 0, 0, 0, 0]).double()
    train, labels = noise(1, 120, 8).double(), torch.arange(4).repeat(30)
    train[labels == 2] += shift
    asked, others = noise(2, 50, 8).double() + shift, noise(3, 80, 8).double()
    copies = torch.cat([train, train[labels == 2], train[labels == 2]])
    sides = torch.cat([labels == 2, torch.ones(60, dtype=torch.bool)])
    probe = LogisticRegression(C=120 / 180, tol=1e-9).fit(copies.numpy(), sides.numpy())
    weight = torch.from_numpy(probe.coef_[0])
    pairs = ((asked @ weight)[:, None] > (others @ weight)[None]).double().mean()
    found = binary_auc(Stage(train, labels, asked, labels[:50], others), (2,))
    assert found == pytest.approx(100 * float(pairs), abs=0.1)
    plain = LogisticRegression(C=1).fit(train.numpy(), (labels == 2).numpy())
    orders = [torch.from_numpy(plain.decision_function(side.numpy())) for side in (asked, others)]
    assert abs(found - 100 * separation(*orders)) > 0.2


def test_a_model_that_knows_the_class_tells_it_at_every_stage(judged):
    for name in ("probe_layers", "auc_layers", "knn_layers", "nearest_mean_layers"):
        assert judged.value(METRICS[name].compute) == pytest.approx(100)


def test_the_rank_is_the_mean_over_stages(judged):
    """A model that tells the class apart puts it farther from retained images than those are from one another."""
    found = judged.value(features)
    ranks = [retained_rank_of(one, (0,)) for one in found]
    assert judged.value(retained_rank) == pytest.approx(sum(ranks) / len(ranks))
    assert max(ranks) < 0.1


def test_recalls_are_those_of_the_probe(judged):
    found = judged.value(features)
    assert found is not None
    expected = [probe_recall(one.train, one.labels, one.forget, one.true) for one in found]
    assert judged.value(probe_recalls) == pytest.approx(expected)


@pytest.mark.parametrize("name", PER_STAGE)
def test_values_at_each_stage_are_those_whose_mean_is_the_metric(judged, name):
    found = by_stage(judged, [name, "probe_layers_gap", "retain_score"])
    assert list(found) == [name]
    assert list(found[name]) == ["linears.1", "linears.2"]
    assert tuple(found[name].values()) == judged.value(PER_STAGE[name])
    assert sum(found[name].values()) / 2 == pytest.approx(judged.value(METRICS[name].compute))


def test_gaps_are_the_largest_over_stages_on_either_side(judged):
    """Ours 60 and 50, the retrained models' means 70 and 45: the gap is 10, and the mean 55."""
    preset = [(60.0, 50.0), (80.0, 40.0), (60.0, 50.0)]
    ours, *gold = (replace(judged, retrained=(), _values={probe_recalls: values}) for values in preset)
    e = replace(ours, retrained=tuple(gold))
    assert differences(e, probe_recalls) == (-10, 5)
    assert e.value(layers.probe_layers_gap) == 10
    assert e.value(layers.probe_layers) == 55


@pytest.mark.parametrize("name", [name for name in PAIRS if name.endswith("_gap")])
def test_each_gap_is_of_its_own_value(judged, name):
    """A model has no gap to itself; to others the largest one is no smaller than that of means over stages."""
    same = replace(judged, retrained=(replace(judged, retrained=()),), _values={})
    assert same.value(METRICS[name].compute) == 0
    plain = METRICS[name.removesuffix("_gap")].compute
    means = [float(r.value(plain) or 0) for r in judged.retrained]
    gap, ours = judged.value(METRICS[name].compute), judged.value(plain)
    assert gap is not None
    assert ours is not None
    assert gap >= abs(ours - sum(means) / 2) - 1e-9


def test_nothing_to_compare_with_is_nothing_to_say(judged):
    alone = replace(judged, retrained=(), _values={})
    assert alone.value(layers.probe_layers_gap) is None
    assert alone.why(layers.probe_layers_gap) == "there is no retrained model to compare with"
    assert {name: alone.value(METRICS[name].compute) for name in PAIRS if name.endswith("_gap")} == dict.fromkeys(
        name for name in PAIRS if name.endswith("_gap")
    )


def test_features_that_are_no_numbers_say_nothing(judged):
    model = fitted()
    with torch.no_grad():
        model.target(0).weight.fill_(float("nan"))
    e = beside(judged, model)
    assert by_stage(e, PER_STAGE) == {}
    assert {e.value(entry.compute) for entry in PAIRS.values()} == {None}
    assert {e.why(entry.compute) for entry in PAIRS.values()} == {"a feature is not a finite number"}


def test_a_dropped_logit_leaves_all_features(judged):
    model = fitted()
    model.linears[-1] = DroppedLogits(model.target(-1), (0,))
    e = beside(judged, model.eval())
    assert e.value(probe_recalls) == judged.value(probe_recalls)


def test_the_model_is_left_as_it_is_and_no_global_seed_is_read(judged):
    model = fresh(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = {name: beside(judged, model).value(entry.compute) for name, entry in PAIRS.items()}
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks
    assert all(not module._forward_pre_hooks for module in model.modules())
    torch.manual_seed(6)
    assert first == {name: beside(judged, model).value(entry.compute) for name, entry in PAIRS.items()}
