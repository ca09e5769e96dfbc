"""What things are told apart by: hashes of files, arrays, inputs and source code, and where a result comes from.

The source code is the project's own and that of plugins, which are imported here.
"""

import ast
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

from core.choices import ENTERED, PLUGIN, NotRegistered, Registry, at_home
from core.config import PROJECT_ROOT, UserError

if TYPE_CHECKING:
    import numpy as np

PACKAGES = ("torch", "torchvision", "torch-geometric", "numpy", "scikit-learn", "safetensors", "pillow")


RACE_NS = 50_000_000  # a file changed this shortly before it was read may change again without a new time


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; read once by a process unless the file changes."""
    about = path.stat()
    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < RACE_NS:
        return _sha256(path)
    return _sha256_of(path, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, *_: int) -> str:
    """As `_sha256`, kept under what the file system says of the file."""
    return _sha256(path)


def sha256_arrays(arrays: Iterable["np.ndarray"]) -> str:
    """SHA-256 over dtype, shape and bytes of arrays."""
    import numpy as np  # here, because help pages need what stands below and no arrays

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def key_of(inputs: Mapping[str, object]) -> str:
    """SHA-256 of a JSON-able mapping, independent of key order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _sources() -> dict[str, bytes]:
    """Read the nine scripts and every room, by file name relative to the project; tests and benchmarks aside."""
    rooms = [
        path.parent for path in PROJECT_ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "benchmarks")
    ]
    files = [path for folder in (PROJECT_ROOT, *rooms) for path in folder.glob("*.py")]
    return {path.relative_to(PROJECT_ROOT).as_posix(): path.read_bytes() for path in files}


_BEGAN = _sources()  # the source files when this process began to import them: what it runs, whatever is edited later


@lru_cache
def _imported() -> dict[str, bytes]:
    """Return the source files that this process runs, by name.

    Raises:
        UserError: they were changed while they were imported (this is first asked for soon after), so that nobody
            knows which of two versions runs.
    """
    now = _sources()
    if changed := sorted(name for name in {*now, *_BEGAN} if now.get(name) != _BEGAN.get(name)):
        raise UserError(f"{changed[0]} was changed while this run started: run it again")
    return _BEGAN


@cache
def _files_of(module: str) -> tuple[str, ...]:
    """Name the project's files that run when `module` (or a name in it, such as "data.GraphDataset") is imported."""
    parts = module.split(".")
    stems = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return tuple(name for stem in stems for name in (f"{stem}/__init__.py", f"{stem}.py") if name in _imported())


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Go through statements and those inside them; expressions, which are most of a source, import nothing."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, part, ()))


@cache
def _imports_of(name: str) -> tuple[str, ...]:
    """List the dotted names that a file imports at any depth, in functions too; `from a import b` imports a.b."""
    found: list[str] = []
    for node in _statements(ast.parse(_imported()[name]).body):
        if isinstance(node, ast.Import):
            found += [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split("/")[: -node.level] if node.level else []  # one dot is the file's own folder
            base = [*package, *([node.module] if node.module else [])]
            found += [".".join([*base, item.name]) for item in node.names]
    return tuple(found)


@lru_cache
def closure(module: str) -> tuple[str, ...]:
    """Name all files of this project that importing a module, and calling what is in it, can run.

    The files are found from the source, so that a new import counts from the day it is written. A module imported by
    a name that is computed at run time would not be seen: this project has none.

    Args:
        module: dotted, such as "stages.graphs".

    Returns:
        File names relative to the project, sorted; the module's own file and the `__init__.py` of rooms among them.
    """
    assert f"{module.replace('.', '/')}.py" in _imported(), f"{module} is no module of this project"
    found: set[str] = set()
    ahead = {*_files_of(module)}
    while ahead:
        found.add(name := ahead.pop())
        ahead |= {file for imported in _imports_of(name) for file in _files_of(imported)} - found
    return tuple(sorted(found))


def _hash_of(names: Iterable[str]) -> str:
    return key_of({name: hashlib.sha256(_imported()[name]).hexdigest() for name in names})


@lru_cache
def code_key(module: str) -> str:
    """Hash the source files that a module's results depend on, its `closure`: changed code is a changed input.

    Raises:
        UserError: as `_imported`.
    """
    return _hash_of(closure(module))


def whole_code(plugins: Sequence[Path] = ()) -> str:
    """Hash all source files that this process runs, these plugins included."""
    return key_of({"project": _hash_of(_imported()), "plugins": list(load_plugins(plugins).values())})


def check_same_code(other: str, plugins: Sequence[Path] = ()) -> None:
    """See that this process runs the code of the one that started it, whose `whole_code` is given.

    Raises:
        UserError: files were edited in between.
    """
    if whole_code(plugins) != other:
        raise UserError("source files were changed since this run began, so that its processes differ: start it again")


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


# --- plugins ----------------------------------------------------------------------------------------------

GUIDE = "docs/extending.md"


@dataclass(frozen=True)
class Plugin:
    """A plugin as this process runs it.

    Args:
        path: as it was given first. sha256: of the bytes that were imported. registered: such as "metric oddity".
    """

    path: Path
    sha256: str
    registered: tuple[str, ...]


class _Bytes(SourceFileLoader):
    """Import the bytes that were hashed: a file that is read twice may have changed, and so may a `.pyc` of it."""

    def __init__(self, name: str, path: Path, data: bytes):
        super().__init__(name, str(path))
        self._data = data

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._data, self.path)


_PLUGINS: dict[Path, Plugin] = {}  # resolved path -> plugin


def load_plugins(paths: Sequence[Path]) -> dict[str, str]:
    """Import plugins, each once for the life of this process: Python files that register something.

    A plugin is code, which runs with all the rights of whoever started this process. A file that is edited after it
    was imported is not imported again, and keeps the hash of what runs.

    Returns:
        Path as given -> SHA-256 of the bytes that were imported.

    Raises:
        UserError: a file is missing or no `.py` file, cannot be imported, or registers nothing or a name that is taken.
    """
    return {str(path): plugin(path).sha256 for path in paths}


def loaded_plugins() -> tuple[Path, ...]:
    """The plugins that this process has imported, in order, for processes that it starts."""
    return tuple(_PLUGINS)


def plugin(path: Path) -> Plugin:
    """A plugin, imported unless it was.

    Raises:
        UserError: as `load_plugins`.
    """
    place = at_home(path).resolve()
    if place not in _PLUGINS:
        if place.suffix != ".py" or not place.is_file():
            found = "is not there" if not place.exists() else "is no Python file"
            raise UserError(f"plugins names {path}, which {found}: give the path of a file that ends in .py")
        try:
            data = place.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the plugin {path} ({error.strerror}): check its permissions") from None
        _PLUGINS[place] = Plugin(path, hashlib.sha256(data).hexdigest(), _registered_by(place, path, data))
    return _PLUGINS[place]


def _registered_by(place: Path, path: Path, data: bytes) -> tuple[str, ...]:
    """Import a plugin's bytes; returns what it registers. An import that fails leaves nothing registered.

    Raises:
        UserError: as `load_plugins`.
    """
    # The name follows from the path alone, so that other processes find a plugin's classes under the same name.
    name = f"{PLUGIN}{place.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, place, loader=_Bytes(name, place, data))
    assert spec
    assert spec.loader
    module, before = importlib.util.module_from_spec(spec), len(ENTERED)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        for entry in _by_others(before):
            entry[0].remove(entry[1])
            ENTERED.remove(entry)
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(_failure(place, path, error)) from None
    made = tuple(f"{registry.kind} {entered}" for registry, entered in _by_others(before))
    if not made:
        del sys.modules[name]
        raise UserError(f"the plugin {path} registers nothing: let it register a method or another part, see {GUIDE}")
    return made


def _by_others(begin: int) -> list[tuple[Registry, str]]:
    """What was registered from a place in `ENTERED` on, without what files of the project registered.

    A plugin's imports may be the first of a room whose files register their own.
    """
    return [
        (registry, name)
        for registry, name in ENTERED[begin:]
        if f"{registry.modules[name].replace('.', '/')}.py" not in _BEGAN
    ]


def _failure(place: Path, path: Path, error: BaseException) -> str:
    """What is wrong with a plugin that cannot be imported, and in which line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(place)]
    line = (
        error.lineno if isinstance(error, SyntaxError) and error.filename == str(place) else lines[-1] if lines else 1
    )
    if isinstance(error, NotRegistered):
        return f"the plugin {path}, line {line}: {error}"
    what = " ".join(f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}".split())
    return f"the plugin {path}, line {line}, cannot be imported ({what.removesuffix(':').strip()}): correct that line"
