"""How sure the scores of one run are, given its finite sets of images."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

from torch import Tensor

from config import derive_seed
from intervals import bootstrap_mean, wilson
from metrics import Evidence

SHARES: dict[str, Callable[[Evidence], Tensor]] = {
    "forget_score": lambda e: e.forget.right,
    "retain_score": lambda e: e.retain.right,
    "UA": lambda e: ~e.train_forget.right,
    "RA": lambda e: e.train_retain.right,
}
"""Metrics that are shares of images, in percent, and which images count. bool [S]."""


def intervals_of(e: Evidence, names: Iterable[str]) -> dict[str, dict]:
    """95 % intervals over the images of one run: Wilson for shares, percent; bootstrap for the mean probability."""
    found = {}
    for name in names:
        if name in SHARES:
            right = SHARES[name](e)
            found[name] = asdict(wilson(int(right.sum()), len(right)).times(100))
        elif name == "forget_probability":
            seed = derive_seed(e.seed, "bootstrap")
            found[name] = asdict(bootstrap_mean(e.forget.confidence.cpu().numpy(), seed))
    return found
