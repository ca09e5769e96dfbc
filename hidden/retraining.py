"""How fast forgotten classes come back, with the old last layer and with a fresh one, at several learning rates.

A last layer that answers the classes with nothing slows relearning down whatever the features tell, and an edit made
against one learning rate may give way at another (arXiv:2602.18868).
"""

import copy

import torch
from torch import nn

from core.config import derive_seed
from measure.metrics import Evidence, Undefined, metric
from measure.probes import RELEARN_TARGET, relearn
from model import HookedModel

RATES = (5e-4, 2e-3, 8e-3)


def with_fresh_head(model: HookedModel, seed: int) -> HookedModel:
    """A copy of a model whose last layer is drawn anew: uniform in +-1 / sqrt(n), as PyTorch begins, without bias."""
    learner, old = copy.deepcopy(model), model.target(-1)
    fresh = nn.utils.skip_init(nn.Linear, old.in_features, old.out_features, bias=False)  # draws by no global seed
    bound, generator = old.in_features**-0.5, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        fresh.weight.uniform_(-bound, bound, generator=generator)
    learner.linears[-1] = fresh.to(old.weight)
    return learner


def area(e: Evidence, shots: int, start: HookedModel | None = None) -> float:
    """Mean, over RATES, of the recall after relearning.

    Raises:
        Undefined: a forgotten class has fewer images than `shots`.
    """
    found = [relearn(e, shots, rate, start) for rate in RATES]
    known = [value for value in found if value is not None]
    if len(known) < len(found):
        raise Undefined(f"a forgotten class has fewer than {shots} training images")
    return sum(known) / len(known)


def area_of_fresh_head(e: Evidence, shots: int) -> float:
    """The same of a copy with a last layer that is drawn by the run's seed, alike for all models of a run."""
    return area(e, shots, with_fresh_head(e.model, derive_seed(e.seed, "fresh head")))


@metric("relearn_area_1", "%", "retrain", group="features", target=RELEARN_TARGET, source="2602.18868")
def relearn_area_1(e: Evidence) -> float:
    """As relearn_area_10, from 1 training image of every class."""
    return area(e, 1)


@metric("relearn_area_10", "%", "retrain", group="features", target=RELEARN_TARGET, source="2602.18868")
def relearn_area_10(e: Evidence) -> float:
    """relearn_10 at three learning rates of the linear stack, 5e-4, 2e-3 and 8e-3 (1e-4 ahead of it each time): the
    mean of the three recalls.
    """
    return area(e, 10)


@metric("relearn_area_50", "%", "retrain", group="features", target=RELEARN_TARGET, source="2602.18868")
def relearn_area_50(e: Evidence) -> float:
    """As relearn_area_10, from 50 training images of every class."""
    return area(e, 50)


@metric("fresh_head_1", "%", "retrain", group="features", target=RELEARN_TARGET, source="2602.18868")
def fresh_head_1(e: Evidence) -> float:
    """As fresh_head_10, from 1 training image of every class."""
    return area_of_fresh_head(e, 1)


@metric("fresh_head_10", "%", "retrain", group="features", target=RELEARN_TARGET, source="2602.18868")
def fresh_head_10(e: Evidence) -> float:
    """As relearn_area_10, but from a copy whose last layer is drawn anew, so that nothing hides in it: what all layers
    below it still tell counts, and a dropped logit counts as one that is there.
    """
    return area_of_fresh_head(e, 10)


@metric("fresh_head_50", "%", "retrain", group="features", target=RELEARN_TARGET, source="2602.18868")
def fresh_head_50(e: Evidence) -> float:
    """As fresh_head_10, from 50 training images of every class."""
    return area_of_fresh_head(e, 50)
