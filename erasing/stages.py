"""Which layers an edit of the features covers, and what each of their stages reads.

A *stage* is a block of the network that holds target weights: of a stack (`ModuleList`, `Sequential`) each item, else
the layer itself. The features are what every stage but the first reads, and what the first reads no mask changes.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.foreign import ForeignClassifier
from models.targets import Target, find_targets, head_of

SHARE = 0.9  # of all weights of Linear and Conv2d layers: the last stages that hold so many take part
STACKS = (nn.ModuleList, nn.Sequential)


def stage_of(module: nn.Module, parameter: str) -> str:
    """Name of the stage that a parameter belongs to: the first item of a stack on its path, else its own module."""
    path = parameter.split(".")[:-1]
    for depth in range(1, len(path)):
        if isinstance(module.get_submodule(".".join(path[:depth])), STACKS):
            return ".".join(path[: depth + 1])
    return ".".join(path)


def deep_layers(module: nn.Module, images: Tensor, outputs: int) -> tuple[str, ...]:
    """Names of the target weights of the last stages that hold SHARE of all weights, in the order of the forward pass.

    Args:
        module: in eval mode. images: one or more, [B, C, H, W]. outputs: number of logits.

    Raises:
        UserError: no weight gives the logits.
    """
    targets = find_targets(module, images)
    last = head_of(targets, outputs)
    used = [target for target in targets if target.order <= last.order]
    needed, held, chosen = SHARE * sum(target.size for target in used), 0, set[str]()
    for target in reversed(used):
        stage = stage_of(module, target.name)
        if held >= needed and stage not in chosen:
            break
        chosen.add(stage)
        held += target.size
    return tuple(target.name for target in used if stage_of(module, target.name) in chosen)


class Stages:
    """A classifier from its first target weight on, with the features that its stages read.

    Args:
        model: its targets are the weights that may be switched off.
    """

    def __init__(self, model: ForeignClassifier):
        self.model = model
        first: dict[str, Target] = {}
        for target in model.targets:
            first.setdefault(stage_of(model.net, target.name), target)
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


def rows_of(model: ForeignClassifier, images: Sequence[Tensor]) -> Tensor:
    """`ForeignClassifier.prefix` of batches of images, [S, numbers]."""
    with torch.no_grad():
        return torch.cat([model.prefix(batch) for batch in images])
