"""The store of stages: each lies in a folder that is named after the hash of all its inputs.

The folder appears by one rename, its manifest written last: a folder that exists is complete, and one whose files
no longer match its manifest is made again.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.artifacts import SCHEMA, DamagedError, new_part, publish, read_json, told, write_json
from core.hashes import key_of, now, provenance, sha256_file, versions
from core.locks import clear_dead, locked
from core.observe import log

MANIFEST = "manifest.json"


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of a folder's files, its manifest and hidden ones apart."""
    paths = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST and not path.name.startswith("."))
    return {path.name: sha256_file(path) if path.is_file() else "no file" for path in paths}


def sha256_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files (its manifest apart, which holds times)."""
    return key_of(_hashes(folder))


def write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Write what a folder holds, and `facts`: it is written last, so that a folder with one is complete."""
    with told(folder):
        files = _hashes(folder)
    write_json(folder / MANIFEST, {**facts, "files": files})


def read_manifest(folder: Path, foreign: bool = False) -> dict | None:
    """A folder's manifest; None if there is no such folder.

    Args:
        foreign: it may have been written by an earlier version, without a digest.

    Raises:
        DamagedError: the manifest is not what was written, or the folder holds other files than it lists.
        UserError, MachineError: they cannot be read.
    """
    if not folder.is_dir():
        return None
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(path, "there is none")
    manifest = read_json(path, foreign)
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise DamagedError(path, "it lists no files")
    with told(folder, "read"):
        found = _hashes(folder)
    for name in sorted({*listed, *found}):
        if name not in found:
            raise DamagedError(folder / name, "it is missing")
        if name not in listed:
            raise DamagedError(folder / name, f"{MANIFEST} does not list it")
        if found[name] != listed[name]:
            raise DamagedError(folder / name, f"its content is not what {MANIFEST} says")
    return manifest


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, what it reports, and the seconds it took when it was made."""

    path: Path
    key: str
    facts: dict
    seconds: float


def _finished(path: Path, key: str) -> Stage | None:
    """The stage in `path`, if there is one.

    Raises:
        DamagedError: it is not what was made.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return None
    if manifest.get("key") != key:
        raise DamagedError(path / MANIFEST, "it is of other inputs")
    return Stage(path, key, manifest["facts"], manifest["seconds"])


def build_stage(folder: Path, label: str, inputs: Mapping[str, object], make: Callable[[Path], dict]) -> Stage:
    """Return the stage made from `inputs`, running `make` only if it is not there, whole, already.

    Args:
        folder: where stages of this kind live.
        label: readable start of the folder's name.
        inputs: *everything* that the result depends on, JSON-able.
        make: fills an empty folder and returns JSON-able facts.

    Raises:
        MachineError, UserError: as `told`.
    """
    key = key_of({"versions": versions(), **inputs})
    path = folder / f"{label}-{key[:12]}"
    lock = path.with_name(f".{path.name}.lock")
    try:
        if done := _finished(path, key):
            log(f"{label}: unchanged, using {path}")
            for left in folder.glob(".*.lock"):  # by runs that were killed
                clear_dead(left)
            return done
    except DamagedError as error:
        log(f"{label}: {error.found}, so that it is made anew")
    with locked(lock):  # jobs that need the same stage make it once
        try:
            if done := _finished(path, key):
                log(f"{label}: made by another process, using {path}")
                return done
        except DamagedError:
            with told(path):
                shutil.rmtree(path)
        return _build(path, key, inputs, make)


def _build(path: Path, key: str, inputs: Mapping[str, object], make: Callable[[Path], dict]) -> Stage:
    """Make a stage in a folder beside `path` and rename it; whoever calls this holds its lock."""
    part = new_part(path)
    try:
        begun = time.perf_counter()
        facts = make(part)
        about = {"seconds": time.perf_counter() - begun, "made": now(), "provenance": provenance()}
        write_manifest(part, {"schema": SCHEMA, "key": key, "inputs": dict(inputs), "facts": facts, **about})
        publish(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Stage(path, key, facts, about["seconds"])
