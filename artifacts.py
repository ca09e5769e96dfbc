"""Everything that reaches the disk or the terminal: atomic writes, the stage store, records, progress, tracking.

A stage's folder is named after the hash of all its inputs and appears by one rename, its manifest written
last: a folder that exists is complete, and one whose files no longer match its manifest is made again.
No torch here, so that reports are rebuilt from JSON in a second.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np

from config import PROJECT_ROOT, Trackers, UserError

SCHEMA = "mimu/1"
MANIFEST = "manifest.json"
HISTORY = "history.json"
RECORDS = Path("eval/metrics_and_plots/json")
PACKAGES = ("torch", "torchvision", "torch-geometric", "numpy", "scikit-learn", "safetensors")
TRACKIO_PROJECT = "mimu"
_START = time.monotonic()
T = TypeVar("T")


# --- terminal ---------------------------------------------------------------------------------------------


def log(text: str) -> None:
    """One plain line for people, on stderr."""
    print(f"[{time.monotonic() - _START:7.1f} s] {text}", file=sys.stderr, flush=True)


def progress(items: Iterable[T], description: str, every: float = 5.0) -> Iterator[T]:
    """Pass `items` on; show a bar on a terminal, and one plain line each `every` seconds anywhere else."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=description, leave=False, file=sys.stderr)
        return
    total = len(items) if isinstance(items, Sized) else None
    begun = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            rate, last = count / (now - begun), now
            left = f", {(total - count) / rate:.0f} s left" if total else ""
            log(f"{description}: {count}{f'/{total}' if total else ''}, {rate:.1f}/s{left}")


# --- writing and reading ----------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Generator[Path]:
    """Yield a temporary path that becomes `path`, whole, when the block ends without an error.

    Raises:
        UserError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def create_array(path: Path, shape: tuple[int, ...], dtype: type = np.float32) -> np.memmap:
    """A new .npy file as a writable memory map: its rows are filled in chunks and never all in RAM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


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


def _other_process_runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _clear_leftovers(path: Path, kind: str) -> None:
    """Remove what killed runs left of this file or stage: their process is gone, or had our number."""
    for leftover in path.parent.glob(f".{path.name}.*.{kind}"):
        pid = leftover.suffixes[-2][1:]
        if pid.isdigit() and _other_process_runs(int(pid)):
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


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
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
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


# --- records ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One number in long form: which record, which method, which metric, on which split."""

    record: dict
    method: str
    split: str
    metric: str
    value: float


def record_path(output_dir: Path, record: Mapping[str, object]) -> Path:
    """Where a record lies: `<model>_<dataset>_top-{K}_kappa_{kappa}/<id>.json`."""
    point = f"{record['model']}_{record['dataset']}_top-{record['top_k']}_kappa_{record['kappa']}"
    return output_dir / RECORDS / point / f"{record['id']}.json"


def read_records(output_dir: Path) -> list[dict]:
    """All records below `output_dir`, in path order; a broken or foreign file is named and left out."""
    records = []
    for path in sorted((output_dir / RECORDS).glob("*/*.json")):
        try:
            record = read_json(path)
            if record.get("schema") != SCHEMA or record_path(output_dir, record) != path:
                raise UserError(f"{path} is no {SCHEMA} record of this place")
            records.append(record)
        except (UserError, KeyError) as error:
            log(f"left out: {error}")
    return records


def read_rows(records: Iterable[dict]) -> list[Row]:
    """Records in long form, test figures (`methods`) and validation figures (`validation`)."""
    return [
        Row(record, method, split, metric, value)
        for record in records
        for split, part in (("test", "methods"), ("validation", "validation"))
        for method, values in record[part].items()
        for metric, value in values.items()
    ]


# --- tracking ---------------------------------------------------------------------------------------------


@dataclass
class Tracker:
    """Training curves: kept as a list for the stage's `history.json`, mirrored to trackio if asked for."""

    kind: Trackers
    name: str
    config: dict
    history: list[dict] = field(default_factory=list)

    def __enter__(self) -> "Tracker":
        if self.kind is Trackers.trackio:
            plain = {"auto_log_gpu": False, "auto_log_cpu": False}
            with redirect_stdout(io.StringIO()):  # a banner in colours
                _trackio().init(project=TRACKIO_PROJECT, name=self.name, config=self.config, **plain)
        return self

    def log(self, step: int, **values: float) -> None:
        """Record plain numbers at one step."""
        self.history.append({"step": step, **values})
        if self.kind is Trackers.trackio:
            _trackio().log(values, step=step)

    def __exit__(self, *_: object) -> None:
        if self.kind is Trackers.trackio:
            with redirect_stdout(io.StringIO()):
                _trackio().finish()


def _trackio() -> ModuleType:
    """The trackio module, imported late: it takes seconds, and reads TRACKIO_DIR (set by main.py) just once."""
    import trackio

    return trackio
