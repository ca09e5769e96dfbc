"""By what a parent is known: its bits and their hashes, and the check that a model is the parent."""

import ctypes
import difflib
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mimu.config import Parent, Target
from mimu.errors import MaskError, ParentWarning

WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
CASTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 3
Grade = Literal["parent", "targets", "cast", "names"]


# --- names ------------------------------------------------------------------------------------------------


def _wrapped(module: nn.Module) -> str | None:
    """Name the child that a wrapper of torch wraps; None: the module is none."""
    return WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return what is inside DataParallel, DistributedDataParallel and compiled modules."""
    while child := _wrapped(model):
        model = model._modules[child]  # ty: ignore[invalid-assignment]
    return model


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    """Return a module's child; None if it has none of this name. (TorchScript's table of children has no `get`.)"""
    return None if module is None else dict(module._modules.items()).get(name)


def plain_name(model: nn.Module, name: str) -> str:
    """Return a parameter's name without the parts that wrappers put in, at whatever depth they stand."""
    parts = name.split(".")
    if not set(WRAPPERS.values()) & set(parts):
        return name
    module, kept = model, []
    for part in parts:
        if module is None or _wrapped(module) != part:
            kept.append(part)
        module = _child(module, part)
    return ".".join(kept)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by plain name, tied ones under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {plain_name(model, name): parameter for name, parameter in named}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by plain name."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    plain = {name: value.detach() if is_plain(value) else value for name, value in state.items()}
    return {plain_name(model, name): value for name, value in plain.items()}


# --- hashes -----------------------------------------------------------------------------------------------


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Feed a tensor's bytes, in C order. Read by address: numpy is no dependency, and knows no bfloat16."""
    if not is_plain(tensor):
        raise MaskError(f"a tensor is {_kind(tensor)}, whose bytes cannot be read: give the float model, loaded")
    plain = tensor.detach().cpu().contiguous()
    if size := plain.numel() * plain.element_size():
        digest.update((ctypes.c_char * size).from_address(plain.data_ptr()))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in memory as they are: not packed, not sharded, not sparse, not without values."""
    plain = type(tensor) in (Tensor, nn.Parameter)  # a subclass may keep its values elsewhere, and have no address
    return plain and not (tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided)


def _kind(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_meta:
        return "on the meta device"
    return "quantised" if tensor.is_quantized else f"stored as {tensor.layout}".replace("torch.", "")


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's raw bytes in C order, whatever its device and strides."""
    digest = hashlib.sha256()
    _update(digest, tensor)
    return digest.hexdigest()


def sha256_of_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}\n".encode())
        _update(digest, state[name])
    return digest.hexdigest()


def state_sha256(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, names and shapes included.

    It is the same on every device, in channels_last, and inside DataParallel or a compiled module.
    """
    return sha256_of_state(state_of(model))


# --- bits ----------------------------------------------------------------------------------------------------

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(value: Tensor) -> Tensor:
    """View a tensor's bits as integers, so that -0.0 differs from 0.0 and every NaN stays the one it was."""
    return value.detach().view(INTEGERS[value.element_size()])


def _at(value: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """Return indices for flat C-order places: `.view(-1)` fails on channels_last, and flattening would copy."""
    return torch.unravel_index(places.to(value.device), value.shape)


def read_bits(value: Tensor, places: Tensor) -> Tensor:
    """Copy the bits at flat C-order places. [k] -> [k] integers."""
    return bits_of(value)[_at(value, places)].clone()


def write_bits(value: Tensor, places: Tensor, bits: Tensor | int) -> None:
    """Set the bits at flat C-order places; a tensor made under inference_mode is written in that mode."""
    # Outside inference_mode torch refuses to write such a tensor; inside it, an ordinary one stays ordinary.
    mode = torch.inference_mode() if value.is_inference() else torch.no_grad()
    new = bits.to(value.device) if isinstance(bits, Tensor) else bits
    with mode:
        bits_of(value)[_at(value, places)] = new


@dataclass(frozen=True)
class Edit:
    """New bits at flat C-order places of one tensor. places [k] int64, bits [k] integers as `bits_of` gives."""

    places: Tensor
    bits: Tensor


def edit_of(name: str, flat: Tensor, new: Tensor | None, dtype: torch.dtype) -> Edit:
    """Say which bits a mask puts into a tensor that may have another dtype than the parent.

    Args:
        flat: positions [k]. new: values [k] in the parent's dtype; None: zeros.

    Raises:
        MaskError: a value is too large for the dtype.
    """
    places = flat.to(torch.int64)
    if new is None:
        return Edit(places, torch.zeros(len(places), dtype=INTEGERS[dtype.itemsize]))
    cast = new.to(dtype)
    if large := int((~cast.double().isfinite()).sum()):
        what = f"{large:,} of the mask's values in {name} are too large for {_short(dtype)}"
        raise MaskError(f"{what}: use the model in the parent's dtype, {_short(new.dtype)}")
    return Edit(places, bits_of(cast))


def join(name: str, edits: Sequence[Edit], advice: str) -> Edit:
    """Make one edit of several edits of one tensor, which agree wherever they meet; its places are sorted.

    Raises:
        MaskError: they put different bits in the same places.
    """
    places, index = torch.cat([edit.places for edit in edits]).unique(return_inverse=True)
    bits = torch.cat([edit.bits.cpu() for edit in edits])
    joined = bits.new_zeros(len(places))
    joined[index] = bits  # where two edits meet, either may win; the next line finds it if the other differs
    if count := len(index[joined[index] != bits].unique()):
        raise MaskError(f"{count:,} weights of {name} would have to hold two different values: {advice}")
    return Edit(places, joined)


def checksum(value: Tensor) -> int:
    """Sum of all bits as integers, which may wrap around: the same for every layout, and it costs one fast pass."""
    dtype = torch.int64 if value.element_size() == 8 else torch.int32
    return int(bits_of(value).sum(dtype=dtype))


# --- describing a parent ----------------------------------------------------------------------------------


@lru_cache
def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(name: str, state: Mapping[str, Tensor], on_disk: Mapping[str, str]) -> Target:
    value = state[name]
    if not (value.dtype.is_floating_point and is_plain(value)):
        raise MaskError(f"{name} holds {_short(value.dtype)}, no floating-point weights: mask the float parent")
    others = (other for other, item in state.items() if other != name and item.shape == value.shape)
    aliases = tuple(other for other in others if state[other].data_ptr() == value.data_ptr() and value.numel())
    casts = {_short(dtype): sha256_of(value.to(dtype)) for dtype in CASTS if dtype != value.dtype}
    shape, dtype = tuple(value.shape), _short(value.dtype)
    return Target(shape, dtype, sha256_of(value), on_disk.get(name), aliases, casts)


def describe_parent(
    model: nn.Module | Mapping[str, Tensor],
    targets: Iterable[str],
    load: str | None = None,
    names_on_disk: Mapping[str, str] | None = None,
    framework: str | None = None,
) -> Parent:
    """Describe the model that a mask is made for.

    Args:
        model: unmasked, or its state dict. targets: names of the parameters that are masked.
        load: how the model is loaded, for people and for commands (such as "torchvision:resnet18@mine.pt").
        names_on_disk: of targets whose name in the parent's file differs from the name in memory.
        framework: name and version of the library that the model is from; torch's own if None.

    Raises:
        MaskError: there is no such parameter, its values are not floating-point, or they are computed anew from others
            before every forward pass; or some layer is quantised.
    """
    names = list(targets)
    if isinstance(model, nn.Module):
        names = [plain_name(model, name) for name in names]
        refuse_recomputed(model, names)
        state = state_of(model)
    else:
        state = dict(model)
    for name in names:
        if name not in state:
            near = difflib.get_close_matches(name, state, SHOWN, 0) or ["none"]
            raise MaskError(f"the model has no parameter {name}: choose one of its own, such as {', '.join(near)}")
    described = {name: _described(name, state, names_on_disk or {}) for name in names}
    digest = sha256_of_state(state)
    if isinstance(model, nn.Module):
        refuse_quantised(model)
    return Parent(described, digest, framework or f"torch {torch.__version__}", load)


# --- what cannot be masked --------------------------------------------------------------------------------

RECOMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
INSTEAD = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "ParametrizationList": "torch.nn.utils.parametrize.remove_parametrizations",
}


def _recomputes(model: nn.Module, name: str) -> str | None:
    """Name the class that computes a parameter anew from others before each use, so that a mask would be undone."""
    module, last = model, ""
    for part in name.split("."):
        if isinstance(module, ParametrizationList) or part in getattr(module, "parametrizations", {}):
            return "ParametrizationList"
        last, child = part, _child(module, part)
        if child is None:
            break
        module = child
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, RECOMPUTING))
    for hook in hooks:
        tensor = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "")
        if last == tensor or last in {f"{tensor}_{end}" for end in ("g", "v", "orig", "u")}:
            return type(hook).__name__
    return None


def refuse_recomputed(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse parameters that are computed anew from others before each forward pass: a mask on them would be undone.

    Args:
        names: plain names. model: unwrapped or not.

    Raises:
        MaskError: weight_norm, spectral_norm, a parametrization or torch's pruning computes one of them.
    """
    root = unwrap(model)
    for name in names:
        if kind := _recomputes(root, name):
            how = INSTEAD.get(kind, "torch.nn.utils.prune.remove")
            what = f"{name} is computed anew before each forward pass ({kind}), which would undo a mask"
            raise MaskError(f"{what}: fold it into the weight first with {how}, and describe that parent")


def refuse_quantised(model: nn.Module) -> None:
    """Refuse a model of which some layer is quantised.

    Raises:
        MaskError: it is.
    """
    modules = (module for module in model.modules() if "quantized" in type(module).__module__)
    foreign = (p for p in model.parameters() if not is_plain(p) or not p.dtype.is_floating_point)
    if next(modules, None) is not None or next(foreign, None) is not None:
        raise MaskError("the model is quantised: mask the float parent, seal it, and quantise that")


# --- the check --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How well a model fits a mask.

    Args:
        grade: "parent": the very parent; "targets": the masked parameters are the parent's, others differ; "cast": they
            are the parent's after a change of dtype; "names": only names and shapes agree.
        names: parameter as the mask names it -> as this model does (plain names).
        note: one sentence where the grade is not "parent", else "".
    """

    grade: Grade
    names: dict[str, str]
    note: str = ""


def _rounded(value: Tensor, target: Target) -> bool:
    """Whether a tensor of the parent's own dtype holds the parent's values rounded to a shorter one."""
    for dtype in CASTS:
        promised = target.casts.get(_short(dtype))
        if promised and dtype.itemsize < value.element_size():
            short = value.to(dtype)
            if torch.equal(short.to(value.dtype), value) and sha256_of(short) == promised:
                return True
    return False


def _equal(value: Tensor, target: Target, cast: bool) -> bool:
    if _short(value.dtype) == target.dtype:
        return sha256_of(value) == target.sha256 or (cast and _rounded(value, target))
    if not cast:
        return False
    promised = target.casts.get(_short(value.dtype))
    return promised is not None and sha256_of(value) == promised


def find(name: str, target: Target, values: Mapping[str, Tensor], cast: bool = False) -> str | None:
    """Find the parameter of a model that holds a target's bytes: under its own name, else under any other.

    Args:
        values: parameters by plain name, tied ones under each name. cast: compare after a change of dtype.

    Raises:
        MaskError: several parameters hold the bytes, and none has the name.
    """
    others = {key: value for key, value in values.items() if tuple(value.shape) == target.shape}
    for own in (name, *target.aliases, target.name_on_disk or name):
        if own in others and _equal(others[own], target, cast):
            return own
    equal = {value.data_ptr(): key for key, value in others.items() if _equal(value, target, cast)}
    if len(equal) > 1:
        raise MaskError(f"{len(equal)} parameters hold the values of {name} ({', '.join(equal.values())}): rename one")
    return next(iter(equal.values()), None)


def _nearest(name: str, target: Target, values: Mapping[str, Tensor]) -> str:
    shapes = {key: "x".join(map(str, value.shape)) for key, value in values.items()}
    same = [key for key, value in values.items() if tuple(value.shape) == target.shape]
    near = difflib.get_close_matches(name, same or list(values), SHOWN, 0) or ["none"]
    return ", ".join(f"{key} [{shapes[key]}]" if key in shapes else key for key in near)


def check_parent(parent: Parent, values: Mapping[str, Tensor], state: Mapping[str, Tensor], any_parent: bool) -> Fit:
    """See that a model is the parent of a mask; look parameters up by content first, by name second.

    Args:
        values: the model's unmasked parameters by plain name, tied ones under each name.
        state: all of its parameters and buffers, unmasked. any_parent: accept equal names and shapes.

    Raises:
        MaskError: the model is another one.
    """
    for grade, cast in (("targets", False), ("cast", True)):
        found = {name: find(name, target, values, cast) for name, target in parent.targets.items()}
        names = {name: key for name, key in found.items() if key is not None}
        if len(names) < len(found):
            continue
        if cast:
            return Fit("cast", names, "the masked parameters are the parent's after a change of their dtype")
        if sha256_of_state(state) == parent.state_sha256:
            return Fit("parent", names)
        moved = [f"{old} is {new}" for old, new in names.items() if old != new]
        more = f" and names moved ({', '.join(moved)})" if moved else ""
        return Fit(grade, names, f"the masked parameters are the parent's, others differ{more}: measure again")
    wrong = [n for n, t in parent.targets.items() if n not in values or tuple(values[n].shape) != t.shape]
    if wrong:
        near = _nearest(wrong[0], parent.targets[wrong[0]], values)
        shape = "x".join(map(str, parent.targets[wrong[0]].shape))
        raise MaskError(f"no parameter holds the parent's {wrong[0]} [{shape}]: load the parent; nearest here: {near}")
    note = "names and shapes are the parent's, the values are others: the positions mean nothing there"
    if not any_parent:
        how = f"load the parent ({parent.load or parent.state_sha256[:12]}), or say any_parent=True"
        raise MaskError(f"the model is not the mask's parent, only {note.replace(': the', ', so the')}: {how}")
    return Fit("names", {name: name for name in parent.targets}, note)


def check_model(
    model: nn.Module, parent: Parent, values: Mapping[str, Tensor], state: Mapping[str, Tensor], any_parent: bool
) -> Fit:
    """Do as `check_parent` for a module, and refuse what a mask cannot hold in.

    Raises:
        MaskError: as `check_parent` and `refuse_recomputed`, or the model is quantised.
    """
    refuse_recomputed(model, parent.targets)
    floats = {key: value for key, value in values.items() if value.dtype.is_floating_point and is_plain(value)}
    try:
        fit = check_parent(parent, floats, state, any_parent)
    except MaskError:
        refuse_quantised(model)
        raise
    refuse_recomputed(model, fit.names.values())
    return fit


def tell(model: nn.Module, fit: Fit, level: int = 4) -> None:
    """Warn of a parent that is not the very one, and of BatchNorm layers that still learn from what passes."""
    if fit.grade in ("targets", "names"):
        warnings.warn(fit.note, ParentWarning, stacklevel=level)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    learning = [norm for norm in norms if norm.track_running_stats]
    if learning:
        what = f"{len(learning)} BatchNorm layers are in train mode and change with every batch"
        warnings.warn(f"{what}: call model.eval() before images pass", ParentWarning, stacklevel=level)
