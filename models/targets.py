"""Which weights of a module a mask can be put on, in the order in which the forward pass uses them.

A weight of a mask is one entry of a matrix [m, n]: of a Linear layer the weight itself; of a Conv2d [m, n, kh, kw] the
matrix [m, n * kh * kw], row = output channel, column = input channel and tap. Biases stay as they are.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.choices import UserError
from models.prefix import NotResumable, Recording, first_use, record, users_of

AUTO = "auto"
ALL = "all"
DEEP = "deep"
CUT = "cut"
DEEP_SHARE = 0.9  # of all weights up to the head: the last stages that hold so many are `deep`
SAME = 1e-4  # of the logits' spread over images: what is left of it where nothing of the images gets through
NUMBERED = re.compile(r"(^|_)\d+$")
SHOWN = 5  # names that an error message lists


@dataclass(frozen=True)
class Target:
    """One weight that can be masked.

    Args:
        name: of the parameter, as `named_parameters` gives it.
        aliases: other names of the same tensor (tied weights).
        shape: [m, n], or [m, n / groups, kh, kw] of a convolution.
        order: place among all calls of the forward pass at which it is used first.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    order: int

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n) as a matrix, taps beside their input channel."""
        return self.shape[0], torch.Size(self.shape[1:]).numel()

    @property
    def inputs(self) -> int:
        """Input channels that a row has weights for."""
        return self.shape[1]

    @property
    def size(self) -> int:
        """Weights."""
        return torch.Size(self.shape).numel()


def _is_maskable(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the weight of a linear map or of a convolution over images."""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    return isinstance(module, kinds) and name.endswith("weight") and parameter.dim() in (2, 4)


def find_targets(model: nn.Module, images: Tensor) -> list[Target]:
    """Every weight that can be masked, in the order of the forward pass; one that is never used is left out.

    Args:
        model: in eval mode.
        images: one or more, [B, C, H, W].
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    with torch.no_grad():
        recording = record(model, images[:1])
    found: dict[int, Target] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in found or not _is_maskable(module, name, parameter):
                continue
            own = f"{prefix}.{name}" if prefix else name
            order = _order(model, recording, own)
            if order is not None:
                aliases = tuple(other for other in names[id(parameter)] if other != own)
                found[id(parameter)] = Target(own, aliases, tuple(parameter.shape), order)
    return sorted(found.values(), key=lambda target: target.order)


def _order(model: nn.Module, recording: Recording, name: str) -> int | None:
    if not recording.started:  # the model is one layer, and has no module inside
        return 0
    try:
        return recording.started.index(first_use(recording, users_of(model, [name])))
    except NotResumable:
        return None


def head_of(targets: Sequence[Target], outputs: int) -> Target:
    """The weight that gives the logits: the last one with as many rows as there are classes.

    Raises:
        UserError: there is none.
    """
    found = [target for target in targets if target.shape[0] == outputs]
    if not found:
        raise UserError(f"no Linear or Conv2d weight of this model has {outputs} rows, one for each output: it cannot "
                        "be told which one gives the logits; name the weights to mask with --layer")  # fmt: skip
    return found[-1]


def stage_of(name: str) -> str:
    """Name of the stage that a parameter belongs to: the first numbered module on its path (an item of a stack of
    blocks, `3` or `block_3`), or where none is numbered the first module.
    """
    path = name.split(".")[:-1]
    numbered = next((place for place, part in enumerate(path) if NUMBERED.search(part)), 0)
    return ".".join(path[: numbered + 1])


def _deep(targets: Sequence[Target], head: Target) -> tuple[Target, ...]:
    """The weights of the last stages that hold DEEP_SHARE of all, the head's among them."""
    used = [target for target in targets if target.order <= head.order]
    needed, held, chosen = DEEP_SHARE * sum(target.size for target in used), 0, set[str]()
    for target in reversed(used):
        stage = stage_of(target.name)
        if held >= needed and stage not in chosen:
            break
        chosen.add(stage)
        held += target.size
    return tuple(target for target in used if stage_of(target.name) in chosen)


def tells_nothing(model: nn.Module, logits: Callable[[Any], Tensor], images: Tensor) -> Callable[[Sequence[str]], bool]:
    """Tell whether a model answers all images alike once some of its weights, by name, are zero; it is left as it is.

    The images are noise of the given ones' shape: a property of the model alone is asked for.
    """

    def spread(names: Sequence[str]) -> float:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        zeros = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
        with torch.no_grad():
            said = logits(functional_call(model, zeros, (noise,))).float()
        return float((said - said.mean(0)).norm())

    return lambda names: spread(names) <= SAME * spread(())


def _cut(targets: Sequence[Target], closes: Callable[[Sequence[str]], bool]) -> tuple[Target, ...]:
    """The weights of the last stages that nothing of an image goes around."""
    chosen: list[Target] = []
    for stage in dict.fromkeys(stage_of(target.name) for target in reversed(targets)):
        chosen += [target for target in targets if stage_of(target.name) == stage]
        if closes([target.name for target in chosen]):
            break
    return tuple(sorted(chosen, key=lambda target: target.order))


def choose(
    targets: Sequence[Target], layers: Sequence[str], outputs: int, closes: Callable[[Sequence[str]], bool]
) -> tuple[Target, ...]:
    """The weights that the user means, in the order of the forward pass.

    Args:
        targets: all there are.
        layers: parameter or module names; `auto`, the last weight before the head; `cut`, those of the last stages
            that nothing of an image goes around; `all`, every one before the head; `deep`, those of the last stages
            that hold nine tenths of all, with the head.
        outputs: number of logits.
        closes: whether nothing of an image reaches the logits once these weights are zero (`tells_nothing`).

    Raises:
        UserError: there is no such weight, or it is named twice.
    """
    if not targets:
        raise UserError("this model has no Linear or Conv2d weight that its forward pass uses: there is none to mask")
    if tuple(layers) == (DEEP,):
        return _deep(targets, head_of(targets, outputs))
    if tuple(layers) in ((AUTO,), (ALL,), (CUT,)):
        head = head_of(targets, outputs)
        before = [target for target in targets if target.order < head.order]
        if not before:
            raise UserError(f"{head.name} is the only weight of this model: name it with --layer {head.name}")
        if layers[0] == CUT:
            return _cut(before, closes)
        return tuple(before) if layers[0] == ALL else (before[-1],)
    chosen = [_named(targets, layer) for layer in layers]
    if len({target.name for target in chosen}) < len(chosen):
        raise UserError(f"--layer names a weight twice ({', '.join(layers)}): name each once")
    return tuple(sorted(chosen, key=lambda target: target.order))


def _named(targets: Sequence[Target], layer: str) -> Target:
    for target in targets:
        if layer in {spelling for name in (target.name, *target.aliases) for spelling in _spellings(name)}:
            return target
    near = sorted(targets, key=lambda target: -_common(layer, target.name))[:SHOWN]
    names = ", ".join(target.name for target in near)
    raise UserError(
        f"the model has no Linear or Conv2d weight {layer!r}: choose one that `inspect` lists, e.g. {names}"
    )


def _spellings(name: str) -> tuple[str, ...]:
    """A parameter's name, and that of its module where the parameter is its weight."""
    return (name, name.removesuffix(".weight")) if name.endswith(".weight") else (name,)


def _common(a: str, b: str) -> int:
    """Letters that two names share, from the front and from the back."""
    front = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    back = next((at for at, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    return front + back
