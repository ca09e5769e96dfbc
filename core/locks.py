"""Who may do what while several processes, on NFS 4 of several machines, work in one folder.

A lock is a file that is locked, not one that is there: what a killed process leaves behind locks nothing.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.artifacts import open_to_lock, told
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
