"""Whether a method kept to what it may change, and left the classifier as it found it."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def state_hash(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, names and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def changed_outside(model: nn.Module, original: Mapping[str, Tensor], allowed: Mapping[str, Tensor]) -> int:
    """How many entries differ from the original, bit by bit, outside the allowed ones.

    Args:
        original: a state dict. allowed: bool tensors by name; names left out may not change at all.
    """
    count = 0
    for name, value in model.state_dict().items():
        differs = _bits(value) != _bits(original[name])
        if name in allowed:
            differs &= ~allowed[name].to(differs.device)
        count += int(differs.sum())
    return count


_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    """A tensor's bits as integers, so that -0 differs from 0 and NaN equals itself."""
    return value.contiguous().view(_AS_INTEGERS[value.element_size()])
