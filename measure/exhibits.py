"""The parts of a record that are more than one number: sample images, confusion tables, mask maps and intervals.

Each is bounded in size, so that a record stays a few dozen kilobytes whatever the dataset.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from core.config import derive_seed
from core.intervals import bootstrap_mean, wilson
from measure.metrics import Evidence, Outputs
from model import NO_ANSWER
from unlearn.masks import Mask
from utils_data import UnlearningDataset

SAMPLES = 8
WIDEST = 48  # pixels of a thumbnail's longer side
TABLES = ("class_probability", "confusion", "class_score", "taken_for", "said_of_samples")
MAP_SIDE = 32  # most rows and columns of a mask's map
MOST_CLASSES = 100  # with more, a record has no class x class table
SHARES: dict[str, Callable[[Evidence], Tensor]] = {
    "forget_score": lambda e: e.forget.right,
    "retain_score": lambda e: e.retain.right,
    "UA": lambda e: ~e.train_forget.right,
    "RA": lambda e: e.train_retain.right,
}
"""Metrics that are shares of images, in percent, and which images count. bool [S]."""


def sampled(labels: Tensor) -> list[int]:
    """Choose up to SAMPLES places in `labels` [S], ascending: as many of each class, spread evenly over its images."""
    groups = [(labels == label).nonzero().flatten().tolist() for label in labels.unique().tolist()]
    chosen = []
    for turn, places in enumerate(groups[:SAMPLES]):
        shown = min(len(places), SAMPLES // len(groups) + (turn < SAMPLES % len(groups)))
        chosen += [places[k * len(places) // shown] for k in range(shown)]
    return sorted(chosen)


def thumbnails(data: UnlearningDataset, is_forget_set: bool = True) -> dict[str, list]:
    """Encode some test images of the forgotten classes, or of the others: base64 PNG, at most WIDEST pixels a side; and
    their labels.
    """
    from PIL import Image

    part = data.splits["test"]
    places = (data.is_forgotten(part.labels) == is_forget_set).nonzero().flatten()
    places = places[sampled(part.labels[places])]
    pictures = []
    for pixels in part.pixels[places].permute(0, 2, 3, 1).numpy():  # [H, W, C] uint8
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        image.thumbnail((WIDEST, WIDEST))
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        pictures.append(base64.b64encode(file.getvalue()).decode())
    return {"images": pictures, "labels": part.labels[places].tolist()}


def said_of_samples(outputs: Outputs) -> list[list[float]] | None:
    """Return a model's predictions on the images of `thumbnails`, by its outputs on that set: class and probability.

    None if it has no answer for one of them.
    """
    places = sampled(outputs.labels)
    if NO_ANSWER in outputs.predicted[places]:
        return None
    best = outputs.at(places).exp().max(1)
    return [[int(label), round(float(p), 4)] for p, label in zip(best.values, best.indices, strict=True)]


def class_tables(forget: Outputs, retain: Outputs) -> dict[str, list]:
    """Count which classes images are taken for.

    Returns:
        class_probability: mean probability of each class on the forget set, [C]. confusion: images by true class and
        predicted class, [C, C], for at most MOST_CLASSES classes. Either is left out where a logit is not finite,
        because the table would not account for every image.
    """
    count, mean = forget.num_classes, forget.mean_p
    tables = {"class_probability": mean.tolist()} if mean.isfinite().all() else {}
    true, said = torch.cat([forget.labels, retain.labels]), torch.cat([forget.predicted, retain.predicted])
    if count <= MOST_CLASSES and NO_ANSWER not in said:
        cells = torch.bincount(true * count + said, minlength=count * count)
        tables["confusion"] = cells.view(count, count).tolist()
    return tables


def many_classes(forget: Outputs, retain: Outputs) -> dict[str, list]:
    """Summarise by class what a confusion table would show, for datasets with too many classes for one.

    Returns:
        class_score: accuracy of each class in percent, [C]; None: no image of it. taken_for: how many forgotten images
        are predicted as each class, [C]; left out if one of them has no prediction.
    """
    count = forget.num_classes
    labels, right = torch.cat([forget.labels, retain.labels]), torch.cat([forget.right, retain.right])
    seen, hits = torch.bincount(labels, minlength=count), torch.bincount(labels[right], minlength=count)
    scores = [round(100 * h / n, 2) if n else None for h, n in zip(hits.tolist(), seen.tolist(), strict=True)]
    if NO_ANSWER in forget.predicted:
        return {"class_score": scores}
    return {"class_score": scores, "taken_for": torch.bincount(forget.predicted, minlength=count).tolist()}


def tables_of(forget: Outputs, retain: Outputs) -> dict[str, list | None]:
    """Make the tables of TABLES for a record: with a confusion table, or else with those of `many_classes`."""
    tables = class_tables(forget, retain) | {"said_of_samples": said_of_samples(forget)}
    return tables if "confusion" in tables else tables | many_classes(forget, retain)


def _binned(counts: Tensor) -> Tensor:
    """Sum [m, n] over equal blocks to at most [MAP_SIDE, MAP_SIDE]; the last blocks may be smaller."""
    for dim in (0, 1):
        place = torch.arange(counts.shape[dim]) // math.ceil(counts.shape[dim] / MAP_SIDE)
        shape = [int(place[-1]) + 1 if axis == dim else size for axis, size in enumerate(counts.shape)]
        counts = counts.new_zeros(shape).index_add_(dim, place, counts)
    return counts


def mask_map(mask: Mask) -> list[dict]:
    """Count the weights switched off in each block of each masked layer; with the layer's shape [m, n]."""
    layers = zip(mask.graph.names, mask.graph.split(~mask.keep), strict=True)
    return [
        {"layer": name, "shape": list(off.shape), "cells": _binned(off.cpu().int()).tolist()} for name, off in layers
    ]


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
