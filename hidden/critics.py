"""What small trained networks read off the features of every stage: a probe with a hidden layer, and information.

A linear probe may miss what a network could read. A critic is one hidden layer of 64 units (ReLU), trained on the
images of `hidden.layers`: AdamW, batches of 128, 30 passes, and of these the pass after which the loss on a fifth of
the training images, which is kept out, is smallest.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core.config import derive_seed
from hidden.layers import TARGET, Stage, at_each, largest_gap, mean_over_stages
from measure.metrics import Evidence, Undefined, metric

HIDDEN, PASSES, BATCH, RATE, DECAY = 64, 30, 128, 3e-3, 1e-2
KEPT_OUT = 5  # one image of so many decides when to stop


def fresh_critic(inputs: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """A network of one hidden layer, drawn uniformly in +-1 / sqrt(inputs) by a generator, biases too."""
    sizes = ((inputs, HIDDEN), (HIDDEN, outputs))
    first, last = (nn.utils.skip_init(nn.Linear, n, m) for n, m in sizes)  # draws by no global seed
    with torch.no_grad():
        for layer in (first, last):
            for value in layer.parameters():
                value.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
    return nn.Sequential(first, nn.ReLU(), last)


def critic(values: Tensor, targets: Tensor, weights: Tensor, seed: int) -> nn.Sequential:
    """Train a critic to tell targets from features.

    Args:
        values: features of training images, standardised, float32 [S, d]. targets: from 0 on, int64 [S].
        weights: how much each target counts in the loss, [targets].
        seed: of initial weights, order and what is kept out.
    """
    generator = torch.Generator().manual_seed(seed)
    network = fresh_critic(values.shape[1], len(weights), generator)
    order = torch.randperm(len(targets), generator=generator)
    kept_out, taught = order[::KEPT_OUT], torch.cat([order[k::KEPT_OUT] for k in range(1, KEPT_OUT)])
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    best, least = network, math.inf
    with torch.enable_grad():
        for _ in range(PASSES):
            for part in taught[torch.randperm(len(taught), generator=generator)].split(BATCH):
                loss = cross_entropy(network(values[part]), targets[part], weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                now = float(cross_entropy(network(values[kept_out]), targets[kept_out], weights))
            if now < least:
                best, least = copy.deepcopy(network), now
    return best.requires_grad_(False)


# --- a probe with a hidden layer --------------------------------------------------------------------------


def network_recall(stage: Stage, seed: int) -> float:
    """Percent of T's forgotten images whose class a critic of all classes names."""
    classes, targets = stage.labels.unique(return_inverse=True)
    network = critic(stage.train.float(), targets, torch.ones(len(classes)), seed)
    return 100 * float((classes[network(stage.forget.float()).argmax(1)] == stage.true).double().mean())


def network_recalls(e: Evidence) -> tuple[float, ...]:
    """Recall of the forgotten classes by a critic of all classes, at every stage."""
    return at_each(e, partial(network_recall, seed=derive_seed(e.seed, "critic")))


@metric("mlp_probe_layers", "%", "retrain", group="features", target=TARGET, source="1610.01644")
def mlp_probe_layers(e: Evidence) -> float:
    """As probe_layers, by a probe with a hidden layer of 64 units (AdamW 3e-3, 30 passes, the best by the loss on a
    fifth of its training images).
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
        forgotten, retained: logits (retained, forgotten) of images of each side that the critic did not see, [A, 2] and
            [B, 2].
    """
    sides = ((forgotten, 1), (retained, 0))
    losses = [float(-logits.double().log_softmax(1)[:, side].mean()) for logits, side in sides]
    return max(0.0, 1 - sum(losses) / (2 * math.log(2)))


def information(stage: Stage, classes: Sequence[int], seed: int) -> float:
    """Bits that a stage's features tell of "one of the classes", by a critic, on T."""
    targets = torch.isin(stage.labels, torch.tensor(classes)).long()
    count = torch.bincount(targets, minlength=2)
    network = critic(stage.train.float(), targets, len(targets) / (2 * count), seed)
    return bits(*(network(side.float()) for side in (stage.forget, stage.retain)))


def information_of(e: Evidence) -> tuple[float, ...]:
    """Bits that every stage tells of the forgotten classes."""
    return at_each(e, partial(information, classes=e.forget_class, seed=derive_seed(e.seed, "information")))


@metric("information_layers", "bits", "retrain", group="features", target="as retrained, not 0", source="2405.17878")
def information_layers(e: Evidence) -> float:
    """Mutual information of what a stage reads and "forgotten or retained", both as likely, at least: 1 bit less the
    cross-entropy, on T (of each retained class up to 200 images), of a critic with a hidden layer as in
    mlp_probe_layers, in bits; averaged over stages.
    """
    return mean_over_stages(e, information_of)


@metric("IDI", "ratio", "retrain", group="features", target="0", source="2405.17878")
def information_difference_index(e: Evidence) -> float:
    """Information difference index: with I the sum over stages of the bits of information_layers, (I_u - I_r) / (I_o -
    I_r), r the mean of the retrained models and o the untouched classifier: 0 as retrained, 1 as untouched, below 0
    less than retrained. Of classes of which untouched features tell no more than those of some retrained model it
    cannot be said. The estimate is this project's own, and its stages are those of probe_layers.
    """
    if not e.retrained:
        raise Undefined("there is no retrained model to compare with")
    before, *theirs = (sum(one.needed(information_of)) for one in (e.original or e, *e.retrained))
    if before <= max(theirs):
        raise Undefined("untouched features tell no more of the classes than those of a retrained model")
    mean = sum(theirs) / len(theirs)
    return (sum(e.needed(information_of)) - mean) / (before - mean)
