"""What critics read off features, against information that is integrated, classes that no line parts, and by hand."""

import math
from dataclasses import replace

import pytest
import torch

from hidden import critics
from hidden.critics import (
    bits,
    critic,
    information,
    information_difference_index,
    information_layers,
    information_of,
    mlp_probe_layers,
    mlp_probe_layers_gap,
    network_recall,
    network_recalls,
)
from hidden.layers import Stage
from measure.metrics import Evidence
from measure.probes import probe_recall
from tests.helpers.common import evidence
from tests.helpers.three_classes import beside, fitted, images_of, noise

LN3 = math.log(3)


def in_quadrants(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 where both coordinates have one sign, class 1 where they differ: no line parts them."""
    points = noise(seed, count, 2)
    points += 0.5 * points.sign()
    return points.double(), (points[:, 0] * points[:, 1] < 0).long()


def two_sides(shift: float, forgotten: int, retained: int, train: int = 600) -> Stage:
    """A feature that is normal, and shifted for class 0; classes 1 and 2 are alike."""
    labels = torch.cat([torch.zeros(train), 1 + torch.arange(4 * train) % 2]).long()
    values = noise(1, len(labels), 1).double() + shift * (labels == 0)[:, None]
    return Stage(
        values, labels, noise(2, forgotten, 1).double() + shift, torch.zeros(forgotten), noise(3, retained, 1).double()
    )


def integrated(shift: float) -> float:
    """Bits that one feature, N(0, 1) or N(shift, 1) and either as likely, tells of which of the two it is."""
    x = torch.linspace(-8, 8 + shift, 200_001, dtype=torch.float64)
    density = [torch.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (0.0, shift)]
    mean = sum(density) / 2
    return float(sum(torch.trapezoid(p * (p / mean).clamp(min=1e-300).log2(), x) for p in density) / 2)


def informed(*values: float) -> Evidence:
    return evidence(_values={information_of: values})


def test_bits_by_hand():
    """A probability of 3/4 costs .415 bits, one of 1/2 costs 1: (.415 + (.415 + 1) / 2) / 2 of 1 bit is not told."""
    forgotten, retained = torch.tensor([[0.0, LN3]]), torch.tensor([[LN3, 0.0], [5.0, 5.0]])
    cost = -math.log2(3 / 4)
    assert bits(forgotten, retained) == pytest.approx(1 - (cost + (cost + 1) / 2) / 2)
    assert bits(retained, forgotten) == 0  # wrong, which is no less than nothing
    assert bits(torch.tensor([[-90.0, 90.0]]), torch.tensor([[90.0, -90.0]])) == pytest.approx(1)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0, 4.0])
def test_information_of_a_shifted_normal_is_the_integral(shift):
    """Four times as many retained training images as forgotten ones, and other numbers in T, change nothing."""
    assert information(two_sides(shift, 3000, 5000), (0,), seed=0) == pytest.approx(integrated(shift), abs=0.03)


def test_information_of_noise_is_none_although_the_critic_could_learn_it_by_heart():
    values, asked = noise(4, 200, 60).double(), noise(5, 500, 60).double()
    one = Stage(values, torch.arange(200) % 2, asked, torch.zeros(500), noise(6, 500, 60).double())
    assert information(one, (0,), seed=0) < 0.02


def test_a_hidden_layer_reads_what_no_line_parts():
    (train, labels), (asked, true) = in_quadrants(7, 600), in_quadrants(8, 400)
    one = Stage(train, labels + 4, asked, true + 4, asked)
    linear = probe_recall(train, labels, asked, true)
    assert linear is not None
    assert linear < 65
    assert network_recall(one, seed=0) > 95


def test_a_critic_is_drawn_by_its_seed_alone():
    train, labels = in_quadrants(9, 100)
    weights = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        weights.append(critic(train, labels, torch.ones(2), seed)(train))
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_critic_answers_with_the_mean_of_its_networks(monkeypatch):
    """Of probabilities, which sum to 1. Networks side by side are what each is by itself."""
    train, labels = in_quadrants(11, 100)
    seen = []
    real = critics.through
    monkeypatch.setattr(
        critics, "through", lambda layers, values: seen.append((layers, values)) or real(layers, values)
    )
    found = critic(train, labels, torch.ones(2), 3)(train)
    layers, values = seen[-1]
    alone = []
    for place in range(5):
        first, bias, second, bias_2 = (layer[place] for layer in layers)
        alone.append(((values[place] @ first + bias).relu() @ second + bias_2).double().softmax(1))
    torch.testing.assert_close(found.exp(), sum(alone) / 5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_a_target_that_weighs_nothing_is_never_named():
    train, labels = in_quadrants(10, 200)
    network = critic(train, labels, torch.tensor([1.0, 0.0]), seed=0)
    assert not network(train).argmax(1).any()


def test_index_by_hand():
    """I_u .8, I_o 1.6, retrained .4 and .6: (.8 - .5) / (1.6 - .5)."""
    original, gold = informed(0.9, 0.7), (informed(0.2, 0.2), informed(0.4, 0.2))
    e = replace(informed(0.5, 0.3), original=original, retrained=gold)
    assert e.value(information_difference_index) == pytest.approx(0.3 / 1.1)
    assert replace(informed(0.1, 0.2), original=original, retrained=gold).value(
        information_difference_index
    ) == pytest.approx(-0.2 / 1.1)
    assert replace(original, retrained=gold).value(information_difference_index) == pytest.approx(1)
    assert e.value(information_layers) == pytest.approx(0.4)


def test_an_index_that_would_be_a_guess_is_none_with_its_reason():
    """Retrained models with 1.0 and 1.2 bits: the untouched one needs more than 1.1 + 2 x .2 of them."""
    gold = (informed(0.5, 0.5), informed(0.6, 0.6))
    for before, defined in ((0.76, True), (0.74, False)):
        e = replace(informed(0.5, 0.3), original=informed(before, before), retrained=gold)
        assert (e.value(information_difference_index) is not None) == defined
        assert defined or "tell not clearly more" in (e.why(information_difference_index) or "")
    alone = replace(informed(0.5, 0.3), original=informed(0.8, 0.7), retrained=gold[:1])
    assert alone.value(information_difference_index) is None
    assert "fewer than two retrained models" in (alone.why(information_difference_index) or "")


def test_of_models_and_of_features_that_are_no_numbers():
    """The model knows its classes at both stages; one whose weights are no numbers has no value, and says why."""
    e = evidence(model=fitted(), images=images_of())
    assert e.value(network_recalls) == (100, 100)
    assert e.value(mlp_probe_layers) == 100
    told = e.value(information_of)
    assert told is not None
    assert all(0.9 < one <= 1 for one in told)
    again = replace(e, retrained=(replace(e, _values={}),), _values={})
    assert again.value(mlp_probe_layers_gap) == 0
    broken = fitted()
    with torch.no_grad():
        broken.target(0).weight.fill_(math.nan)
    bad = beside(e, broken)
    assert [bad.value(of) for of in (mlp_probe_layers, information_layers)] == [None, None]
    assert bad.why(mlp_probe_layers) == "a feature is not a finite number"
