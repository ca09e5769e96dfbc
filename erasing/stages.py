"""What each stage of a classifier reads.

A *stage* is a block of the network that holds target weights (`models.targets.stage_of`). The features are what every
stage but the first reads; what the first reads no mask changes.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.classifier import Classifier
from models.foreign import ForeignClassifier
from models.targets import DEEP, Target, stage_of

MANY = 2**20  # weights, from which on a step is dear
AT_ONCE = 1024  # rows that pass through the head together


class Stages:
    """A classifier from its first target weight on, with the features that its stages read.

    Args:
        model: its targets are the weights that may be switched off.
    """

    def __init__(self, model: ForeignClassifier):
        self.model = model
        first: dict[str, Target] = {}
        for target in model.targets:
            first.setdefault(stage_of(target.name), target)
        names = list(first)
        self.taps = {name: _as_vectors(first[name]) for name in names[1:]}
        """Stage -> what makes its input, [B, ...], one vector per image, [B, d]."""

    def __call__(self, h: Tensor, weights: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Features of every stage but the first, [B, d] each, and logits [B, classes], float32.

        Args:
            h: rows of `ForeignClassifier.prefix`, [B, numbers].
            weights: stand in for the targets', [m, n] each.
        """
        with self._listening() as heard:
            logits = self.model.head(h, None, weights)
        return [heard[name].float() for name in self.taps], logits.float()

    def logits(self, h: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [S, classes] of many rows, without a gradient; arguments as of a call."""
        with torch.no_grad():
            return torch.cat([self.model.head(part, None, weights).float() for part in h.split(AT_ONCE)])

    @contextmanager
    def _listening(self) -> Generator[dict[str, Tensor]]:
        heard: dict[str, Tensor] = {}

        def listen(name: str, vectors: Callable[[Tensor], Tensor]) -> Callable:
            def hook(_: nn.Module, inputs: tuple) -> None:
                heard[name] = vectors(inputs[0])

            return hook

        net, handles = self.model.net, []
        try:
            for name, vectors in self.taps.items():
                handles.append(net.get_submodule(name).register_forward_pre_hook(listen(name, vectors)))
            yield heard
        finally:
            for handle in handles:
                handle.remove()


def _as_vectors(target: Target) -> Callable[[Tensor], Tensor]:
    """The mean over positions of what a stage reads; its first weight tells on which side the channels are."""
    channels_first = len(target.shape) == 4

    def vectors(value: Tensor) -> Tensor:
        if value.dim() == 2:
            return value
        dims = range(2, value.dim()) if channels_first else range(1, value.dim() - 1)
        return value.mean(tuple(dims))

    return vectors


def deep(model: Classifier, images: Tensor, classes: int) -> ForeignClassifier:
    """A classifier of either kind with its `deep` layers as targets.

    Args:
        images: a few, [B, C, H, W]: the forward pass is looked at with them.
    """
    net, logits = (model.net, model.logits) if isinstance(model, ForeignClassifier) else (model, lambda said: said)
    return ForeignClassifier(net, logits, images, classes, (DEEP,))


def rows_of(model: ForeignClassifier, images: Sequence[Tensor]) -> Tensor:
    """`ForeignClassifier.prefix` of batches of images, [S, numbers]."""
    with torch.no_grad():
        return torch.cat([model.prefix(batch) for batch in images])
