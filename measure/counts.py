"""What a record says of a model beyond single numbers: where images go, and how sure its scores are."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from core.config import derive_seed
from core.intervals import bootstrap_mean, wilson
from measure.metrics import Evidence, Outputs
from model import NO_ANSWER

MOST_CLASSES = 100  # of a class x class table in a record
SHARES: dict[str, Callable[[Evidence], Tensor]] = {
    "forget_score": lambda e: e.forget.right,
    "retain_score": lambda e: e.retain.right,
    "UA": lambda e: ~e.train_forget.right,
    "RA": lambda e: e.train_retain.right,
}
"""Metrics that are shares of images, in percent, and which images count. bool [S]."""


def class_tables(forget: Outputs, retain: Outputs) -> dict[str, list]:
    """Where images go: mean probabilities on the forget set [C]; class x class counts, up to MOST_CLASSES classes.

    Each is left out where logits are not finite: no table would then account for every image.
    """
    count, mean = forget.num_classes, forget.mean_p
    tables = {"class_probability": mean.tolist()} if mean.isfinite().all() else {}
    true, said = torch.cat([forget.labels, retain.labels]), torch.cat([forget.predicted, retain.predicted])
    if count <= MOST_CLASSES and NO_ANSWER not in said:
        cells = torch.bincount(true * count + said, minlength=count * count)
        tables["confusion"] = cells.view(count, count).tolist()
    return tables


def intervals_of(e: Evidence, names: Iterable[str]) -> dict[str, dict]:
    """95 % intervals over the images of one run: Wilson for shares, percent; bootstrap for the mean probability."""
    found = {}
    for name in names:
        if name in SHARES:
            right = SHARES[name](e)
            found[name] = asdict(wilson(int(right.sum()), len(right)).times(100))
        elif name == "forget_probability" and e.forget.confidence.isfinite().all():
            seed = derive_seed(e.seed, "bootstrap")
            found[name] = asdict(bootstrap_mean(e.forget.confidence.cpu().numpy(), seed))
    return found
