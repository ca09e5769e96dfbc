"""Everything that reaches the disk: files that appear whole or not at all, and how they are read back.

No torch here, so that reports are rebuilt from JSON in a second.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from config import UserError

SCHEMA = "mimu/1"
HISTORY = "history.json"


# --- what is not finished yet -----------------------------------------------------------------------------


def _host() -> str:
    """This machine, for names of files on a shared file system: process numbers mean nothing on another."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def unfinished(path: Path, kind: str) -> Path:
    """Where this process makes a file or folder before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_host()}.{kind}")


def _other_process_runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def clear_leftovers(path: Path, kind: str) -> None:
    """Remove what killed runs on this machine left of this file or stage: their process is gone, or had our number."""
    for leftover in path.parent.glob(f".{path.name}.*-{_host()}.{kind}"):
        pid = leftover.suffixes[-2][1:].partition("-")[0]
        if pid.isdigit() and _other_process_runs(int(pid)):
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


# --- writing and reading ----------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Generator[Path]:
    """Yield a temporary path that becomes `path`, whole, when the block ends without an error.

    Raises:
        UserError: the place cannot be written.
    """
    temporary = unfinished(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path, "tmp")
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): choose a folder that can be written with --output-dir"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Generator[Path]:
    """Yield a temporary folder that becomes `folder`, whole, when the block ends without an error.

    Raises:
        UserError: the place cannot be written.
    """
    part = unfinished(folder, "part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder, "part")
        part.mkdir()
        yield part
        os.replace(part, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}): make room, or choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write bytes into a folder that is being filled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def open_to_lock(path: Path) -> IO[str]:
    """An open file that holds nothing and is there to be locked; made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, atomically."""
    with writing(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, keys in the order given (a table's order survives); NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Read one JSON object.

    Raises:
        UserError: no such file, or not one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON ({error}): delete it and run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: delete it and run again")
    return value


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> None:
    """Write arrays as safetensors, atomically; `facts` become JSON under one metadata key.

    One key, because the library writes several in an order that changes, and equal content must be equal bytes.
    """
    from safetensors.numpy import save_file

    plain = {"facts": json.dumps(dict(facts), sort_keys=True)}
    with writing(path) as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, metadata=plain)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and facts of a safetensors file.

    Raises:
        UserError: no such file, or not a whole safetensors file of this project.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the path, or leave it out to compute it") from None
    except (SafetensorError, OSError, ValueError) as error:
        what = f"{path} is not a whole safetensors file of this project ({error})"
        raise UserError(f"{what}: give one that `run` wrote, or leave the path out to compute it") from None


@contextmanager
def appending_array(
    path: Path, shape: tuple[int, ...], dtype: type = np.float32
) -> Generator[Callable[[np.ndarray], None]]:
    """A new .npy file that is filled row by row from the front: what is written leaves memory at once.

    Raises:
        ValueError: another number of values was written than `shape` holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

        def append(rows: np.ndarray) -> None:
            nonlocal written
            written += rows.size
            file.write(np.ascontiguousarray(rows, dtype).data)

        yield append
        file.flush()
        os.fsync(file.fileno())
    if written != math.prod(shape):
        raise ValueError(f"{path} needs {math.prod(shape)} values, {written} were written")


@contextmanager
def extending(path: Path, begin: int) -> Generator[IO[bytes]]:
    """A file to be written from its byte `begin` on; what lay behind that goes. On the disk when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        file.truncate(begin)
        file.seek(begin)
        yield file
        file.flush()
        os.fsync(file.fileno())


def map_rows(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The first bytes of a file as a read-only memory map, uint8 of this shape. Raises OSError or ValueError."""
    return np.memmap(path, np.uint8, "r", shape=shape)


def read_array(path: Path) -> np.ndarray:
    """A .npy file as a read-only memory map.

    Raises:
        UserError: no such file, or cut off.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): give a folder of graphs that `run` wrote") from None
