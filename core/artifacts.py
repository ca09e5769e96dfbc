"""Everything that reaches the disk: files that appear whole or not at all, and how they are read back.

What is read back carries a digest of its content, which the writers here put in and the readers ask for: a file that
was changed, cut or exchanged is told from one that was written. What is renamed to its final name is on the disk
first, so that a power cut leaves no empty file under it. No torch here: reports are rebuilt from JSON in a second.
"""

import errno
import glob
import hashlib
import io
import json
import math
import os
import platform
import shutil
import stat
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError

import numpy as np

from core.choices import MachineError, UserError
from core.hashes import key_of, sha256_arrays

SCHEMA = "mimu/4"
HISTORY = "history.json"
DIGEST = "digest"

# --- what goes wrong --------------------------------------------------------------------------------------

_ROOM = "make room there"
_FILES = "raise the limit of open files (ulimit -n)"
ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EIO: "check the disk",
    errno.EROFS: "check the disk, which was writable before",
    errno.ENOMEM: "free some memory",
    errno.ESTALE: "check the network disk",
    errno.ENOENT: "leave its folder alone while a run works there",
}
_wrote = [False]  # whether this process has written anything: then a disk that cannot be written has failed


class DamagedError(UserError):
    """A file that is not what was written; `found` names it and says what is wrong."""

    def __init__(self, path: Path, why: str):
        self.found = f"{path} is damaged ({why})"
        super().__init__(f"{self.found}: copy it again from where it is whole, or give another path")


def trouble(path: Path, error: OSError, doing: str) -> Exception:
    """An operating system's error at a file, as one sentence that blames the right thing."""
    what = f"cannot {doing} {path} ({error.strerror})"
    if doing == "read" and error.errno not in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE):
        missing = isinstance(error, FileNotFoundError)
        found = f"there is no file {path}: check the path" if missing else f"{what}: check its permissions"
        return UserError(found)
    if error.errno in ADVICE and (error.errno != errno.EROFS or _wrote[0]):
        return MachineError(f"{what}: {ADVICE[error.errno]} and run again, what is finished is kept")
    return UserError(f"{what}: choose a folder that can be written with --output-dir")


@contextmanager
def told(path: Path, doing: str = "write") -> Generator[None]:
    """Say in one sentence what goes wrong with a file inside the block.

    Raises:
        MachineError: the disk is full or broken, or some limit of the system is reached.
        UserError: the place cannot be written (or read) at all.
    """
    try:
        yield
    except OSError as error:
        raise trouble(path, error, doing) from error


# --- the few operations that change the disk --------------------------------------------------------------


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def _write_all(file: int, data: memoryview) -> None:
    """Write every byte: the system may take fewer at a time."""
    while data:
        data = data[os.write(file, data) :]
    _wrote[0] = True


def _put(path: Path, data: bytes, lasting: bool) -> None:
    """Write a file; `lasting`: and wait until it is on the disk."""
    file = _create(path)
    try:
        _write_all(file, memoryview(data))
        if lasting:
            os.fsync(file)
    finally:
        os.close(file)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_tree(folder: Path) -> None:
    """Wait for all files below a folder, then for the folders that hold their names."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


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
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-{_host()}.{kind}"):
        pid = leftover.suffixes[-2][1:].partition("-")[0]
        if pid.isdigit() and _other_process_runs(int(pid)):
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


# --- writing ----------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path, lasting: bool = True) -> Generator[Path]:
    """Yield a temporary path that becomes `path`, whole, when the block, which only writes it, ends without an error.

    Args:
        lasting: wait for the disk. Not needed for what is made from other files and checked when it is used again.

    Raises:
        MachineError, UserError: as `told`.
    """
    temporary = _unfinished(path, "tmp")
    try:
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(path, "tmp")
            yield temporary
            if lasting:
                _sync(temporary)
            os.replace(temporary, path)
            if lasting:
                _sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Generator[Path]:
    """Yield a temporary folder that becomes `folder`, whole, when the block ends without an error.

    A file system's errors inside the block are taken for errors of the folder.

    Raises:
        MachineError, UserError: as `told`.
    """
    part = new_part(folder)
    try:
        with told(folder):
            yield part
        publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def new_part(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then published under that name."""
    part = _unfinished(folder, "part")
    with told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder, "part")
        part.mkdir()
    return part


def publish(part: Path, folder: Path) -> None:
    """Rename a filled folder to its final name, once all that it holds is on the disk."""
    with told(folder):
        _sync_tree(part)
        os.replace(part, folder)
        _sync(folder.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write bytes into a folder that is being filled."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _put(path, data, lasting=False)


def write_bytes(path: Path, data: bytes, lasting: bool = True) -> None:
    """Write bytes atomically; `lasting` as for `writing`."""
    with writing(path, lasting) as temporary:
        _put(temporary, data, lasting=False)


def write_text(path: Path, text: str, lasting: bool = True) -> None:
    """Write UTF-8 text atomically; `lasting` as for `writing`."""
    write_bytes(path, text.encode(), lasting)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, atomically."""
    write_bytes(target, read_bytes(source))


def write_json(path: Path, value: Mapping[str, object], lasting: bool = True) -> None:
    """Write a JSON object with its digest, atomically, keys in the order given (a table's survives); no NaN."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    plain.pop(DIGEST, None)
    write_text(path, json.dumps(plain | {DIGEST: key_of(plain)}, indent=1) + "\n", lasting)


def tensors_digest(tensors: Mapping[str, np.ndarray], facts: dict) -> str:
    """The digest of a safetensors file that `write_tensors` writes."""
    return key_of({"facts": facts, "tensors": {name: sha256_arrays([value]) for name, value in tensors.items()}})


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> None:
    """Write arrays as safetensors with their digest, atomically; `facts` become JSON under one metadata key.

    One key, because the library writes several in an order that changes, and equal content must be equal bytes.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    plain = json.loads(json.dumps(dict(facts)))
    plain.pop(DIGEST, None)
    plain |= {DIGEST: tensors_digest(arrays, plain)}
    write_bytes(path, save(arrays, metadata={"facts": json.dumps(plain, sort_keys=True)}))


@contextmanager
def extending(path: Path, begin: int) -> Generator[Callable[[memoryview], None]]:
    """Yield what appends bytes to a file that is cut off at byte `begin`; all is on the disk when the block ends.

    Raises:
        MachineError, UserError: as `told`.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def append(data: memoryview) -> None:
        with told(path):
            _write_all(file, data.cast("B") if data.nbytes else memoryview(b""))

    try:
        with told(path):
            os.ftruncate(file, begin)
            os.lseek(file, begin, os.SEEK_SET)
        yield append
        with told(path):
            os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def appending_array(
    path: Path, shape: tuple[int, ...], dtype: type = np.float32
) -> Generator[Callable[[np.ndarray], None]]:
    """A new .npy file that is filled row by row from the front: what is written leaves memory at once.

    Raises:
        ValueError: another number of values was written than `shape` holds.
        MachineError, UserError: as `told`.
    """
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    written = 0
    with extending(path, 0) as append_bytes:

        def append(rows: np.ndarray) -> None:
            nonlocal written
            written += rows.size
            append_bytes(np.ascontiguousarray(rows, dtype).data)

        append_bytes(header.getbuffer())
        yield append
    if written != math.prod(shape):
        raise ValueError(f"{path} needs {math.prod(shape)} values, {written} were written")


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with told(path, "remove"):
        path.unlink(missing_ok=True)


def open_to_lock(path: Path) -> int:
    """An open, empty file that is there to be locked; made if it is not there.

    Raises:
        MachineError, UserError: as `told`, or something else than a file has its name.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            kind = path.lstat().st_mode
            if not stat.S_ISREG(kind):
                what = "folder" if stat.S_ISDIR(kind) else "link" if stat.S_ISLNK(kind) else "special file"
                raise UserError(f"{path} is a {what}, where a lock file has its place: remove it and run again")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


# --- reading ----------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        UserError: there is no such file, or it cannot be read.
        MachineError: as `told`.
    """
    with told(path, "read"):
        return path.read_bytes()


def _without_digest(path: Path, value: dict, digest: Callable[[dict], str], foreign: bool) -> dict:
    """What was read less its digest, once that is found to be right."""
    promised = value.pop(DIGEST, None)
    if promised is None and not foreign:
        raise DamagedError(path, "it has no digest, as files of earlier versions")
    if promised is not None and promised != digest(value):
        raise DamagedError(path, "its content is not what its digest says")
    return value


def read_json(path: Path, foreign: bool = False) -> dict:
    """One JSON object, without its digest.

    Args:
        foreign: it may be of another origin, without a digest; one that it has is asked all the same.

    Raises:
        UserError, MachineError: as `read_bytes`.
        DamagedError: it is not what `write_json` wrote.
    """
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"no whole JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedError(path, f"a JSON {type(value).__name__}, not an object")
    return _without_digest(path, value, key_of, foreign)


def read_tensors(path: Path, foreign: bool = False) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and facts of a safetensors file, the digest left out; `foreign` as for `read_json`.

    Raises:
        UserError, MachineError: as `read_bytes`.
        DamagedError: it is not what `write_tensors` wrote.
    """
    from safetensors import SafetensorError, safe_open

    with told(path, "read"), path.open("rb"):
        pass  # the library's own errors do not tell a full table of open files from a damaged file
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(path, f"not a whole safetensors file of this project: {error}") from None
    if not isinstance(facts, dict):
        raise DamagedError(path, f"its facts are a JSON {type(facts).__name__}, not an object")
    return tensors, _without_digest(path, facts, lambda plain: tensors_digest(tensors, plain), foreign)


def read_array(path: Path) -> np.ndarray:
    """A .npy file as a read-only memory map.

    Raises:
        UserError, MachineError: as `read_bytes`.
        DamagedError: cut off, or no array.
    """
    with told(path, "read"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # numpy guesses at a header that it cannot parse
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, TokenError, UserWarning) as error:
            raise DamagedError(path, f"no whole array: {' '.join(str(error).split())}") from None
        if array.offset + array.nbytes != path.stat().st_size:
            raise DamagedError(path, "it holds more or less than its header says")
    return array


def map_rows(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The first bytes of a file as a read-only memory map, uint8 of this shape. Raises OSError or ValueError."""
    return np.memmap(path, np.uint8, "r", shape=shape)
