"""Who may do what while several processes work in one folder."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from artifacts import open_to_lock
from config import UserError
from observe import log


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold `path` for the length of the block; other processes (on NFS 4 other machines too) wait. Leaves no file.

    Raises:
        UserError: the place cannot be written, or its file system has no locks.
    """
    try:
        while True:
            file = open_to_lock(path)
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
