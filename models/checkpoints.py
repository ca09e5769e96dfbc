"""Reading networks from files: this project's own, and checkpoints that a user brings.

Two containers are read: safetensors, and what `torch.save` makes of a state dict. Nothing in a file is ever run.
`read_checkpoint` gives the tensors by their names on disk; `matched` gives them by a module's names, all or none.
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from core.artifacts import DIGEST, DamagedError, read_json, tensors_digest, told
from core.config import UserError
from core.observe import log

CONTAINERS = ("state_dict", "model_state_dict", "model")  # where training scripts keep a state dict
WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel and torch.compile add
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)", re.IGNORECASE)  # names of averages over training
COUNTS = ("n_averaged", "num_batches_tracked")  # integers that no answer depends on
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder, in the order in which its library looks
SHOWN = 3
HOW = "save its weights alone: torch.save(model.state_dict(), 'state.pt')"
FLOAT_PARENT = "a mask needs the float model that it was made from: give the checkpoint of that one"
DAMAGED = (
    *(UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError, AttributeError),
    *(AssertionError, ArithmeticError, StructError, zipfile.BadZipFile),
)  # what torch.load raises on bytes that it did not write
Ema = Literal["ema", "plain"]


@dataclass(frozen=True)
class Stored:
    """What a file (or a folder of shards) holds: tensors by their names on disk, and where they stand.

    Args:
        facts, digest: what this project writes beside tensors; elsewhere nothing.
        container: where in the file the state dict is, e.g. "state_dict" or "model.state_dict"; "": the file is one.
        copies: further state dicts in the file, e.g. "state_dict_ema"; they are not read.
        places: name of a tensor -> the shard that holds it. Empty: all are in `path`.
        in_order: whether the tensors stand in the order in which their module named them.
        notes: what was chosen or left aside, one sentence each.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict = field(default_factory=dict)
    digest: str | None = None
    container: str = ""
    copies: tuple[str, ...] = ()
    places: Mapping[str, Path] = field(default_factory=dict)
    in_order: bool = False
    notes: tuple[str, ...] = ()

    def rows_of(self, name: str) -> int | None:
        """Rows of the matrix of this name, whatever a wrapper put before it; None if there is none."""
        found = [tensor for key, tensor in self.tensors.items() if f".{key}".endswith(f".{name}") and tensor.dim() == 2]
        return found[0].shape[0] if len(found) == 1 else None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted(set(self.places.values()))) or (self.path,)


def read_checkpoint(path: Path, ema: Ema | None = None) -> Stored:
    """The tensors of a file.

    Args:
        ema: which to take of a file that holds weights and their average over training: the average, or the plain.

    Raises:
        UserError: there is no such file, it is of no known kind, damaged, holds more than tensors, or several models
            of which `ema` chooses none.
    """
    with told(path, "read"), path.open("rb") as file:
        start = file.read(2)
    zipped = start.startswith(b"PK")
    if zipped or (start.startswith(b"\x80") and not _has_header(path)):
        return _unwrapped(_pickled(path, zipped), path, ema)
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an ONNX graph, whose weights have lost their names: give the model it was made of")
    return _safetensors(path)


def read_folder(folder: Path, ema: Ema | None = None) -> Stored:
    """The tensors of a folder that `save_pretrained` or timm wrote: one file, or shards with an index.

    Raises:
        UserError: it holds neither, a shard is missing or outside the folder, or as `read_checkpoint`.
    """
    for name in WHOLE_FILES:
        if (folder / name).is_file():
            return read_checkpoint(folder / name, ema)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise UserError(f"{folder} holds none of {', '.join(WHOLE_FILES)}: give a folder that save_pretrained wrote")


def _shards(index: Path) -> Stored:
    """All shards that an index names.

    Raises:
        UserError: the index is none, a shard lacks a tensor, or is not beside the index.
    """
    listed = read_json(index, foreign=True).get("weight_map")
    if not isinstance(listed, dict) or not all(Path(str(name)).name == name for name in listed.values()):
        raise DamagedError(index, "its weight_map does not name files beside it")
    parts = {name: read_checkpoint(index.parent / name) for name in sorted(set(listed.values()))}
    if lacking := [name for name, file in listed.items() if name not in parts[file].tensors]:
        raise DamagedError(index, f"{len(lacking)} tensors are not in their shards ({', '.join(lacking[:SHOWN])})")
    tensors = {name: parts[file].tensors[name] for name, file in listed.items()}
    places = {name: index.parent / file for name, file in listed.items()}
    return Stored(index, tensors, places=places, notes=(f"{index.parent}: read from {len(parts)} shards",))


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
        raise DamagedError(path, f"neither a whole safetensors file nor one of torch.save: {_short(error)}") from None
    if not isinstance(facts, dict):
        raise DamagedError(path, f"its facts are a JSON {type(facts).__name__}, not an object")
    return Stored(path, tensors, facts, facts.pop(DIGEST, None))


def _pickled(path: Path, zipped: bool) -> object:
    """What a file of `torch.save` holds. `weights_only` builds tensors and plain containers, nothing else.

    Of code it allows `argparse.Namespace` alone, which training scripts keep beside weights: its unpickling sets
    attributes and calls nothing.
    """
    try:
        if zipped:
            _refuse_programs(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what the library wonders about, this module checks and says
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except DAMAGED as error:
        if not isinstance(error, UnpicklingError) or not (name := _code(str(error))):
            raise UserError(f"{path} is no whole file of torch.save ({_short(error)}): save it anew") from None
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipped else []  # read, never run
        names = ", ".join(sorted({name, *asked} - {"argparse.Namespace"}))
        raise UserError(f"{path} is a pickled model, which needs code to be read ({names}): {HOW}") from None


def _refuse_programs(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for mark, what in (("constants.pkl", "TorchScript"), ("archive_format", "torch.export")):
        if any(name.endswith(f"/{mark}") for name in names):
            raise UserError(f"{path} is a {what} program, which holds code: {HOW}")


def _code(message: str) -> str | None:
    """The class or function that a pickle asks for, from torch's refusal."""
    words = message.replace("`", " ").split()
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if word in ("GLOBAL", "class", "function")), None)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- the state dict in what was saved ---------------------------------------------------------------------


def _is_state(value: object) -> bool:
    """Whether it is a table of tensors; some scripts leave an entry at None."""
    items = list(value.values()) if isinstance(value, Mapping) else []
    return any(isinstance(one, Tensor) for one in items) and all(isinstance(one, Tensor | None) for one in items)


def _unwrapped(value: object, path: Path, ema: Ema | None) -> Stored:
    """The one state dict in what was saved.

    Raises:
        UserError: there is none, it is quantised, or there are several of which none is chosen.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}, no state dict: {HOW}")
    found = {str(name): part for name, part in value.items() if _is_state(part)}
    for name in CONTAINERS:  # {"model": {"state_dict": ...}}
        if name not in found and isinstance(inner := value.get(name), Mapping):
            found |= {f"{name}.{key}": part for key, part in inner.items() if _is_state(part)}
    container = _chosen(list(found), ema, path) if found else ""
    state = found.get(container, value)
    _refuse_quantised(state, path)
    tensors = {str(name): part for name, part in state.items() if isinstance(part, Tensor)}
    if not tensors:
        names = ", ".join(repr(str(name)) for name in list(value)[:SHOWN]) or "nothing"
        raise UserError(f"{path} holds no tensors but {names}: {HOW}")
    notes = (f"{path}: taking its {container!r}",) if found else ()
    aside = sorted((set(map(str, value)) - {container.partition(".")[0]} | set(map(str, state))) - set(tensors))
    notes += (f"{path}: left aside {', '.join(aside)}",) if aside else ()
    copies = tuple(name for name in found if name != container)
    return Stored(path, tensors, container=container, copies=copies, in_order=True, notes=notes)


def _chosen(names: list[str], ema: Ema | None, path: Path) -> str:
    """The one of several models in a file that `ema` chooses."""
    averaged = [name for name in names if AVERAGED.search(name)]
    fitting = averaged if ema == "ema" else [name for name in names if name not in averaged]
    if len(names) == 1 or (ema and len(fitting) == 1):
        return (fitting or names)[0]
    which = " (or say which with --ema: ema takes the average over training, plain the weights themselves)"
    said = ", ".join(sorted(name or "at its top" for name in names))
    needed = f"save the one that is meant, by itself{which if len(averaged) == 1 and len(names) == 2 else ''}"
    raise UserError(f"{path} holds several models ({said}): {needed}")


def _refuse_quantised(state: Mapping, path: Path) -> None:
    for name, part in state.items():
        if "_packed_params" in str(name) or (isinstance(part, Tensor) and part.is_quantized):
            raise UserError(f"{path} holds a quantised model ({name}): {FLOAT_PARENT}")


@lru_cache
def _say(line: str) -> None:
    """Log a line, once: a file is read when it is checked and when it is used."""
    log(line)


# --- names: a file's -> a module's ------------------------------------------------------------------------


FITTING = "give a checkpoint of this model and dataset"


PRUNED = "a mask of torch's prune"
PARTS = {  # of weights that stand as two tensors; {}{}: the name of their module, and their own
    "weight normalisation": ("{}{}_g", "{}{}_v"),
    "weight normalisation (parametrised)": ("{}parametrizations.{}.original0", "{}parametrizations.{}.original1"),
    PRUNED: ("{}{}_orig", "{}{}_mask"),
}


@dataclass(frozen=True)
class Matched:
    """A file's tensors by a module's names, every one of them.

    Args:
        tensors: name in memory -> values as they stand on disk (or folded from parts that do).
        disk_names: name in memory -> name on disk, of tensors that stand there as they are.
        notes: what was renamed, folded or left aside.
    """

    tensors: dict[str, Tensor]
    disk_names: dict[str, str]
    notes: tuple[str, ...] = ()


def matched(
    stored: Stored,
    needed: Mapping[str, Tensor],
    advice: str = FITTING,
    ema: Ema | None = None,
    by_order: bool = False,
    rename: Callable[[str], str] = str,
) -> Matched:
    """A file's tensors by the names of a module's state: a strict match once wrappers' parts of names are taken off.

    Args:
        needed: the module's state dict; its shapes count for `by_order` alone.
        advice: how the sentence of a refusal ends.
        ema: as for `read_checkpoint`, where the parts of a file's names tell the average from the plain weights.
        by_order: names may differ altogether; tensors are taken in their order if all shapes agree.
        rename: old names of a library -> its new ones.

    Raises:
        UserError: tensors are missing or unexpected; it counts them and names three of each.
    """
    names, notes = _renamed(stored, needed, ema, rename)
    folded, said = _folded({new: stored.tensors[old] for new, old in names.items()}, set(needed))
    disk_names = {new: old for new, old in names.items() if new in needed}
    for alias, name in _same_memory(needed, folded).items():
        folded[alias], disk_names[alias] = folded[name], disk_names[name]
    if all(name.endswith(COUNTS[1]) for name in set(needed) - set(folded)):  # torch before 0.4.1 kept no counts
        folded = {**needed, **folded}
    if by_order and set(folded) != set(needed):
        return _in_order(stored, needed)
    hint = "; all shapes agree in their order: by_order takes them so" if _agree(stored, needed) else ""
    _check_names(folded, needed, stored.path, advice + hint)
    _check_choice(stored, disk_names, ema)
    other = {name: old for name, old in disk_names.items() if name != old}
    if other:
        name, old = next(iter(other.items()))
        notes += (f"{len(other)} of {len(disk_names)} tensors have other names on disk, e.g. {old} for {name}",)
    return Matched({name: folded[name] for name in needed}, disk_names, (*stored.notes, *notes, *said))


def _check_choice(stored: Stored, disk_names: Mapping[str, str], ema: Ema | None) -> None:
    """Refuse weights that are no average where one is asked for, and the other way round."""
    before = {old.removesuffix(name) for name, old in disk_names.items()}
    averaged = any(AVERAGED.search(part) for part in (stored.container, *before))
    if ema is not None and averaged != (ema == "ema"):
        has = "an average over training alone" if averaged else "no average over training"
        raise UserError(f"{stored.path} holds {has}, and --ema {ema} asks for the other: leave it out")


def _renamed(
    stored: Stored, needed: Iterable[str], ema: Ema | None, rename: Callable[[str], str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """New names -> names on disk, without what wrappers put there: `module.`, `_orig_mod.`, a name that all share.

    Where a file holds a model beside other things (Lightning: `model.` and `criterion.`), the part of the file below
    the one name that holds all of the model is taken, and the rest left aside, which is noted.
    """
    wanted = list(needed)
    inside = {part for name in wanted for part in name.split(".")}
    strange = [part for part in WRAPPERS if part not in inside]
    plain = [old for old, t in stored.tensors.items() if not old.endswith(COUNTS[0]) or t.numel() > 1 or old in wanted]
    short = {old: rename(".".join(part for part in old.split(".") if part not in strange)) for old in plain}
    while short and not set(short.values()) & set(wanted):
        first = {new.partition(".")[0] for new in short.values()}
        if len(first) > 1 or not all("." in new for new in short.values()):
            break
        short = {old: rename(new.partition(".")[2]) for old, new in short.items()}
    names = {new: old for old, new in short.items()}
    if len(names) < len(short):  # two tensors would become one
        return {old: old for old in stored.tensors}, ()
    prefixes = sorted({new.removesuffix(wanted[0]) for new in names if f".{new}".endswith(f".{wanted[0]}")})
    whole = [prefix for prefix in prefixes if all(prefix + name in names for name in wanted)]
    if len(whole) < 2 and not any(whole):
        return names, ()
    prefix = _chosen(whole, ema, stored.path)
    note = f"taking what stands under {prefix!r}: {len(names) - len(wanted)} other tensors are left aside"
    return {name: names[prefix + name] for name in wanted}, (note,)


def _folded(tensors: dict[str, Tensor], needed: set[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights that stand on disk as parts (weight normalisation, masks of torch's prune), made of their parts.

    A weight that is computed from parts whenever the model answers would undo a mask, so the product is the weight.
    """
    result, counts = dict(tensors), dict.fromkeys(PARTS, 0)
    for name in needed - set(tensors):
        at = name.rfind(".") + 1
        for what, parts in PARTS.items():
            one, other = (part.format(name[:at], name[at:]) for part in parts)
            if one in result and other in result:
                join = torch.mul if what == PRUNED else _normalised
                result[name] = join(result.pop(one), result.pop(other))
                counts[what] += 1
    return result, tuple(f"{count} weights stood under {what}: folded" for what, count in counts.items() if count)


def _normalised(g: Tensor, v: Tensor) -> Tensor:
    """Weight normalisation (arXiv:1602.07868), g v / |v|; the norm is over all axes but the one that g keeps."""
    kept = [axis for axis, length in enumerate(g.shape) if length != 1]
    return torch._weight_norm(v, g, kept[0] if kept else 0) if g.dim() else v * (g / v.norm())


def _same_memory(needed: Mapping[str, Tensor], given: Iterable[str]) -> dict[str, str]:
    """Names that are missing -> names that are given of the same memory: of tied weights safetensors keep one."""
    held = {name: (t.data_ptr(), t.shape) for name, t in needed.items() if t.numel() and not t.is_meta}
    places = {place: name for name, place in held.items() if name in given}
    return {name: places[place] for name, place in held.items() if name not in given and place in places}


def _agree(stored: Stored, needed: Mapping[str, Tensor]) -> bool:
    """Whether shapes agree one after the other; safetensors keep no order, so that they never do."""
    shapes = [t.shape for t in stored.tensors.values()]
    return stored.in_order and shapes == [t.shape for t in needed.values()] and set(stored.tensors) != set(needed)


def _in_order(stored: Stored, needed: Mapping[str, Tensor]) -> Matched:
    if not _agree(stored, needed):
        raise UserError(f"{stored.path} does not fit the model in order: other shapes or numbers of tensors")
    disk_names = dict(zip(needed, stored.tensors, strict=True))
    note = f"all {len(disk_names)} tensors taken in their order: their names are not the model's"
    tensors = {name: stored.tensors[old] for name, old in disk_names.items()}
    return Matched(tensors, disk_names, (*stored.notes, note))


def _check_names(given: Iterable[str], needed: Iterable[str], path: Path, advice: str) -> None:
    missing, strange = sorted(set(needed) - set(given)), sorted(set(given) - set(needed))
    if missing or strange:
        counted = [_counted(names, what) for names, what in ((missing, "missing"), (strange, "unexpected")) if names]
        raise UserError(f"{path} does not fit the model: {' and '.join(counted)}; {advice}")


def _counted(names: Sequence[str], what: str) -> str:
    first = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} tensor{' is' if len(names) == 1 else 's are'} {what} ({first})"


# --- into a module ----------------------------------------------------------------------------------------


def load_state(model: nn.Module, stored: Stored) -> None:
    """Fill a module, in float32.

    Raises:
        UserError: names, shapes or kinds of numbers differ, a number is not finite, or the file is damaged.
    """
    needed = model.state_dict()
    given = matched(stored, needed)
    for note in given.notes:
        _say(note)
    ready = checked(given.tensors, needed, stored.path, FITTING)
    kinds = sorted({_kind(given.tensors[name]) for name, t in needed.items() if given.tensors[name].dtype != t.dtype})
    if kinds:
        _say(f"{stored.path} holds {', '.join(kinds)}: converted to float32")
    elif stored.digest:
        arrays = {name: value.numpy() for name, value in given.tensors.items()}
        if stored.digest != tensors_digest(arrays, stored.facts):
            raise DamagedError(stored.path, "its content is not what its digest says")
    model.load_state_dict(ready)


def checked(given: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path, advice: str) -> dict[str, Tensor]:
    """Tensors of the shapes and kinds of numbers that a module needs; other floats are converted to its own.

    Raises:
        UserError: shapes or kinds of numbers differ, or a number is not finite.
    """
    wrong = [name for name, value in needed.items() if not _same_shape(given[name], value)]
    if wrong:
        shown = [f"{name} {list(given[name].shape)}, needed {list(needed[name].shape)}" for name in wrong[:SHOWN]]
        raise UserError(f"{path} has {len(wrong)} tensors of other shapes ({'; '.join(shown)}): {advice}")
    ready = {name: _as_needed(name, given[name], value.dtype, path) for name, value in needed.items()}
    _check_finite(ready, path)
    return {name: value.view_as(needed[name]) for name, value in ready.items()}


def _same_shape(given: Tensor, needed: Tensor) -> bool:
    """Whether shapes agree; that of a single number (BatchNorm's count) may be written as [] or [1]."""
    return given.shape == needed.shape or given.numel() == needed.numel() == 1


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
