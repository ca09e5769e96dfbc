"""Check that a method changed only what it may and restored the classifier, and measure the size of its edit."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

POSITION_BYTES = 4
COSTS = {
    "seconds": "s per request when the classifier's part is there: from the request to the edited model, with the time "
    "of every result that the method took from an earlier one in the run; of a retrained model, its whole training",
    "seconds_offline": "s once per classifier, whatever is asked of it: graphs, class statistics and other values that "
    "the method uses and no request changes, and the graph network's training; a network that was given counts "
    "nothing, because it serves many classifiers (none: unknown, because the graphs were given)",
    "seconds_alone": "s of one request to a classifier for which nothing was prepared: both together",
    "weights_changed": "parameters and buffer entries that differ from the untouched classifier's",
    "edit_bytes": "bytes that the edit needs beside the untouched classifier: for each changed tensor the places (4 "
    "bytes each, or a bit for every entry) and new values (none where all are 0), or all of its values",
}
"""What every record says of a method beside its metrics. Less is better."""


def identical(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bits."""
    return torch.equal(_bits(a), _bits(b))


def unchanged(model: nn.Module, original: Mapping[str, Tensor]) -> bool:
    """Return whether a model has the bits of a state dict; as comparing `state_sha256`, in a fraction of its time."""
    state = model.state_dict()
    return state.keys() == original.keys() and all(identical(value, original[name]) for name, value in state.items())


def changed_outside(model: nn.Module, original: Mapping[str, Tensor], allowed: Mapping[str, Tensor]) -> int:
    """Count the entries that differ from the original, bit by bit, outside the allowed ones.

    Args:
        original: the state dict before.
        allowed: bool tensors by name, True where an entry may differ; a name that is left out may not differ at all.
    """
    count = 0
    for name, value in model.state_dict().items():
        if identical(value, original[name]):
            continue
        differs = _bits(value) != _bits(original[name])
        if name in allowed:
            differs &= ~allowed[name].to(differs.device)
        count += int(differs.sum())
    return count


def extent(model: nn.Module, original: Mapping[str, Tensor], names: Iterable[str]) -> tuple[int, int]:
    """`weights_changed` and `edit_bytes` over the named tensors; -0 for 0 counts as no change."""
    state, weights, size = model.state_dict(), 0, 0
    for name in names:
        value, changed = state[name], state[name] != original[name]
        count = int(changed.sum())
        if count:
            places = min(POSITION_BYTES * count, -(-value.numel() // 8))
            values = count * value.element_size() if bool(value[changed].any()) else 0
            weights, size = weights + count, size + min(places + values, value.numel() * value.element_size())
    return weights, size


_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    """View a tensor's bits as integers, so that -0 differs from 0 and NaN equals itself."""
    return value.contiguous().view(_AS_INTEGERS[value.element_size()])
