"""What the pipeline needs of a classifier, whoever made it.

Two kinds exist: `model.HookedModel`, trained here, whose target layers are numbers, and `models.foreign`, any module,
whose targets are settled when it is wrapped. Both are asked in the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from graphs.layout import WeightGraph


class Classifier(nn.Module, ABC):
    """A classifier with target weights W [m, n]: a mask switches single entries of them off, and nothing else.

    `forward(images)` and `head(prefix(images))` give the same logits. A subclass that lacks a method cannot be made.
    """

    @abstractmethod
    def weight_graph(self, mask_layer: Any) -> WeightGraph:
        """Layout of the graph over the target weights, with their names in `named_parameters`."""

    @abstractmethod
    def weights(self, mask_layer: Any) -> list[nn.Parameter]:
        """The target weights, inputs first: [m, n], or of a convolution [m, n, kh, kw]."""

    @abstractmethod
    def prefix(self, images: Tensor, mask_layer: Any) -> Tensor:
        """What lies ahead of the first target weight, one row per image: no mask changes it. -> [B, numbers]."""

    @abstractmethod
    def head(self, h: Tensor, mask_layer: Any, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [B, classes] from `prefix`'s rows; `weights`, [m, n] for each target, stand in for theirs."""

    @abstractmethod
    def in_prefix(self, mask_layer: Any) -> Callable[[str], bool]:
        """Tell, by name, which parameters and buffers `prefix` depends on."""


def as_matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights as matrices: [m, n] as they are, [m, n, kh, kw] as [m, n * kh * kw]."""
    return [weight if weight.dim() == 2 else weight.reshape(len(weight), -1) for weight in weights]
