"""Properties of every metric: no order, no batches, ranges; and defects of circulating code, each by name."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core.config import derive_seed
from eval import Eval
from graphs.layout import layer_graph
from measure.attacks import caught, separation
from measure.comparisons import js, kl, total_variation, zero_retrain_forgetting
from measure.exhibits import tables_of
from measure.metrics import METRICS, MOST_VALUES, Again, Evidence, Outputs, blocks, entropy_mia
from tests.helpers.common import evidence, held, twice
from unlearn.masks import random_mask

HERE = [
    name for name, entry in METRICS.items() if entry.compute.__module__ in ("measure.metrics", "measure.comparisons")
]
SETS = [(split, part) for split in ("train", "test") for part in (True, False)]
CLASSES, SIZES = 4, {"train": (23, 40), "test": (11, 31)}

Drawn = dict[tuple[str, bool], Outputs]


def drawn(seed: int, who: str, scale: float = 2.0) -> Drawn:
    """Random outputs of a model on every set; the labels are the same for all models of a seed."""
    found = {}
    for split, part in SETS:
        count = SIZES[split][0 if part else 1]
        draws = [torch.Generator().manual_seed(derive_seed(seed, name, split, part)) for name in ("labels", who)]
        labels = (
            torch.zeros(count, dtype=torch.long) if part else torch.randint(1, CLASSES, (count,), generator=draws[0])
        )
        logits = scale * torch.randn(count, CLASSES, generator=draws[1])
        logits[torch.arange(count), labels] += 2 * (split == "train")
        found[split, part] = Outputs(logits, labels)
    return found


def evidence_of(sets: dict[str, Drawn]) -> Evidence:
    """The model "u" beside "original", "r0", "r1" and "untrained"."""

    def given_sets(who: str) -> dict:
        return {split: (sets[who][split, True], sets[who][split, False]) for split in SIZES}

    untrained = {"untrained": lambda split, part: twice(sets["untrained"][split, part])}
    original = evidence(**given_sets("original"), **untrained)
    retrained = tuple(evidence(**given_sets(who), **untrained) for who in ("r0", "r1"))
    return evidence(**given_sets("u"), original=original, retrained=retrained, **untrained)


WHO = ("u", "original", "r0", "r1", "untrained")


def figures(sets: dict[str, Drawn]) -> dict[str, float | None]:
    e = evidence_of(sets)
    return {name: e.value(METRICS[name].compute) for name in HERE}


def shuffled(sets: dict[str, Drawn], seed: int) -> dict[str, Drawn]:
    """The same images in another order, the same one for every model."""
    changed: dict[str, Drawn] = {who: {} for who in sets}
    for place, key in enumerate(SETS):
        count = len(sets["u"][key].labels)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + place))
        for who in sets:
            changed[who][key] = Outputs(held(sets[who][key])[order], sets[who][key].labels[order])
    return changed


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 2.0, 20.0]))
def test_no_metric_depends_on_the_order_of_images(seed, scale):
    sets = {who: drawn(seed, who, scale) for who in WHO}
    before, after = figures(sets), figures(shuffled(sets, seed))
    for name in HERE:
        assert after[name] == pytest.approx(before[name], rel=1e-12, abs=1e-12), name
    for name in ("MIA_efficacy", "entropy_MIA", "class_MIA_auc", "class_MIA_tpr1", "avg_gap"):
        assert after[name] == before[name], name


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {who: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval() for who in WHO}


def inferred(
    model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int, most_values: int = MOST_VALUES
) -> Outputs:
    """Outputs through the evaluation's own loop."""
    context = SimpleNamespace(context=SimpleNamespace(device=torch.device("cpu")))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size)
    return Eval.inference(context, model, loader, True, "test", most_values)


def test_no_metric_depends_on_the_batch_size(models):
    """Also where the last batch is short: 23, 40, 11 and 31 images in batches of 1, 7, 16 and all at once."""
    images = {}
    for split, part in SETS:
        labels = drawn(0, "u")[split, part].labels
        draw = torch.Generator().manual_seed(len(labels))
        images[split, part] = 2 * torch.randn(len(labels), 6, generator=draw) + labels[:, None], labels

    def all_figures(size: int) -> dict[str, float | None]:
        return figures({who: {k: inferred(models[who], *v, size) for k, v in images.items()} for who in WHO})

    found = [all_figures(size) for size in (1, 7, 16, 1000)]
    for other in found[:-1]:
        assert other == pytest.approx(found[-1], rel=1e-5, abs=1e-6)
    assert len({f"{value:.6f}" for value in found[-1].values()}) > len(HERE) / 2  # not all trivially equal


@pytest.mark.parametrize(("size", "most"), [(7, 10), (3, 1), (4, 50), (1000, 10**6)])
def test_reports_and_choices_read_two_halves_of_the_training_images(models, size, most):
    """Images at even places for a report and at odd ones for a choice, whatever batches their logits are made in."""
    inputs, labels = torch.randn(31, 6), torch.arange(31) % CLASSES
    whole, held_all = inferred(models["u"], inputs, labels, size, most), models["u"](inputs).detach()
    parts = (whole, whole)
    reported, chosen = (evidence(split, train=parts) for split in ("test", "val"))
    for e in (reported, chosen):
        object.__setattr__(e, "outputs", lambda split, part: parts[0])
    for e, begin in ((reported, 0), (chosen, 1)):
        for half in (e.train_forget, e.train_retain):
            assert torch.equal(half.labels, labels[begin::2])
            expected = held_all[begin::2].double().log_softmax(1)
            torch.testing.assert_close(torch.cat(list(half.log_p())), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(half.right, held_all[begin::2].argmax(1) == labels[begin::2])
        assert e.train_forget is e.train_forget  # made once, so that what is read of it is computed once
    single = Outputs(held_all[:1], labels[:1])
    assert single.halves == (single, single)


@pytest.mark.parametrize("most", [1, 10, 40])
def test_no_metric_depends_on_how_many_logits_are_held(models, most):
    """Sets of more values are read batch by batch and asked for again; batches of 7 and of 16 make the same blocks."""
    images = {}
    for split, part in SETS:
        labels = drawn(0, "u")[split, part].labels
        draw = torch.Generator().manual_seed(len(labels))
        images[split, part] = 2 * torch.randn(len(labels), 6, generator=draw) + labels[:, None], labels

    def outputs(*most_values: int) -> dict[str, Drawn]:
        sizes = dict(zip(WHO, (7, 16, 16, 5, 40), strict=True))
        return {who: {k: inferred(models[who], *v, sizes[who], *most_values) for k, v in images.items()} for who in WHO}

    whole, parts = outputs(), outputs(most)
    assert all(isinstance(parts[who][key].logits, Again) for who in WHO for key in SETS)
    assert all(block.numel() <= max(most, CLASSES) for block in parts["u"]["test", False].log_p())
    assert figures(parts) == pytest.approx(figures(whole), rel=1e-9, abs=1e-12)
    assert not torch.is_inference_mode_enabled()
    for key in SETS:
        one, other = parts["u"][key], whole["u"][key]
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.predicted, other.predicted)
        torch.testing.assert_close(torch.cat(list(one.log_p())), torch.cat(list(other.log_p())), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.at([0, 3, 9]), other.at([0, 3, 9]), rtol=1e-12, atol=1e-12)
        assert one.num_classes == CLASSES
    pairs = [tables_of(who["u"]["test", True], who["u"]["test", False]) for who in (parts, whole)]
    assert pairs[0].keys() == pairs[1].keys()
    assert pairs[0].pop("class_probability") == pytest.approx(pairs[1].pop("class_probability"), rel=1e-12)
    assert pairs[0] == pairs[1]


def test_blocks_hold_all_rows_in_order():
    rows = torch.arange(39.0).view(13, 3)
    for sizes in ([13], [1] * 13, [2, 5, 6], [4, 9]):
        found = list(blocks(rows.split(sizes), most=10))
        assert [len(block) for block in found] == [3, 3, 3, 3, 1]
        assert torch.equal(torch.cat(found), rows)


@pytest.mark.parametrize(("count", "floor"), [(0, ()), (1, ()), (2, ("r1",)), (3, ("r1", "r2"))])
def test_retraining_is_held_against_the_other_retrained_models_alone(count, floor):
    """The method `retrain` yields number 0: its gap to itself, 0, would pass for a noise floor."""
    references = ("r0", "r1", "r2")[:count]
    evaluation = SimpleNamespace(references=[{"index": i, "sane": True} for i in range(count)])
    evaluation._retrained = lambda index, split: references[index]
    evaluation.retrained = lambda split, but: Eval.retrained(evaluation, split, but)
    assert Eval.others(evaluation, "retrain", "test") == floor
    assert Eval.others(evaluation, "default", "test") == references


# --- ranges and naive oracles -----------------------------------------------------------------------------

probabilities = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=2, max_size=2)


@settings(max_examples=50, deadline=None)
@given(rows=probabilities)
def test_divergences_are_what_their_sums_say(rows):
    log_p, log_q = (torch.tensor([row], dtype=torch.float64).log_softmax(1) for row in rows)
    p, q = (each.exp().squeeze(0).tolist() for each in (log_p, log_q))
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def naive(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    assert float(kl(log_p, log_q)) == pytest.approx(naive(p, q), abs=1e-9)
    assert float(js(log_p, log_q)) == pytest.approx((naive(p, m) + naive(q, m)) / 2 / math.log(2), abs=1e-9)
    assert float(js(log_p, log_q)) == pytest.approx(float(js(log_q, log_p)), abs=1e-12)
    assert -1e-12 <= float(js(log_p, log_q)) <= 1 + 1e-12
    far = float(total_variation(log_p.exp(), log_q.exp()))
    assert far == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
    assert 2 * far**2 <= float(kl(log_p, log_q)) + 1e-9  # Pinsker's inequality


few = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(members=few, others=few)
def test_auc_is_the_share_of_pairs(members, others):
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    found = separation(torch.tensor(members, dtype=torch.float64), torch.tensor(others, dtype=torch.float64))
    assert found == pytest.approx(sum(pairs) / len(pairs))


@settings(max_examples=100, deadline=None)
@given(members=few, others=few, rate=st.integers(0, 1000).map(lambda thousandths: thousandths / 1000))
def test_catching_is_the_best_test_that_guesses_among_ties(members, others, rate):
    """Naive: spend the false alarms on thresholds from the top, and on a fraction of the last tie.

    Rates are thousandths: one that is a rounding error below a tie's cost decides nothing.
    """
    left, expected = rate, 0.0
    for value in sorted(set(members + others), reverse=True):
        costs, gains = others.count(value) / len(others), members.count(value) / len(members)
        share = 1.0 if costs <= left + 1e-12 else left / costs
        expected, left = expected + share * gains, left - share * costs
        if share < 1:
            break
    found = caught(*(torch.tensor(each, dtype=torch.float64) for each in (members, others)), rate)
    assert found == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_ranges(seed):
    values = figures({who: drawn(seed, who) for who in WHO})
    for name, value in values.items():
        top = {"%": 100, "points": 100, "L2": math.sqrt(2), "nats": math.inf}.get(METRICS[name].unit, 1)
        assert value is not None
        assert (-100 if name == "worst_retained_drop" else -1e-12) <= value <= top + 1e-9, name


# --- defects of circulating code, each by name ------------------------------------------------------------


def test_defect_entropy_of_an_image_depends_on_the_rest_of_the_batch():
    """A published modified entropy overwrites the label columns of the whole batch: 21.1 where 5.2 is right."""
    outputs = Outputs(
        torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log(), torch.tensor([0, 1, 2])
    )
    naive = [-sum(p * math.log(p) for p in row) for row in held(outputs).exp().tolist()]
    assert outputs.entropy.tolist() == pytest.approx(naive, rel=1e-6)
    for place in range(3):
        alone = Outputs(held(outputs)[place : place + 1], outputs.labels[place : place + 1])
        assert alone.entropy.tolist() == outputs.entropy[place : place + 1].tolist()
        assert alone.confidence.tolist() == outputs.confidence[place : place + 1].tolist()


def test_defect_entropy_takes_the_log_of_the_complement():
    """H has log p, not log(1 - p): 2 bits for four equal classes, where log(1 - p) would give 0.415."""
    assert float(Outputs(torch.zeros(1, 4), torch.tensor([0])).entropy) == pytest.approx(math.log(4))


def test_defect_entropy_mia_counts_non_members():
    """It is the share called *members*: forgotten images as certain as D_r's are all of them, uncertain ones none."""
    sure, unsure = (Outputs(scale * torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)) for scale in (20.0, 0.1))
    for asked, share in ((sure, 100), (unsure, 0)):
        e = evidence(train=(asked, sure), test=(unsure, unsure))
        assert e.value(entropy_mia) == share


def test_defect_js_of_disjoint_certainties_is_not_1():
    """1 bit, 0.693 nats; the KL reversed and averaged over classes as well gives 0.621 nats."""
    one, other = torch.tensor([[0.0, -1e4]], dtype=torch.float64), torch.tensor([[-1e4, 0.0]], dtype=torch.float64)
    assert float(js(one, other)) == pytest.approx(1)
    assert float(js(one, other)) * math.log(2) == pytest.approx(0.6931472)


def test_defect_divergence_is_averaged_over_classes():
    """The figure of an image does not shrink when classes are added that nobody predicts."""
    two = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log(), torch.tensor([[0.2, 0.8]], dtype=torch.float64).log()
    many = [torch.cat([each, torch.full((1, 98), -1e4, dtype=torch.float64)], 1) for each in two]
    for divergence in (kl, js):
        assert float(divergence(*many)) == pytest.approx(float(divergence(*two)))


def test_defect_accuracy_is_the_mean_of_batch_accuracies():
    """3 of 4 right and 0 of 1: 60 %, where the mean of the batches is 37.5 %."""
    inputs = torch.eye(2)[[0, 0, 0, 1, 1]]
    outputs = inferred(nn.Identity(), inputs, torch.zeros(5, dtype=torch.long), batch_size=4)
    assert outputs.score() == pytest.approx(60)
    assert outputs.loss() == pytest.approx((3 * math.log(1 + math.exp(-1)) + 2 * math.log(1 + math.e)) / 5)


def test_defect_zrf_is_a_cosine_of_logits():
    """Logits twice as long point the same way, yet are another distribution; a constant added is the same one."""
    base = torch.tensor([[2.0, 0.0, -1.0]])
    fresh = Outputs(base, torch.tensor([0]))

    def zrf(logits: Tensor) -> float:
        judged = Outputs(logits, torch.tensor([0]))
        value = evidence(train=(judged, judged), untrained=lambda *_: twice(fresh)).value(zero_retrain_forgetting)
        assert value is not None
        return value

    assert zrf(2 * base) < 1 - 1e-3
    assert zrf(base + 5) == pytest.approx(1)
    assert zrf(-base) < zrf(2 * base)


def test_defect_seed_0_does_not_seed():
    """Seed 0 gives the same draw twice, whatever the global generator has done, and another than seed 1."""

    def draw(seed: int) -> np.ndarray:
        torch.rand(3)
        generator = torch.Generator().manual_seed(derive_seed(seed, "random", 50))
        return random_mask(layer_graph(20, 30), 50, generator).keep.numpy()

    assert derive_seed(0, "a") not in (0, derive_seed(1, "a"), derive_seed(0, "b"))
    assert np.array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
