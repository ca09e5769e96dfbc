"""The one file of this package that writes: files and folders that appear whole or not at all.

Each is made under a temporary name beside its place, waits for the disk, and is then renamed. Nothing that exists is
ever overwritten, save a mask's own folder.
"""

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from mimu.errors import MaskError


@contextmanager
def told(path: Path, doing: str = "write") -> Generator[None]:
    """Turn an operating system's error at a file into one sentence.

    Raises:
        MaskError: the file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        if doing == "read" and isinstance(error, FileNotFoundError):
            raise MaskError(f"there is no file {path}: check the path") from None
        advice = "its permissions and the path" if doing == "read" else "its permissions and the room on the disk"
        raise MaskError(f"cannot {doing} {path} ({error.strerror or error}): check {advice}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def must_be_new(path: Path) -> None:
    """Refuse a place where something stands already.

    Raises:
        MaskError: there is a file, folder or link of this name.
    """
    if os.path.lexists(path):
        raise MaskError(f"{path} exists and is not overwritten: remove it or choose another place")


def must_be_ours(path: Path, ours: Collection[str]) -> None:
    """Refuse a place where something else stands than a folder with files of these names alone.

    Raises:
        MaskError: there is a file, a link, or a folder with other files.
    """
    if not (ours and path.is_dir() and not path.is_symlink()):
        must_be_new(path)
    elif strange := sorted({entry.name for entry in path.iterdir()} - set(ours)):
        raise MaskError(f"{path} holds other files ({strange[0]}), which are not overwritten: choose a new folder")


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """Yield a temporary path that becomes the file `path` when the block ends without an error.

    Raises:
        MaskError: `path` exists, or cannot be written.
    """
    must_be_new(path)
    temporary = _temporary(path)
    try:
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with told(path):
            _sync(temporary)
            must_be_new(path)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, ours: Collection[str] = ()) -> Generator[Path]:
    """Yield a temporary folder that becomes the folder `path` when the block ends without an error.

    Args:
        ours: names of files that an existing folder may hold, and that are replaced together; none: it must be new.

    Raises:
        MaskError: `path` exists and holds something else, or cannot be written.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary = _temporary(path)
    must_be_ours(path, ours)
    try:
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        yield temporary
        with told(path):
            for place, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _sync(Path(place) / name)
                _sync(Path(place))
            if path.is_dir():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.is_dir():
                    os.replace(old, path)
                raise
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


KINDS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return tensors as a safetensors file: the library's own writer needs numpy, which torch does not bring.

    The header's length in eight bytes, the header as JSON, padded to a multiple of eight, then the values, wide types
    first, so that each lies at a multiple of its size.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name in sorted(tensors, key=lambda one: (-tensors[one].element_size(), one)):
        plain = tensors[name].detach().cpu().contiguous()
        parts.append(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()))
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": KINDS[plain.dtype], "shape": list(plain.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def put(path: Path, data: bytes) -> None:
    """Write bytes to a temporary path that `new_file` or `new_folder` gave."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def put_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Write parts, one after the other, to a temporary path."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for part in parts:
                file.write(part)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes to a temporary path; permissions stay, times do not."""
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        os.chmod(target, target.stat().st_mode | 0o600)  # noqa: PTH101


def patch(path: Path, changes: Mapping[int, bytes]) -> None:
    """Overwrite bytes of a file at a temporary path.

    Args:
        changes: offset in the file -> new bytes.
    """
    with told(path), path.open("r+b") as file:
        for offset, data in changes.items():
            file.seek(offset)
            file.write(data)


def put_torch(path: Path, value: object, zipped: bool) -> None:
    """Write what `torch.save` makes of a value to a temporary path; `zipped`: as a zip archive, not the older format.

    An open file is handed over, because from a path torch would keep the temporary name in the archive.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            torch.save(value, file, _use_new_zipfile_serialization=zipped)


def read(path: Path) -> bytes:
    """Read a file.

    Raises:
        MaskError: there is none, or it cannot be read.
    """
    with told(path, "read"):
        return path.read_bytes()


def attempt(path: Path, doing: Callable[[], object], errors: tuple[type[BaseException], ...]) -> object:
    """Return what `doing` reads from a file, its own kinds of errors turned into one sentence.

    Raises:
        MaskError: the file is damaged, or not of the kind that `doing` reads.
    """
    with told(path, "read"):
        try:
            return doing()
        except errors as error:
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise MaskError(f"{path} is damaged or of another kind ({what}): give a whole one") from None
