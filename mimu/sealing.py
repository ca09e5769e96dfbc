"""Sealed checkpoints: files of weights in which the weights that a mask switches off or replaces are gone.

No model is built: tensors are found in the file by content, then by name, and the file that comes out has the parent's
own container, keys and metadata, so that the parent's own loader reads it.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from mimu import files
from mimu.config import Target
from mimu.containers import (
    DAMAGE,
    Container,
    Path_,
    TorchFile,
    check_quantised,
    copy_prefix,
    kind_of,
    stem,
    write_checked,
)
from mimu.errors import MaskError
from mimu.mask import Mask
from mimu.parent import Edit, bits_of, edit_of, find, is_plain, read_bits, sha256_of

Fill = Literal["zero", "noise"]
Averaged = Literal["seal", "drop"]
REMOVED = "mimu-removed"
MADE_FOR = "give the file of values that was removed from it"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar"}


@dataclass(frozen=True)
class Sealed:
    """What `seal` wrote.

    Args:
        weights: how many weights were overwritten, by file and tensor. replaced: how many of them by the mask's own
            values, not by zeros or noise.
        seed: of the noise, None for zeros. It is written into no sealed file: it would tell the noise from weights.
        left_out: what of the parent is not in the copy, and why.
    """

    out: Path
    fill: Fill
    seed: int | None
    weights: dict[str, int]
    replaced: dict[str, int]
    left_out: list[str] = field(default_factory=list)


# --- where the targets are --------------------------------------------------------------------------------


@dataclass
class _Found:
    """What one file holds of a mask's targets.

    Args:
        own: tensor -> target, with the parent's values. copies: the same, of the averaged copies beside them.
        parent_is_copy: whether the mask was made for the averaged copy, so that the others are the plain weights.
        strange: tensors of a target's name, in a file that does not hold the parent's values of it -> target.
    """

    container: Container
    own: dict[Path_, str] = field(default_factory=dict)
    copies: dict[Path_, str] = field(default_factory=dict)
    parent_is_copy: bool = False
    strange: dict[Path_, str] = field(default_factory=dict)

    def target(self, key: Path_) -> str:
        """Name the target that a tensor holds."""
        return (self.own | self.copies)[key]


def _tables(container: Container, target: Target) -> dict[Path_, dict[str, Path_]]:
    """Return the tensors of a target's shape: table they lie in -> name -> path."""
    tables: dict[Path_, dict[str, Path_]] = {}
    for key, shape in container.shapes().items():
        if shape == target.shape:
            tables.setdefault((*key[:-1], *(copy_prefix(key) or ())), {})[".".join(stem(key))] = key
    return tables


def _stem_of(name: str) -> str:
    return ".".join(stem((name,)))


def _names_of(name: str, target: Target) -> set[str]:
    return {_stem_of(one) for one in (name, target.name_on_disk, *target.aliases) if one}


def _in_table(container: Container, table: Mapping[str, Path_], name: str, target: Target) -> Path_ | None:
    """Find a target in one table of a file by its bytes: among tensors of its names first, so that few are read."""
    own = replace(target, aliases=tuple(sorted(_names_of(name, target))), name_on_disk=None)
    for cast in (False, True):
        for names in (set(table) & set(own.aliases), table):
            loaded = {one: container.load(table[one]) for one in names}
            values = {one: value for one, value in loaded.items() if value.dtype.is_floating_point and is_plain(value)}
            if found := find(_stem_of(name), own, values, cast):
                return table[found]
    return None


def _search(container: Container, targets: Mapping[str, Target], any_parent: bool) -> _Found:
    """Find every copy of every target in a file.

    Raises:
        MaskError: it holds several versions of a target, and no name says which are averaged copies.
    """
    result = _Found(container)
    for name, target in targets.items():
        tables, names = _tables(container, target), _names_of(name, target)
        hits = [hit for table in tables.values() if (hit := _in_table(container, table, name, target))]
        names |= {".".join(stem(hit)) for hit in hits}
        named = [table[one] for table in tables.values() for one in sorted(names) if one in table]
        if not hits and any_parent:
            hits = [key for key in named if copy_prefix(key) is None]
        same = list(dict.fromkeys(alias for hit in hits for alias in container.aliases(hit)))
        if same:
            others = dict.fromkeys((*named, *_elsewhere(container, names, target, same)))
            _sort(result, name, same, [key for key in others if key not in same])
        else:
            result.strange |= dict.fromkeys(named, name)
    return result


def _elsewhere(container: Container, names: set[str], target: Target, own: list[Path_]) -> list[Path_]:
    """Find what is another version of a target in other tables of a file: of its name, or in a list of all weights.

    Args:
        names: of the target. own: tensors with its values; their tables are left out.
    """
    shapes, tables = container.shapes(), {key[:-1] for key in own}
    there = [key for key, shape in shapes.items() if shape == target.shape and key[:-1] not in tables]
    named = [key for key in there if any(f".{'.'.join(key)}".endswith(f".{name}") for name in names)]
    return [key for key in there if key in named or any(_is_listed(key, shapes, table) for table in tables)]


def _is_listed(key: Path_, shapes: Mapping[Path_, tuple[int, ...]], table: Path_) -> bool:
    """Whether a tensor stands in a list of all weights, as some averages keep them: without names, in their order.

    Args:
        table: of weights with names. The list may lack some of them, such as buffers and what was not trained.
    """
    listed = [other for other in shapes if other[:-1] == key[:-1]]
    rest = iter([shape for other, shape in shapes.items() if other[:-1] == table])
    return len(listed) > 1 and all(one[-1].isdecimal() and shapes[one] in rest for one in listed)


def _sort(result: _Found, name: str, same: list[Path_], others: list[Path_]) -> None:
    """Tell a target's own tensors from copies of it.

    Args:
        same: tensors with the parent's values. others: tensors of the same name with other values.
    """
    plain, plain_others = [[key for key in keys if copy_prefix(key) is None] for keys in (same, others)]
    if plain and plain_others:
        what = f"{result.container.path} holds other values of {name} in {'.'.join(plain_others[0])}"
        raise MaskError(f"{what}: give a file with one version of the model")
    own = plain or same  # without plain ones the file holds the averaged copy alone, or the mask was made for it
    result.parent_is_copy |= not plain and bool(plain_others)
    result.own |= dict.fromkeys(own, name)
    result.copies |= {key: name for key in (*same, *others) if key not in own}


# --- what is written in their place -----------------------------------------------------------------------


def noise_like(value: Tensor, places: Tensor, count: int, name: str, seed: int) -> Tensor:
    """Return normal noise [count] with the standard deviation of the tensor's rest, outside of the places.

    Zeros tell where the mask was, and so what was forgotten (arXiv:2603.06640); noise does not show it, though images
    of the class point at some of the places. Copies of one target get the same draws.

    Args:
        value: the tensor. places: flat positions [k]. count: how many numbers are drawn, k or fewer.
        name: of the target; with `seed` it decides what is drawn.
    """
    stays = torch.ones(value.numel(), dtype=torch.bool)
    stays[places] = False
    rest = value.detach().contiguous().view(-1)[stays].double()
    generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:15], 16))
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return (noise * (rest.std(correction=0) if len(rest) else 0)).to(value.dtype)


def _edit(value: Tensor, mask: Mask, name: str, seed: int | None) -> Edit:
    """Return what replaces a target's weights: the mask's own values, and zeros or (with a seed) noise elsewhere.

    Raises:
        MaskError: a value is too large for the tensor's dtype.
    """
    new = mask.values.get(name)
    edit = edit_of(name, mask.positions[name], new, value.dtype)
    off = torch.ones_like(edit.places, dtype=torch.bool) if new is None else bits_of(new) == 0
    if seed is None:
        return edit
    bits = edit.bits.clone()
    bits[off] = bits_of(noise_like(value, edit.places, int(off.sum()), name, seed))
    return Edit(edit.places, bits)


def _edits(found: _Found, mask: Mask, averaged: Averaged | None, seed: int | None) -> dict[Path_, Edit]:
    wanted = found.own | (found.copies if averaged == "seal" else {})
    return {key: _edit(found.container.load(key), mask, name, seed) for key, name in wanted.items()}


def _leave_out(found: _Found, averaged: Averaged | None) -> set[Path_]:
    """Return the prefixes of averaged copies that are dropped."""
    return {prefix for key in found.copies if averaged == "drop" and (prefix := copy_prefix(key))}


def _check_averaged(found: _Found, averaged: Averaged | None) -> None:
    """See that a file holds no other version of a target, and that somebody decided about averaged copies.

    Raises:
        MaskError: it does, or nobody did, or the averages are what the mask was made for and are to be dropped.
    """
    for key, name in found.strange.items():
        what = f"{found.container.path} holds other values of {name} in {'.'.join(key)}"
        raise MaskError(f"{what}, in which nothing would be removed: take that file out of the folder")
    if not found.copies or averaged == "seal":
        return
    where = sorted({".".join(copy_prefix(key) or ()) for key in (*found.own, *found.copies)} - {""})
    if averaged is None:
        what = f"{found.container.path} also holds averaged copies of the weights ({', '.join(where)})"
        raise MaskError(f"{what}, which some loaders prefer: say ema='seal' to seal both, or ema='drop'")
    if found.parent_is_copy:
        what = f"the mask was made for the averaged copy ({', '.join(where)}) in {found.container.path}"
        raise MaskError(f"{what}, which cannot be dropped: say ema='seal' to seal both")


def _sha256_of_file(path: Path) -> str:
    with files.told(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- a file or a folder -----------------------------------------------------------------------------------


def _files_of(parent: Path) -> dict[str, Path]:
    """Return the files of a parent by their name below it; "" is a parent that is a file itself.

    Raises:
        MaskError: there is none, or a link leads to a folder.
    """
    if not parent.exists():
        raise MaskError(f"there is no file or folder {parent}: check the path")
    if not parent.is_dir():
        return {"": parent}
    found = {}
    for place, folders, names in os.walk(parent):
        if linked := [name for name in folders if (Path(place) / name).is_symlink()]:
            raise MaskError(f"{Path(place) / linked[0]} is a link to a folder: give a folder without such links")
        found |= {(Path(place) / name).relative_to(parent).as_posix(): Path(place) / name for name in names}
    return dict(sorted(found.items()))


def _opened(parent: Path, left_out: list[str]) -> tuple[dict[str, Container], dict[str, Path]]:
    """Return (files of weights, files that are copied as they are) by name, and say what is left out.

    Raises:
        MaskError: a file holds weights in a form that cannot be sealed.
    """
    weights: dict[str, Container] = {}
    others: dict[str, Path] = {}
    for name, path in _files_of(parent).items():
        kind = kind_of(path)
        if kind is None and not name:
            raise MaskError(f"{path} is neither a safetensors file nor one of torch.save: give a checkpoint")
        if name and Path(name).stem in ("optimizer", "scheduler", "scaler"):
            left_out.append(f"{name} (state of an optimiser)")
        elif kind is None:
            others[name] = path
        elif (found := _tried(kind(path) if not name else None, kind, path, left_out, name)) is not None:
            weights[name] = found
    return weights, others


def _tried(found: Container | None, kind: Any, path: Path, left_out: list[str], name: str) -> Container | None:
    """Open a file of a folder; a pickle of something else than weights, such as training arguments, is left out."""
    if found is not None:
        return found
    try:
        return kind(path)
    except MaskError as error:
        if path.suffix.lower() not in PICKLED or "pickled object" not in str(error):
            raise
        left_out.append(f"{name} (a pickled object, which may hold anything)")
        return None


def _must_be_apart(parent: Path, mask_out: Iterable[Path]) -> None:
    inside = parent.resolve()
    for path in mask_out:
        files.must_be_new(path)
        if parent.is_dir() and path.resolve().is_relative_to(inside):
            raise MaskError(f"{path} lies inside of the parent {parent}: choose a place outside")


def seal(
    parent: Path | str,
    mask: Mask,
    out: Path | str,
    fill: Fill = "zero",
    removed: Path | str | None = None,
    ema: Averaged | None = None,
    seed: int | None = None,
    any_parent: bool = False,
) -> Sealed:
    """Write a copy of a checkpoint in which the mask's weights are overwritten, and read it back.

    Args:
        parent: a safetensors file, a dictionary of `torch.save`, or a folder of such files (shards) and others.
        out: where the copy goes; nothing may be there.
        fill: what stands where the mask switches off, "zero" or "noise" (normal, with the standard deviation of the
            tensor's rest). Where it replaces weights, its own values stand in any case.
        removed: where the removed values go, for `restore`; without that file they cannot be had from the copy.
        ema: whether averaged copies of the weights are sealed, too, or dropped.
        seed: of the noise; drawn if None.
        any_parent: accept a file in which only names and shapes agree.

    Raises:
        MaskError: the file is not the parent, cannot be sealed, or holds averaged copies and `ema` is not given; or
            `out` exists. Nothing is written then.
    """
    parent, out, targets = Path(parent), Path(out), mask.config.parent.targets
    if fill not in ("zero", "noise") or ema not in (None, "seal", "drop"):
        raise MaskError(f"fill is {fill!r} and ema {ema!r}: choose zero or noise, and seal or drop")
    places = [out, *([Path(removed)] if removed else [])]
    _must_be_apart(parent, places)
    if removed and (out == Path(removed) or Path(removed).resolve().is_relative_to(out.resolve())):
        raise MaskError(f"the removed values would lie in {out}, beside the sealed weights: choose another place")
    seed = (secrets.randbits(48) if seed is None else seed) if fill == "noise" else None
    left_out: list[str] = []
    weights, others = _opened(parent, left_out)
    found = {name: _search(container, targets, any_parent) for name, container in weights.items()}
    _check_found(parent, mask, found)
    for one in found.values():
        _check_averaged(one, ema)
    edits = {name: _edits(one, mask, ema, seed) for name, one in found.items()}
    dropped = {name: _leave_out(one, ema) for name, one in found.items()}
    left_out += _told_left_out(found, dropped)
    with ExitStack() as stack:
        place = stack.enter_context(files.new_folder(out) if parent.is_dir() else files.new_file(out))
        for name, container in weights.items():
            write_checked(container, place / name if name else place, edits[name], dropped[name])
        for name, path in others.items():
            files.copy(path, place / name)
        if removed:
            data = _removed(parent, place, found, edits, seed, mask)
            files.put(stack.enter_context(files.new_file(Path(removed))), data)
    counts = {_label(name, key): len(edit.places) for name, some in edits.items() for key, edit in some.items()}
    new = {_label(n, key): mask.counts[found[n].target(key)][1] for n, some in edits.items() for key in some}
    return Sealed(out, fill, seed, counts, {label: count for label, count in new.items() if count}, left_out)


def _label(name: str, key: Path_) -> str:
    return ": ".join(filter(None, (name, ".".join(key))))


def _told_left_out(found: Mapping[str, _Found], dropped: Mapping[str, set[Path_]]) -> list[str]:
    told = []
    for name, one in found.items():
        told += [f"{_label(name, prefix)} (an averaged copy)" for prefix in sorted(dropped[name])]
        if isinstance(one.container, TorchFile):
            told += [f"{_label(name, (key,))} (state of an optimiser)" for key in one.container.optimisers()]
    return told


def _check_found(parent: Path, mask: Mask, found: Mapping[str, _Found]) -> None:
    """See that every target was found in some file.

    Raises:
        MaskError: one was not.
    """
    there = {target for one in found.values() for target in one.own.values()}
    lacking = [name for name in mask.positions if name not in there]
    if not lacking:
        return
    for one in found.values():
        check_quantised(one.container)
    target = mask.config.parent.targets[lacking[0]]
    shape = "x".join(map(str, target.shape))
    near = [".".join(k) for one in found.values() for k, s in one.container.shapes().items() if s == target.shape]
    owner, _, tensor = lacking[0].rpartition(".")
    if made := [key for key in near if f"{owner}.parametrizations.{tensor}." in key or f"{owner}.{tensor}_" in key]:
        what = f"{parent} has {lacking[0]} in parts ({made[0]} is one), of which it is made anew with every answer"
        raise MaskError(f"{what}: save the model with plain weights, and seal that")
    same = f"tensors of that shape: {', '.join(near[:3])}" if near else "it has no tensor of that shape"
    raise MaskError(f"{parent} does not hold the parent's {lacking[0]} [{shape}]: give the mask's parent ({same})")


# --- the removed values -----------------------------------------------------------------------------------


def _removed(
    parent: Path,
    place: Path,
    found: Mapping[str, _Found],
    edits: Mapping[str, Mapping[Path_, Edit]],
    seed: int | None,
    mask: Mask,
) -> bytes:
    """Return the file of removed values: for each tensor its places and old bits, and what both files hash to."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, some in edits.items():
        container = found[name].container
        for key, edit in some.items():
            number = str(len(rows))
            value = container.load(key)
            tensors[f"{number}.places"], tensors[f"{number}.bits"] = edit.places, read_bits(value, edit.places)
            rows.append({"file": name, "key": list(key), "sha256": sha256_of(value)})
    touched = [name for name, some in edits.items() if some]
    sealed = {name: _sha256_of_file(place / name if name else place) for name in touched}
    originals = {name: _sha256_of_file(found[name].container.path) for name in touched}
    facts: dict[str, Any] = {"format": REMOVED, "version": 1, "mask": mask.digest, "seed": seed, "rows": rows}
    facts |= {"sealed": sealed, "parent": originals}
    return files.packed(tensors, {"facts": json.dumps(facts, sort_keys=True)})


def restore(sealed: Path | str, removed: Path | str, out: Path | str) -> bool:
    """Put the removed values back into a copy of a sealed checkpoint.

    Args:
        sealed: what `seal` wrote. removed: the file of removed values. out: where the copy goes; nothing may be there.

    Returns:
        Whether every file is the parent's, byte for byte. Files of `torch.save` are written anew, and what was left out
        when sealing does not come back; the tensors are the parent's, bit for bit, in any case.

    Raises:
        MaskError: the files do not belong together, or one is damaged. Nothing is written then.
    """
    sealed, out = Path(sealed), Path(out)
    facts, tensors = _read_removed(Path(removed))
    _must_be_apart(sealed, [out])
    all_files, exact = _files_of(sealed), True
    for name, promised in facts["sealed"].items():
        if name not in all_files or _sha256_of_file(all_files[name]) != promised:
            raise MaskError(f"{all_files.get(name, sealed / name)} is not the file that {removed} was removed from")
    with files.new_folder(out) if sealed.is_dir() else files.new_file(out) as place:
        for name, path in all_files.items():
            target = place / name if name else place
            rows = [(number, row) for number, row in enumerate(facts["rows"]) if row["file"] == name]
            if not rows:
                files.copy(path, target)
                continue
            _put_back(path, target, rows, tensors)
            exact &= _sha256_of_file(target) == facts["parent"][name]
    return exact


def _put_back(path: Path, target: Path, rows: list[tuple[int, dict[str, Any]]], tensors: Mapping[str, Tensor]) -> None:
    """Write one restored file to a temporary path; every tensor must hash to what the parent's did."""
    kind = kind_of(path)
    assert kind is not None, "a file of removed values names files of weights alone"
    edits = {tuple(row["key"]): Edit(tensors[f"{n}.places"], tensors[f"{n}.bits"]) for n, row in rows}
    write_checked(kind(path), target, edits, set())
    written = kind(target)
    for _, row in rows:
        if sha256_of(written.load(tuple(row["key"]))) != row["sha256"]:
            raise MaskError(f"{'.'.join(row['key'])} of {path} is not the parent's again: {MADE_FOR}")


def _read_removed(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (facts, tensors) of a file of removed values.

    Raises:
        MaskError: it is none.
    """

    def whole() -> tuple[dict[str, Any], dict[str, Tensor]]:
        with safe_open(path, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            if facts["format"] != REMOVED or facts["version"] != 1 or not facts["rows"]:
                raise ValueError("another format")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for number, row in enumerate(facts["rows"]):
            _ = facts["sealed"][row["file"]], facts["parent"][row["file"]], row["sha256"], tuple(row["key"])
            if tensors[f"{number}.places"].shape != tensors[f"{number}.bits"].shape:
                raise ValueError("places without values")
        return facts, tensors

    return files.attempt(path, whole, DAMAGE)  # ty: ignore[invalid-explicit-return]
