"""Search the smallest kappa whose mask meets a stated target, as far as validation images can show it.

The target: forget score <= tau and loss of retain score <= epsilon, each held by the upper end of its 95 % interval.
Every interval is valid for its own kappa; that the first of several is taken is not corrected for.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from core.config import AutoConfig, UserError
from core.intervals import paired_difference, wilson
from model import predictions
from rivals.compared import mask_of
from unlearn.masks import masked
from unlearn.registry import Context, Point

MOST_IMAGES = 2**40  # where the search for a sufficient number of images ends


@dataclass(frozen=True)
class Attempt:
    """Scores at one kappa on validation images, percent and points; `*_most`: upper ends of 95 % intervals."""

    kappa: int
    forget_score: float
    forget_score_most: float
    retain_drop: float
    retain_drop_most: float

    def meets(self, auto: AutoConfig) -> bool:
        """Return whether the upper ends of both intervals are within the target."""
        return self.forget_score_most <= auto.tau and self.retain_drop_most <= auto.epsilon

    @property
    def said(self) -> str:
        """The scores in words."""
        return f"forget {self.forget_score:.1f} %, loss {self.retain_drop:.1f} points"


@dataclass(frozen=True)
class Search:
    """The kappa to use: the smallest that meets the target, else the best trade-off of those tried."""

    achieved: bool
    kappa: int
    attempts: tuple[Attempt, ...]

    def facts(self, auto: AutoConfig) -> dict:
        """Return the search's target and attempts, for records and mask files."""
        target = {"method": auto.method, "tau": auto.tau, "epsilon": auto.epsilon, "confidence": 0.95}
        return target | {"achieved": self.achieved, "attempts": [asdict(attempt) for attempt in self.attempts]}


def fewest(meets: Callable[[int], bool]) -> int | None:
    """Return the smallest number of images from which on `meets` holds; None: no number would do."""
    most = 1
    while not meets(most):
        most *= 2
        if most > MOST_IMAGES:
            return None
    return 1 + bisect_left(range(1, most), True, key=meets)


def check_provable(
    auto: AutoConfig, forget_images: int, retain_images: int, field: str = "auto.{}", more: str = "data.val_fraction"
) -> None:
    """Check that so many validation images can show the target at all, before anything is computed for it.

    The best that they can show of a mask: none of the forgotten ones is recognised, no other answer changes.

    Args:
        field: how a field of the target is written. more: what gives more validation images.

    Raises:
        UserError: they cannot; says how many would do.
    """
    sides = (
        ("tau", auto.tau, forget_images, "of the classes to forget show a forget score of {:.2g} %",
         lambda n: 100 * wilson(0, n).high),
        ("epsilon", auto.epsilon, retain_images, "of the others show a loss of {:.2g} points",
         lambda n: 100 * paired_difference(0, 0, n).high),
    )  # fmt: skip
    short, names = [], []
    for name, target, images, shown, best in sides:
        if images and best(images) <= target:
            continue
        needed = fewest(lambda n, best=best, target=target: best(n) <= target)
        would_do = f"{needed} would do" if needed else "no number would do"
        said = shown.format(best(images) if images else 100)
        short.append(f"{images} {said} at best, {field.format(name)} is {target:g} ({would_do})")
        names.append(field.format(name))
    if short:
        how = f"raise {' and '.join(names)}, or {more}"
        raise UserError(f"kappa: auto has a target that validation images cannot show, {'; '.join(short)}: {how}")


def kappas(size: int, auto: AutoConfig) -> list[int]:
    """List the kappas to try, ascending: `auto.tries` shares of `size` weights, evenly spaced on a log scale."""
    low, high, last = auto.smallest_share, auto.largest_share, max(1, auto.tries - 1)
    shares = [low * (high / low) ** (step / last) for step in range(auto.tries)]
    return sorted({max(1, round(share * size)) for share in shares})


def _right(context: Context, is_forget_set: bool) -> Tensor:
    """Return which validation images the classifier, with its present mask, recognises. bool [S]."""
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
        100 * wilson(recognised, len(forget)).high,
        100 * (lost - gained) / len(after),
        100 * paired_difference(lost, gained, len(after)).high,
    )


def search(context: Context, top_k: int) -> Search:
    """Try kappas in ascending order until one meets the target."""
    config, attempts, before = context.config, [], _right(context, False)
    for kappa in kappas(context.graph.num_vertices, config.auto):
        attempts.append(attempt(context, Point(top_k, kappa, config.seed), config.auto.method, before))
        if attempts[-1].meets(config.auto):
            return Search(True, kappa, tuple(attempts))
    best = min(attempts, key=lambda one: (one.forget_score + one.retain_drop, one.kappa))
    return Search(False, best.kappa, tuple(attempts))
