"""Three well separated classes of 4x4 images, and classifiers that have learned some of them."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from measure.metrics import Choose, Evidence
from measure.probes import relearning
from model import HookedMLPClassifier, HookedModel

CLASSES, PER_CLASS = 3, 60


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CENTRES = 2.0 * noise(1, CLASSES, 1, 4, 4)
LABELS = torch.arange(CLASSES).repeat(PER_CLASS)
SETS = {  # split -> images of three well separated classes, in turn, and their labels
    split: (CENTRES[LABELS] + 0.3 * noise(seed, len(LABELS), 1, 4, 4), LABELS)
    for seed, split in ((2, "train"), (3, "val"), (4, "test"))
}


def images_of(forget_class: tuple[int, ...] = (0,)) -> Callable:
    def images(split: str, is_forget_set: bool, choose: Choose | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = SETS[split]
        mine = torch.isin(labels, torch.tensor(forget_class)) == is_forget_set
        pixels, labels = pixels[mine], labels[mine]
        if choose is None:
            return pixels, labels
        places = choose if isinstance(choose, torch.Tensor) else choose(labels)
        return pixels[places], labels[places]

    return images


def fresh(seed: int = 0, kind: type = HookedMLPClassifier) -> HookedModel:
    """A classifier with initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(CLASSES, 1, 4).eval()


def fitted(classes: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> HookedModel:
    """An MLP that has learned some of the classes."""
    pixels, labels = SETS["train"]
    mine = torch.isin(labels, torch.tensor(classes))
    *_, learned = itertools.islice(relearning(fresh(seed), pixels[mine], labels[mine], 0), 31)
    return learned


def beside(e: Evidence, model: HookedModel, **more) -> Evidence:
    """A model's evidence with e's model as the original and the same references."""
    return replace(e, model=model, original=replace(e, _values={}), _values={}, **more)
