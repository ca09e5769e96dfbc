"""Everything that reaches the disk: atomic writes, the stage store, records.

A stage's folder is named after the hash of all its inputs and appears by one rename, its manifest written
last: a folder that exists is complete, and one whose files no longer match its manifest is made again.
No torch here, so that reports are rebuilt from JSON in a second.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from config import PROJECT_ROOT, UserError
from observe import log

SCHEMA = "mimu/1"
MANIFEST = "manifest.json"
HISTORY = "history.json"
PACKAGES = ("torch", "torchvision", "torch-geometric", "numpy", "scikit-learn", "safetensors")


# --- what is not finished yet -----------------------------------------------------------------------------


def _host() -> str:
    """This machine, for names of files on a shared file system: process numbers mean nothing on another."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _unfinished(path: Path, kind: str) -> Path:
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


def _clear_leftovers(path: Path, kind: str) -> None:
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
    temporary = _unfinished(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path, "tmp")
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
    part = _unfinished(folder, "part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder, "part")
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


def read_array(path: Path) -> np.ndarray:
    """A .npy file as a read-only memory map.

    Raises:
        UserError: no such file, or cut off.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): give a folder of graphs that `run` wrote") from None


# --- hashes and provenance --------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files (its manifest apart, which holds times)."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    return key_of({name: sha256_file(folder / name) for name in names})


def sha256_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 over dtype, shape and bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def key_of(inputs: Mapping[str, object]) -> str:
    """SHA-256 of a JSON-able mapping, independent of key order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@lru_cache
def code_key(*names: str) -> str:
    """Hash of some of this project's source files: changed code is a changed input of a stage."""
    return key_of({name: sha256_file(PROJECT_ROOT / name) for name in names})


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PROJECT_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@lru_cache
def provenance() -> dict[str, object]:
    """Commit (None outside a checkout), whether tracked files differ from it, and versions."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(status), "versions": versions()}


def now() -> str:
    """UTC time, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- stages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, what it reports, and the seconds it took when it was made."""

    path: Path
    key: str
    facts: dict
    seconds: float


def _finished(path: Path, key: str) -> Stage | None:
    """The stage in `path` if its manifest is for `key` and every file still has its hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        intact = manifest["key"] == key and all(
            sha256_file(path / name) == digest for name, digest in manifest["files"].items()
        )
        return Stage(path, key, manifest["facts"], manifest["seconds"]) if intact else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold `path` for the length of the block; other processes (on NFS 4 other machines too) wait. Leaves no file.

    Raises:
        UserError: the place cannot be written, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process: it makes {path.name.removeprefix('.').removesuffix('.lock')}")
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it has removed it since: then this is a lock on nothing, and a new one is needed.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
            file.close()
    except OSError as error:
        raise UserError(f"cannot lock {path} ({error.strerror}): choose another folder with --output-dir") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def build_stage(folder: Path, label: str, inputs: Mapping[str, object], make: Callable[[Path], dict]) -> Stage:
    """Return the stage made from `inputs`, running `make` only if it is not there, whole, already.

    Args:
        folder: where stages of this kind live.
        label: readable start of the folder's name.
        inputs: *everything* that the result depends on, JSON-able.
        make: fills an empty folder and returns JSON-able facts.

    Raises:
        UserError: the folder cannot be written.
    """
    key = key_of({"versions": versions(), **inputs})
    path = folder / f"{label}-{key[:12]}"
    if done := _finished(path, key):
        log(f"{label}: unchanged, using {path}")
        return done
    with locked(path.with_name(f".{path.name}.lock")):  # jobs that need the same stage make it once
        if done := _finished(path, key):
            log(f"{label}: made by another process, using {path}")
            return done
        return _build(path, key, inputs, make)


def _build(path: Path, key: str, inputs: Mapping[str, object], make: Callable[[Path], dict]) -> Stage:
    """Make a stage in a folder beside `path` and rename it."""
    part = _unfinished(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path, "part")
        part.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another folder with --output-dir") from error
    try:
        begun = time.perf_counter()
        facts = make(part)
        seconds = time.perf_counter() - begun
        files = {p.name: sha256_file(p) for p in sorted(part.iterdir())}
        manifest = {"schema": SCHEMA, "key": key, "inputs": dict(inputs), "files": files, "facts": facts}
        write_json(part / MANIFEST, manifest | {"seconds": seconds, "made": now(), "provenance": provenance()})
        if path.exists() and _finished(path, key) is None:
            shutil.rmtree(path)
        try:
            os.replace(part, path)
        except OSError:
            if _finished(path, key) is None:  # else another process made the same stage first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Stage(path, key, facts, seconds)
