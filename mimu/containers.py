"""Files of weights, as they are found in the world: safetensors, and dictionaries that `torch.save` wrote.

Both offer the same: their tensors by path (keys from the outside inwards, then the tensor's own), and a copy of the
file with some bits changed and some entries left out. Nothing in a file is ever run.
"""

import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimu import files
from mimu.errors import MaskError
from mimu.parent import Edit, read_bits, sha256_of, write_bits

Path_ = tuple[str, ...]
HOLDERS = {"state_dict", "model", "model_state_dict", "module", "_orig_mod", "net"}
"""Parts in front of a parameter's name that training scripts and wrappers add."""
COPY = re.compile(r"(^|_)(ema|swa|averaged?)(_|$)", re.IGNORECASE)
"""Parts in front of a name that say: an averaged copy of the weights."""
OPTIMISER = re.compile(r"^optim", re.IGNORECASE)
FOREIGN = {
    **dict.fromkeys((".onnx", ".pb"), "an ONNX or TensorFlow graph, in which weights have other names"),
    **dict.fromkeys((".h5", ".keras", ".tflite", ".msgpack", ".npz", ".npy"), "of another framework"),
    **dict.fromkeys((".gguf", ".ggml", ".engine", ".mlmodel", ".pt2", ".pte"), "compiled or quantised"),
}
DAMAGE = (
    *(UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError, AssertionError),
    *(ArithmeticError, struct.error, zipfile.BadZipFile, SafetensorError),
)


class Container(Protocol):
    """A file of weights."""

    path: Path

    def __init__(self, path: Path): ...

    def shapes(self) -> Mapping[Path_, tuple[int, ...]]:
        """Return the shape of every tensor by its path."""
        ...

    def load(self, key: Path_) -> Tensor:
        """Return one tensor."""
        ...

    def aliases(self, key: Path_) -> list[Path_]:
        """Return the paths of all tensors that share the values of one, itself among them."""
        ...

    def write(self, target: Path, edits: Mapping[Path_, Edit], leave_out: Collection[Path_]) -> None:
        """Write a copy to a temporary path.

        Args:
            leave_out: paths of tensors, or of tables (with all that they hold).
        """
        ...


def parts_of(key: Path_) -> Path_:
    """Split a tensor's path at every dot, too: ("model", "fc.weight") -> ("model", "fc", "weight")."""
    return tuple(part for one in key for part in one.split("."))


def stem(key: Path_) -> Path_:
    """Return a parameter's path without the parts that containers, wrappers and averaged copies put in front.

    Of tables one of which is called an average, all are in front: `callbacks`, `EMA`, `weights`.
    """
    averaged = any(COPY.search(part) for part in parts_of(key[:-1]))
    parts = list(parts_of(key[-1:] if averaged else key))
    while len(parts) > 1 and (parts[0] in HOLDERS or COPY.search(parts[0])):
        parts.pop(0)
    return tuple(parts)


def copy_prefix(key: Path_) -> Path_ | None:
    """Return what stands in front of an averaged copy's names, up to the part that says so; None: it is no copy."""
    parts = parts_of(key)
    for end, part in enumerate(parts[: len(parts) - len(stem(key))], 1):
        if COPY.search(part):
            return parts[:end]
    return None


# --- safetensors ------------------------------------------------------------------------------------------


class SafetensorsFile:
    """A safetensors file; only the changed bytes of a copy differ, header and metadata stay."""

    def __init__(self, path: Path):
        self.path = path
        self.opened: Any = files.attempt(path, lambda: safe_open(path, framework="pt"), DAMAGE)
        self.begin, self.header = self._header()

    def _header(self) -> tuple[int, dict[str, Any]]:
        """Return (offset of the data, header): eight bytes of length, then JSON; the library has checked both."""
        with files.told(self.path, "read"), self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return 8 + length, json.loads(file.read(length))

    def _names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def shapes(self) -> dict[Path_, tuple[int, ...]]:
        """Return the shape of every tensor by its path, which is its name."""
        return {(name,): tuple(self.header[name]["shape"]) for name in self._names()}

    def load(self, key: Path_) -> Tensor:
        """Return one tensor, a copy."""
        return self.opened.get_tensor(key[0]).clone()

    def aliases(self, key: Path_) -> list[Path_]:
        """Return the path alone: in this format no two tensors share bytes."""
        return [key]

    def write(self, target: Path, edits: Mapping[Path_, Edit], leave_out: Collection[Path_]) -> None:
        """Copy the file, without some tensors if need be, and overwrite the changed bytes."""
        left = {name for name in self._names() if any(parts_of((name,))[: len(one)] == one for one in leave_out)}
        if left:
            self._repack(target, left)
        else:
            files.copy(self.path, target)
        copy = SafetensorsFile(target)
        for (name,), edit in edits.items():
            if name in left:
                continue
            begin, size = copy.begin + copy.header[name]["data_offsets"][0], edit.bits.element_size()
            pairs = zip(edit.places.tolist(), edit.bits.tolist(), strict=True)
            changes = {begin + size * place: _little(bits, size) for place, bits in pairs}
            files.patch(target, changes)

    def _repack(self, target: Path, left: Collection[str]) -> None:
        """Write the tensors that stay, in their order in the file, under the same metadata."""
        names = sorted(set(self._names()) - set(left), key=lambda name: self.header[name]["data_offsets"])
        header: dict[str, Any] = {key: value for key, value in self.header.items() if key == "__metadata__"}
        end, places = 0, []
        for name in names:
            first, last = self.header[name]["data_offsets"]
            header[name] = self.header[name] | {"data_offsets": [end, end + last - first]}
            places.append((self.begin + first, last - first))
            end += last - first
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        files.put_parts(target, chain((struct.pack("<Q", len(text)), text), self._ranges(places)))

    def _ranges(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """Read ranges (offset, length) of the file, one after the other."""
        with files.told(self.path, "read"), self.path.open("rb") as source:
            for place, size in places:
                source.seek(place)
                yield source.read(size)


def _little(bits: int, size: int) -> bytes:
    return bits.to_bytes(size, "little", signed=size > 1)


# --- torch.save -------------------------------------------------------------------------------------------


class TorchFile:
    """A dictionary that `torch.save` wrote, read with `weights_only`: tensors and plain containers, nothing else.

    A copy is made by changing the dictionary in memory and saving it again: tensors that share values still do.
    """

    def __init__(self, path: Path):
        self.path = path
        with files.told(path, "read"), path.open("rb") as file:
            self.zipped = file.read(2) == b"PK"
        if self.zipped:
            names = files.attempt(path, lambda: zipfile.ZipFile(path).namelist(), DAMAGE)
            if any(name.endswith("/constants.pkl") for name in names):  # ty: ignore[not-iterable]
                raise MaskError(f"{path} is a TorchScript program: save the state dict of the model it was made from")
        self.value = self._loaded()

    def _loaded(self) -> dict[str, Any]:
        def load() -> object:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(self.path, map_location="cpu", weights_only=True)

        try:
            value = files.attempt(self.path, load, tuple(error for error in DAMAGE if error is not UnpicklingError))
        except UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)|class [`']?([\w.]+)", str(error))
            name = next(filter(None, found.groups()), "code") if found else "code"
            what = f"{self.path} is a pickled object that needs {name} to be read, and nothing of it is run"
            raise MaskError(f"{what}: save its state dict, torch.save(model.state_dict(), ...)") from None
        if not isinstance(value, dict):
            raise MaskError(f"{self.path} holds a {type(value).__name__}, no dictionary of tensors: save a state dict")
        return value

    @cached_property
    def tensors(self) -> dict[Path_, Tensor]:
        """Every tensor by its path, those of optimisers left out."""
        return dict(_walk(self.value, ()))

    def shapes(self) -> dict[Path_, tuple[int, ...]]:
        """Return the shape of every tensor by its path."""
        return {key: tuple(value.shape) for key, value in self.tensors.items()}

    def load(self, key: Path_) -> Tensor:
        """Return one tensor, which is the dictionary's own."""
        return self.tensors[key].detach()

    def aliases(self, key: Path_) -> list[Path_]:
        """Return the paths of all tensors that lie in the same place."""
        own = self.tensors[key]
        same = (
            other
            for other, value in self.tensors.items()
            if value.data_ptr() == own.data_ptr() and (value.shape, value.stride()) == (own.shape, own.stride())
        )
        return [key, *(other for other in same if other != key)]

    def optimisers(self) -> list[str]:
        """Return the keys, in the outermost two tables, under which an optimiser's state lies."""
        tables = [((), self.value), *(((str(k),), v) for k, v in self.value.items() if isinstance(v, dict))]
        return [".".join((*path, str(key))) for path, table in tables for key in table if OPTIMISER.match(str(key))]

    def write(self, target: Path, edits: Mapping[Path_, Edit], leave_out: Collection[Path_]) -> None:
        """Save the dictionary without optimisers, with the edits, to a temporary path; in memory all is put back."""
        old = {key: Edit(e.places, read_bits(self.tensors[key], e.places)) for key, e in edits.items()}
        value = _without(self.value, (), leave_out)
        try:
            for key, edit in edits.items():
                write_bits(self.tensors[key], edit.places, edit.bits)
            files.put_torch(target, value, self.zipped)
        finally:
            for key, edit in reversed(old.items()):
                write_bits(self.tensors[key], edit.places, edit.bits)


def _walk(table: Mapping[Any, Any], path: Path_) -> Iterator[tuple[Path_, Tensor]]:
    for key, value in table.items():
        if OPTIMISER.match(str(key)) and len(path) < 2:
            continue
        if isinstance(value, Tensor):
            yield (*path, str(key)), value
        elif isinstance(value, dict | list | tuple):
            table = value if isinstance(value, dict) else dict(enumerate(value))
            yield from _walk(table, (*path, str(key)))


def _without(table: Any, path: Path_, leave_out: Collection[Path_]) -> Any:
    """Copy a table without optimisers and what is to be left out; class and attributes (`_metadata`) stay."""
    copy = table.copy()
    if hasattr(table, "_metadata"):
        copy._metadata = table._metadata
    for key, value in table.items():
        here = (*path, str(key))
        parts = parts_of(here)
        if any(parts[: len(one)] == one for one in leave_out) or (OPTIMISER.match(str(key)) and len(path) < 2):
            del copy[key]
        elif isinstance(value, dict):
            copy[key] = _without(value, here, leave_out)
    return copy


# --- any file ---------------------------------------------------------------------------------------------


def kind_of(path: Path) -> Callable[[Path], Container] | None:
    """Return the class that reads a file of weights; None: it is a file of something else.

    Raises:
        MaskError: it holds weights in a form that cannot be sealed.
    """
    if path.suffix.lower() in FOREIGN:
        what = FOREIGN[path.suffix.lower()]
        raise MaskError(f"{path} is {what}: seal the checkpoint in PyTorch's own form, and export from that")
    with files.told(path, "read"), path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return SafetensorsFile
    weights = path.suffix.lower() in {".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".pickle"}
    return TorchFile if start.startswith((b"PK", b"\x80")) or weights else None


def check_quantised(container: Container) -> None:
    """Refuse a file of which some tensor is quantised.

    Raises:
        MaskError: it is.
    """
    packed = [key for key in container.shapes() if not _is_storable(container, key)]
    if packed or any("_packed_params" in ".".join(key) for key in container.shapes()):
        raise MaskError(f"{container.path} is quantised: mask the float parent, seal it, and quantise that")


def _is_storable(container: Container, key: Path_) -> bool:
    return not container.load(key).is_quantized if isinstance(container, TorchFile) else True


def write_checked(container: Container, target: Path, edits: Mapping[Path_, Edit], dropped: set[Path_]) -> None:
    """Write a sealed copy of one file to a temporary path, and read it back.

    Raises:
        MaskError: what was read back is not the parent with the edits, bit for bit.
    """
    container.write(target, edits, dropped)
    written = type(container)(target)
    stays = [key for key in container.shapes() if not any(parts_of(key)[: len(one)] == one for one in dropped)]
    if sorted(written.shapes()) != sorted(stays):
        raise MaskError(f"the copy of {container.path} has other tensors than it: nothing was written")
    for key in stays:
        value, copy = container.load(key), written.load(key)
        if key in edits:
            value = value.clone()
            write_bits(value, edits[key].places, edits[key].bits)
        if (value.dtype, value.shape) != (copy.dtype, copy.shape) or sha256_of(value) != sha256_of(copy):
            raise MaskError(f"the copy of {'.'.join(key)} of {container.path} was not read back: nothing was written")
