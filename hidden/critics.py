"""What small trained networks read off the features of every stage: a probe with a hidden layer, and information.

A linear probe may miss what a network could read. A critic is the mean of five networks with one hidden layer of 64
units (ReLU), trained on the images of `hidden.layers`: AdamW, batches of 256, 20 passes. Each keeps another fifth of
the training images out, and stays as it was after the pass with the smallest loss on these. One network alone is of
little use: two of them differ by more than features do.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.config import derive_seed
from hidden.layers import TARGET, Stage, at_each, largest_gap, mean_over_stages
from measure.metrics import Evidence, Undefined, metric
from training.optimisers import AdamW

HIDDEN, PASSES, BATCH, RATE, DECAY = 64, 20, 256, 5e-3, 1e-2
NETWORKS = 5
CLEAR = 2  # times the range of retrained models' information, that the untouched classifier's must be above their mean

Layers = Sequence[Tensor]
"""Weights and biases of several networks side by side: [K, d, 64], [K, 1, 64], [K, 64, targets], [K, 1, targets]."""


def fresh_layers(inputs: int, outputs: int, generator: torch.Generator) -> Layers:
    """Draw the weights of NETWORKS networks, uniform in +-1 / sqrt(what a layer reads), as PyTorch begins."""

    def drawn(reads: int, *shape: int) -> Tensor:
        values = torch.empty(NETWORKS, *shape).uniform_(-(reads**-0.5), reads**-0.5, generator=generator)
        return values.requires_grad_()

    first = drawn(inputs, inputs, HIDDEN), drawn(inputs, 1, HIDDEN)
    return [*first, drawn(HIDDEN, HIDDEN, outputs), drawn(HIDDEN, 1, outputs)]


def through(layers: Layers, values: Tensor) -> Tensor:
    """Logits of every network, [K, b, targets], of its own features, [K, b, d]."""
    first, bias, second, bias_2 = layers
    return torch.baddbmm(bias_2, torch.baddbmm(bias, values, first).relu(), second)


def critic(values: Tensor, targets: Tensor, weights: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Train a critic to tell targets from features.

    Args:
        values: features of training images, standardised, [S, d]. targets: from 0 on, int64 [S].
        weights: how much each target counts in the loss, [targets].
        seed: of initial weights, of batches, and of who is kept out where.

    Returns:
        A function from features [A, d] to log-probabilities [A, targets], float64: of the networks' mean.
    """
    values, generator = values.float(), torch.Generator().manual_seed(seed)
    layers = fresh_layers(values.shape[1], len(weights), generator)
    fifths = torch.randperm(len(targets), generator=generator)[: len(targets) // NETWORKS * NETWORKS].view(NETWORKS, -1)
    taught = torch.stack([fifths[torch.arange(NETWORKS) != k].flatten() for k in range(NETWORKS)])
    optimizer = AdamW(layers, RATE, weight_decay=DECAY)
    best, least = [layer.detach().clone() for layer in layers], torch.full((NETWORKS,), math.inf)
    for _ in range(PASSES):
        order = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in taught])
        for part in order.split(BATCH, dim=1):
            with torch.enable_grad():
                logits = through(layers, values[part])
                loss = cross_entropy(logits.flatten(0, 1), targets[part].flatten(), weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = torch.stack(
                [
                    cross_entropy(said, targets[out], weights)
                    for said, out in zip(through(layers, values[fifths]), fifths, strict=True)
                ]
            )
            better, least = (now < least)[:, None, None], torch.minimum(now, least)
            best = [torch.where(better, layer, old) for layer, old in zip(layers, best, strict=True)]

    def probabilities(asked: Tensor) -> Tensor:
        said = through(best, asked.float().expand(NETWORKS, *asked.shape)).double()
        return said.log_softmax(2).logsumexp(0) - math.log(NETWORKS)

    return probabilities


# --- a probe with a hidden layer --------------------------------------------------------------------------


def network_recall(stage: Stage, seed: int) -> float:
    """Percent of T's forgotten images whose class a critic of all classes names."""
    classes, targets = stage.labels.unique(return_inverse=True)
    network = critic(stage.train, targets, torch.ones(len(classes)), seed)
    return 100 * float((classes[network(stage.forget).argmax(1)] == stage.true).double().mean())


def network_recalls(e: Evidence) -> tuple[float, ...]:
    """Recall of the forgotten classes by a critic of all classes, at every stage."""
    return at_each(e, partial(network_recall, seed=derive_seed(e.seed, "critic")))


@metric("mlp_probe_layers", "%", "retrain", group="features", target=TARGET, source="1610.01644")
def mlp_probe_layers(e: Evidence) -> float:
    """As probe_layers, by probes with a hidden layer of 64 units: the mean of five, each trained on four fifths of the
    images and stopped by the loss on the others (AdamW 5e-3, at most 20 passes).
    """
    return mean_over_stages(e, network_recalls)


@metric("mlp_probe_layers_gap", "points", "lower", group="features", target="0")
def mlp_probe_layers_gap(e: Evidence) -> float:
    """The same of mlp_probe_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, network_recalls)


# --- information ------------------------------------------------------------------------------------------


def bits(forgotten: Tensor, retained: Tensor) -> float:
    """Information about "one of the classes" in what a critic reads, at least: 1 bit less its cross-entropy, in bits.

    Both sides weigh the same, so that the answer is worth 1 bit; a critic that knows nothing has a cross-entropy of 1
    bit, and one that knows less (wrong, and sure of it) counts as that.

    Args:
        forgotten, retained: logits or log-probabilities (retained, forgotten) of images of each side that the critic
            did not see, [A, 2] and [B, 2].
    """
    sides = ((forgotten, 1), (retained, 0))
    losses = [float(-logits.double().log_softmax(1)[:, side].mean()) for logits, side in sides]
    return max(0.0, 1 - sum(losses) / (2 * math.log(2)))


def information(stage: Stage, classes: Sequence[int], seed: int) -> float:
    """Bits that a stage's features tell of "one of the classes", by a critic, on T."""
    targets = torch.isin(stage.labels, torch.tensor(classes)).long()
    count = torch.bincount(targets, minlength=2)
    network = critic(stage.train, targets, len(targets) / (2 * count), seed)
    return bits(*(network(side) for side in (stage.forget, stage.retain)))


def information_of(e: Evidence) -> tuple[float, ...]:
    """Bits that every stage tells of the forgotten classes."""
    return at_each(e, partial(information, classes=e.forget_class, seed=derive_seed(e.seed, "information")))


@metric("information_layers", "bits", "retrain", group="features", target="as retrained, not 0", source="2405.17878")
def information_layers(e: Evidence) -> float:
    """Mutual information of what a stage reads and "forgotten or retained", both as likely, at least: 1 bit less the
    cross-entropy, on T (of each retained class up to 200 images), of critics trained as those of mlp_probe_layers,
    in bits; averaged over stages.
    """
    return mean_over_stages(e, information_of)


@metric("IDI", "ratio", "retrain", group="features", target="0", source="2405.17878")
def information_difference_index(e: Evidence) -> float:
    """Information difference index: with I the sum over stages of the bits of information_layers, (I_u - I_r) / (I_o -
    I_r), r the mean of the retrained models and o the untouched classifier: 0 as retrained, 1 as untouched, below 0
    less than retrained. Not defined where I_o - I_r is no more than twice as large as retrained models are apart, of
    which there must be two: it would be a ratio of noise. The estimate of I is this project's own, its stages are those
    of probe_layers.
    """
    theirs = [sum(one.needed(information_of)) for one in e.retrained]
    if len(theirs) < 2:
        raise Undefined("with fewer than two retrained models nobody knows how far such models are apart")
    mean, before = sum(theirs) / len(theirs), sum((e.original or e).needed(information_of))
    if before - mean <= CLEAR * (max(theirs) - min(theirs)):
        raise Undefined("untouched features tell not clearly more of the classes than those of retrained models")
    return (sum(e.needed(information_of)) - mean) / (before - mean)
