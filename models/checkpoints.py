"""Reading networks from files: this project's own, and checkpoints that a user brings.

Two containers are read: safetensors, and what `torch.save` makes of a state dict. Nothing in a file is ever run.
"""

import json
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from core.artifacts import DIGEST, DamagedError, tensors_digest, told
from core.config import UserError
from core.observe import log

CONTAINERS = ("state_dict", "model_state_dict", "model")  # where training scripts keep a state dict
WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel and torch.compile add
SHOWN = 3
HOW = "save its weights alone: torch.save(model.state_dict(), 'state.pt')"
DAMAGED = (
    *(UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError, AttributeError),
    *(AssertionError, ArithmeticError, StructError, zipfile.BadZipFile),
)  # what torch.load raises on bytes that it did not write


@dataclass(frozen=True)
class Stored:
    """What a file holds: tensors by name, and what this project writes beside them (elsewhere: nothing)."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict = field(default_factory=dict)
    digest: str | None = None

    def rows_of(self, name: str) -> int | None:
        """Rows of the matrix of this name, whatever a wrapper put before it; None if there is none."""
        found = [tensor for key, tensor in self.tensors.items() if f".{key}".endswith(f".{name}") and tensor.dim() == 2]
        return found[0].shape[0] if len(found) == 1 else None


def read_checkpoint(path: Path) -> Stored:
    """The tensors of a file.

    Raises:
        UserError: there is no such file, it is of no known kind, damaged, or holds more than tensors.
    """
    with told(path, "read"), path.open("rb") as file:
        start = file.read(2)
    if start.startswith(b"PK"):
        return Stored(path, _pickled(path, zipped=True))
    if start.startswith(b"\x80") and not _has_header(path):
        return Stored(path, _pickled(path, zipped=False))
    return _safetensors(path)


def _has_header(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON. Their first byte may be any."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors(path: Path) -> Stored:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        what = f"neither a whole safetensors file nor one of torch.save: {_short(error)}"
        raise DamagedError(path, what) from None
    if not isinstance(facts, dict):
        raise DamagedError(path, f"its facts are a JSON {type(facts).__name__}, not an object")
    digest = facts.pop(DIGEST, None)
    return Stored(path, tensors, facts, digest)


def _pickled(path: Path, zipped: bool) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`. `weights_only` builds tensors and plain containers, nothing else."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise UserError(f"{path} is a TorchScript program, which holds code: {HOW}")
        with warnings.catch_warnings():  # what the library wonders about, this module checks and says
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        if isinstance(error, UnpicklingError) and (name := _code(str(error))):
            raise UserError(f"{path} is a pickled model, which needs code to be read ({name}): {HOW}") from None
        raise UserError(f"{path} is no whole file of torch.save ({_short(error)}): save it anew") from None
    return _unwrapped(value, path)


def _code(message: str) -> str | None:
    """The class or function that a pickle asks for, from torch's refusal."""
    words = message.replace("`", " ").split()
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if word in ("GLOBAL", "class", "function")), None)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _unwrapped(value: object, path: Path) -> dict[str, Tensor]:
    """The one state dict in what was saved.

    Raises:
        UserError: there is none, or there are several.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}, no state dict: {HOW}")
    found = {str(name): part for name, part in value.items() if _is_state(part)}
    for name in CONTAINERS:  # {"model": {"state_dict": ...}}
        if name not in found and isinstance(inner := value.get(name), Mapping):
            found |= {f"{name}.{key}": part for key, part in inner.items() if _is_state(part)}
    if len(found) > 1:
        names = ", ".join(sorted(found))
        raise UserError(f"{path} holds several models ({names}): save the one that is meant, by itself")
    state = next(iter(found.values()), value)
    if found:
        _say(f"{path}: taking its {next(iter(found))!r}")
    tensors = {str(name): part for name, part in state.items() if isinstance(part, Tensor)}
    if not tensors:
        names = ", ".join(repr(str(name)) for name in list(value)[:SHOWN]) or "nothing"
        raise UserError(f"{path} holds no tensors but {names}: {HOW}")
    return tensors


@lru_cache
def _say(line: str) -> None:
    """Log a line, once: a file is read when it is checked and when it is used."""
    log(line)


# --- into a module ----------------------------------------------------------------------------------------


FITTING = "give a checkpoint of this model and dataset"


def load_state(model: nn.Module, stored: Stored) -> None:
    """Fill a module, in float32.

    Raises:
        UserError: names, shapes or kinds of numbers differ, a number is not finite, or the file is damaged.
    """
    path, needed = stored.path, model.state_dict()
    given = _renamed(stored.tensors, needed)
    _check_names(given, needed, path)
    wrong = [name for name, value in needed.items() if _shape(given[name], value) != value.shape]
    if wrong:
        shown = [f"{name} {list(given[name].shape)}, needed {list(needed[name].shape)}" for name in wrong[:SHOWN]]
        raise UserError(f"{path} has {len(wrong)} tensors of other shapes ({'; '.join(shown)}): {FITTING}")
    ready = {name: _as_needed(name, given[name], value.dtype, path) for name, value in needed.items()}
    _check_finite(ready, path)
    if other := sorted({_kind(given[name]) for name, value in needed.items() if given[name].dtype != value.dtype}):
        _say(f"{path} holds {', '.join(other)}: converted to float32")
    elif stored.digest:
        arrays = {name: value.numpy() for name, value in given.items()}
        if stored.digest != tensors_digest(arrays, stored.facts):
            raise DamagedError(path, "its content is not what its digest says")
    model.load_state_dict({name: value.view_as(needed[name]) for name, value in ready.items()})


def _shape(given: Tensor, needed: Tensor) -> torch.Size:
    """A tensor's shape; that of a single number (BatchNorm's count) may be written as [] or [1]."""
    return needed.shape if given.numel() == needed.numel() == 1 else given.shape


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _renamed(tensors: Mapping[str, Tensor], needed: Iterable[str]) -> dict[str, Tensor]:
    """The tensors without what wrappers put into their names: `module.`, `_orig_mod.`, a name that all share."""
    wanted = list(needed)
    inside = {part for name in wanted for part in name.split(".")}
    strange = [part for part in WRAPPERS if part not in inside]
    names = {old: ".".join(part for part in old.split(".") if part not in strange) for old in tensors}
    while names and not set(names.values()) & set(wanted):
        first = {new.partition(".")[0] for new in names.values()}
        if len(first) > 1 or not all("." in new for new in names.values()):
            break
        names = {old: new.partition(".")[2] for old, new in names.items()}
    if len(set(names.values())) < len(names):  # two tensors would become one
        return dict(tensors)
    return {new: tensors[old] for old, new in names.items()}


def _check_names(given: Iterable[str], needed: Iterable[str], path: Path) -> None:
    missing, strange = sorted(set(needed) - set(given)), sorted(set(given) - set(needed))
    if missing or strange:
        counted = [
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for names, what in ((missing, "missing"), (strange, "unexpected"))
            if names
        ]
        raise UserError(f"{path} does not fit the model: {' and '.join(counted)} tensors; {FITTING}")


def _as_needed(name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """A tensor as the numbers that the model computes with."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain or tensor.is_complex() or tensor.is_floating_point() != dtype.is_floating_point:
        what = "no values" if tensor.is_meta else _kind(tensor) if plain else f"{_kind(tensor)} ({tensor.layout})"
        raise UserError(f"{path} holds {what} in {name}: give the model with plain float32 weights")
    try:
        return tensor.detach().to(dtype)
    except RuntimeError as error:
        raise UserError(f"{path} holds {_kind(tensor)} in {name} ({_short(error)}): save it as float32") from None


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    bad = [name for name, count in counts.items() if count]
    if bad:
        more = f" and {sum(counts.values()) - counts[bad[0]]:,} in {len(bad) - 1} others" if len(bad) > 1 else ""
        what = f"{path} holds {counts[bad[0]]:,} values that are not finite in {bad[0]}{more}"
        raise UserError(f"{what}: the file is damaged, or its training diverged; give another one")
