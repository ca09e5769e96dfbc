"""The store of stages: each lies in a folder that is named after the hash of all its inputs.

The folder appears by one rename, its manifest written last: a folder that exists is complete, and one whose files
no longer match its manifest is made again. A finished run is kept too, so that it is known again before torch is
imported.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from core.artifacts import SCHEMA, DamagedError, new_part, open_to_lock, publish, read_json, told, write_json
from core.config import PipelineConfig, ReporterConfig, Trackers, UserError, plain
from core.hashes import key_of, now, provenance, sha256_file, versions, whole_code
from core.observe import log

RUNNING = ".running"  # below the output folder, locked while a run works there: clean.sh looks for it


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _lock(path: Path, how: int, waiting_for: str) -> int:
    """The open file of a lock, held. Whoever held it before may have removed the file: then a new one is made."""
    while True:
        file = open_to_lock(path)
        try:
            with told(path, "lock"):
                try:
                    fcntl.flock(file, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    log(f"waiting for another process: {waiting_for}")
                    fcntl.flock(file, how)
                if _is_at(path, file):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _remove(path: Path, file: int) -> None:
    """Remove the file of a lock unless somebody else holds it as well, or has put another one there."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, file):
            path.unlink()


@contextmanager
def locked(path: Path, waiting_for: str = "", shared: bool = False) -> Generator[None]:
    """Hold a lock for the length of the block, alone or `shared` with others that share it. Leaves no file.

    Args:
        waiting_for: what the log says that the other process does (default: it makes what the lock is named after).

    Raises:
        MachineError, UserError: as `told`.
    """
    waiting_for = waiting_for or f"it makes {path.name.removeprefix('.').removesuffix('.lock')}"
    file = _lock(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, waiting_for)
    try:
        yield
    finally:
        _remove(path, file)
        os.close(file)


def clear_dead(path: Path) -> None:
    """Remove the file of a lock whose holder was killed, if there is one."""
    if path.is_file() and not path.is_symlink():
        file = open_to_lock(path)
        _remove(path, file)
        os.close(file)


@contextmanager
def running(output_dir: Path) -> Generator[None]:
    """Mark an output folder as one in which a run works, for the length of the block.

    A folder that was not there before, and in which nothing was made, is gone afterwards.

    Raises:
        MachineError, UserError: as `told`; so a folder that cannot be written is refused before anything is made.
    """
    fresh = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        with locked(output_dir / RUNNING, "clean.sh tidies this folder", shared=True):
            yield
    finally:
        with suppress(OSError):
            for folder in fresh:
                folder.rmdir()


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


# --- finished runs ----------------------------------------------------------------------------------------

RUNS = Path("checkpoints/runs")


@dataclass(frozen=True)
class Finished:
    """What a finished run was made from and what it left, by which the same run is known again.

    Args:
        inputs: SHA-256 of what lies outside the output folder, by name.
        stages: key of each stage, by its folder.
        record_sha256: of each record, by its file, in the order of the sweep.
        mask_sha256: of each mask, by its file.
        said: the lines that the run began with.

    Folders and files are named relative to the output folder.
    """

    inputs: dict[str, str]
    stages: dict[str, str]
    record_sha256: dict[str, str]
    mask_sha256: dict[str, str]
    said: list[str]


def _run_key(config: PipelineConfig) -> str:
    """Hash a configuration with all code and all versions that carry it out.

    Where results lie, where curves are shown, how figures look and whether a run goes on from an interruption change no
    record: these settings are left out.
    """
    asked = replace(config, output_dir=Path(), tracker=Trackers.none, reporter=ReporterConfig(), resume=False)
    return key_of({"config": plain(asked), "code": whole_code(config.plugins), "versions": versions()})


def remember(config: PipelineConfig, finished: Finished) -> None:
    """Keep a finished run for `recall`."""
    key = _run_key(config)
    path = config.output_dir / RUNS / f"{key[:12]}.json"
    write_json(path, {"schema": SCHEMA, "key": key, **asdict(finished)})


def recall(config: PipelineConfig, inputs: Mapping[str, str]) -> Finished | None:
    """Return the finished run of a configuration, if all that it used and left is there and whole.

    Args:
        config: as `remember` was given it; the output folder may have been moved.
        inputs: SHA-256 of what lies outside the output folder, as of now.

    Returns:
        None at any doubt: the run then begins, and each stage says what it finds.
    """
    root = config.output_dir
    if not (root / RUNS).is_dir():
        return None
    key = _run_key(config)
    path = root / RUNS / f"{key[:12]}.json"
    if not path.is_file():
        return None
    try:
        kept = read_json(path)
        found = Finished(**{name: kept[name] for name in Finished.__dataclass_fields__})
        whole = (kept["key"], found.inputs) == (key, dict(inputs))
        whole &= all((read_manifest(root / name) or {}).get("key") == made for name, made in found.stages.items())
    except (UserError, KeyError):
        return None
    left = found.record_sha256 | found.mask_sha256
    return found if whole and all(_digest(root / name) == digest for name, digest in left.items()) else None


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None if there is none that can be read."""
    try:
        return sha256_file(path)
    except OSError:
        return None
