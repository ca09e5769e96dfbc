"""kappa per request: the smallest whose mask meets a stated target, as far as validation images can show it.

The target: forget score <= tau and loss of retain score <= epsilon, each held by the upper end of its 95 % interval.
Every interval is valid for its own kappa; that the first of several is taken is not corrected for.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from config import AutoConfig
from intervals import normal_quantile, wilson
from masks import masked
from methods import Context, Point, mask_of
from model import predictions

Z = normal_quantile(0.95)


@dataclass(frozen=True)
class Attempt:
    """What one kappa does on validation images, percent and points; `*_most`: upper ends of 95 % intervals."""

    kappa: int
    forget_score: float
    forget_score_most: float
    retain_drop: float
    retain_drop_most: float

    def meets(self, auto: AutoConfig) -> bool:
        """Whether both intervals lie within the target."""
        return self.forget_score_most <= auto.tau and self.retain_drop_most <= auto.epsilon


@dataclass(frozen=True)
class Search:
    """The kappa to use: the smallest that meets the target, else the best trade-off of those tried."""

    achieved: bool
    kappa: int
    attempts: tuple[Attempt, ...]

    def facts(self, auto: AutoConfig) -> dict:
        """For records and mask files."""
        target = {"method": auto.method, "tau": auto.tau, "epsilon": auto.epsilon, "confidence": 0.95}
        return target | {"achieved": self.achieved, "attempts": [asdict(attempt) for attempt in self.attempts]}


def wilson_upper(successes: int, count: int) -> float:
    """Upper end of the 95 % score interval of a share (Wilson 1927, JASA 22:209)."""
    return wilson(successes, count).high


def paired_drop_upper(lost: int, gained: int, count: int) -> float:
    """Upper end of the 95 % interval of (lost - gained) / count, judgements of the same images before and after.

    Half a pair is added to each of the four cells (Agresti and Min 2005, Statistics in Medicine 24:729), so that no
    change at all does not pass for certainty.
    """
    lost_, gained_, count_ = lost + 0.5, gained + 0.5, count + 2
    drop = (lost_ - gained_) / count_
    return drop + Z * math.sqrt(max(0.0, (lost_ + gained_) / count_ - drop * drop) / count_)


def kappas(size: int, auto: AutoConfig) -> list[int]:
    """What is tried, ascending: `auto.tries` shares of `size` weights, evenly spaced on a log scale."""
    low, high, last = auto.smallest_share, auto.largest_share, max(1, auto.tries - 1)
    shares = [low * (high / low) ** (step / last) for step in range(auto.tries)]
    return sorted({max(1, round(share * size)) for share in shares})


def _right(context: Context, is_forget_set: bool) -> Tensor:
    """Which validation images the classifier, as it is now, gets right. bool [S]."""
    h, labels = context.activations("val", is_forget_set)
    with torch.inference_mode():
        return predictions(context.model.head(h, context.config.mask_layer)) == labels


def attempt(context: Context, point: Point, name: str, before: Tensor) -> Attempt:
    """Judge a method's mask at a point; `before`: which retained images were right without it, bool [S]."""
    with masked(context.weights, mask_of(name, context, point)):
        forget, after = _right(context, True), _right(context, False)
    recognised, lost, gained = int(forget.sum()), int((before & ~after).sum()), int((~before & after).sum())
    return Attempt(
        point.kappa,
        100 * recognised / len(forget),
        100 * wilson_upper(recognised, len(forget)),
        100 * (lost - gained) / len(after),
        100 * paired_drop_upper(lost, gained, len(after)),
    )


def search(context: Context, topK: int) -> Search:
    """Try kappas in ascending order until one meets the target."""
    config, attempts, before = context.config, [], _right(context, False)
    for kappa in kappas(context.graph.num_vertices, config.auto):
        attempts.append(attempt(context, Point(topK, kappa, config.seed), config.auto.method, before))
        if attempts[-1].meets(config.auto):
            return Search(True, kappa, tuple(attempts))
    best = min(attempts, key=lambda one: (one.forget_score + one.retain_drop, one.kappa))
    return Search(False, best.kappa, tuple(attempts))
