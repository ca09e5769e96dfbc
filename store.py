"""The store of stages: each lies in a folder that is named after the hash of all its inputs.

The folder appears by one rename, its manifest written last: a folder that exists is complete, and one whose files
no longer match its manifest is made again.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from artifacts import SCHEMA, clear_leftovers, unfinished, write_json
from config import UserError
from hashes import key_of, now, provenance, sha256_file, versions
from locks import locked
from observe import log

MANIFEST = "manifest.json"


def sha256_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files (its manifest apart, which holds times)."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    return key_of({name: sha256_file(folder / name) for name in names})


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
    part = unfinished(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path, "part")
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
