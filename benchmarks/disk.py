"""One process's operations on the files below a folder: counted, and stopped at one of them.

Python's own audit events name every open, rename, removal and new folder before it happens; fsync and the writer of
safetensors (which opens its file outside Python) are wrapped. Hooks cannot be taken out again: use a child process.
"""

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch

WRITES = ("open", "save", "fsync", "rename", "remove", "mkdir", "rmdir")
FILLS = ("open", "save")  # what comes after these can be torn: bytes of a file


@dataclass(frozen=True)
class Operation:
    """What is about to happen; `target` is where a rename leads."""

    kind: str
    path: str
    target: str = ""


Meet = Callable[[int, Operation], None]


def _full(path: Any, folder: int = -1) -> str:
    """A path as the system sees it; `folder` is an open folder's number, or -1."""
    path = os.fsdecode(path)
    return os.path.abspath(os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if folder >= 0 else path)  # noqa: PTH100, PTH115, PTH118


def _operation(event: str, given: tuple) -> Operation | None:
    """The operation that an audit event announces."""
    if event == "open" and not isinstance(given[0], int):
        writes = given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return Operation("open" if writes else "read", _full(given[0]))
    if event == "os.rename":
        return Operation("rename", _full(given[0], given[2]), _full(given[1], given[3]))
    if event in ("os.remove", "os.rmdir"):
        return Operation(event[3:], _full(given[0], given[1]))
    return Operation("mkdir", _full(given[0], given[2])) if event == "os.mkdir" else None


def watch(root: Path, meet: Meet, kinds: tuple[str, ...] = WRITES) -> None:
    """From now on call `meet(number, operation)` before each operation below `root`, from number 0 on.

    What `meet` raises is what the operation raises.
    """
    start, count, inside = f"{os.path.abspath(root)}{os.sep}", [0], [False]  # noqa: PTH100

    def pass_on(operation: Operation | None) -> None:
        if operation is None or operation.kind not in kinds or inside[0]:
            return
        if f"{operation.path}{os.sep}".startswith(start):
            number, inside[0] = count[0], True
            count[0] += 1
            try:
                meet(number, operation)
            finally:
                inside[0] = False

    def audit(event: str, given: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            pass_on(_operation(event, given))

    for name in ("fsync", "fdatasync"):
        setattr(os, name, _announced(getattr(os, name), lambda file, *_: _synced(file), pass_on))
    for module in (safetensors.numpy, safetensors.torch):
        known = module.serialize_file
        vars(module)["serialize_file"] = _announced(
            known, lambda _, path, *__, **___: Operation("save", _full(path)), pass_on
        )
    import sys

    sys.addaudithook(audit)


def _synced(file: Any) -> Operation:
    number = file if isinstance(file, int) else file.fileno()
    return Operation("fsync", os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115


def _announced(function: Callable, named: Callable[..., Operation], pass_on: Callable) -> Callable:
    def announced(*arguments: Any, **more: Any) -> Any:
        pass_on(named(*arguments, **more))
        return function(*arguments, **more)

    return announced


# --- faults: each is armed in the child, before it begins ------------------------------------------------


def killed_at(root: Path, number: int) -> None:
    """End, as by kill -9, just before operation `number`."""
    watch(root, lambda now, _: os.kill(os.getpid(), signal.SIGKILL) if now == number else None)


def killed_after(seconds: float) -> None:
    """End, at whatever instruction, after so many seconds of processor time; no handler runs."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def torn_at(root: Path, number: int, size: int, killed: bool) -> None:
    """Let no file grow beyond `size` bytes from operation `number` on: its writer is killed, or gets an error."""

    def meet(now: int, _: Operation) -> None:
        if now == number:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    watch(root, meet)


def refused_at(root: Path, number: int, error: int, lasting: bool) -> None:
    """Fail operation `number` (reads count) with an error of the system; `lasting`: and what would add to the disk."""

    def meet(now: int, operation: Operation) -> None:
        if now == number or (lasting and now > number and operation.kind in ("open", "save", "mkdir", "fsync")):
            raise OSError(error, os.strerror(error), operation.path)

    watch(root, meet, ("read", *WRITES))


def with_few_files(more: int) -> None:
    """Leave room for `more` open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + more, 4096))  # noqa: PTH208


# --- what a power cut would leave --------------------------------------------------------------------------


def unsynced(operations: list[Operation]) -> list[str]:
    """Renames that a power cut could bring out of order: complaints, each with its path.

    The bytes of what is renamed must be on the disk before it gets its final name (a folder: every file in it, and
    the folder), and the folder that holds the name after it.
    """
    said = []
    for place, operation in enumerate(operations):
        if operation.kind != "rename":
            continue
        before, after = operations[:place], operations[place + 1 :]
        written = {o.target or o.path for o in before if o.kind in (*FILLS, "rename")} - {operation.path}
        inside = {path for path in written if path.startswith(operation.path + os.sep)}
        gone = {o.path for o in before if o.kind in ("remove", "rename")} - {o.target for o in before}
        last = {path: max(n for n, o in enumerate(before) if path in (o.path, o.target)) for path in inside - gone}
        synced = {o.path for o in before if o.kind == "fsync"}
        renamed = {o.target: o.path for o in before if o.kind == "rename"}
        bare = [path for path in (operation.path, *last) if path not in synced and renamed.get(path) not in synced]
        said += [f"{path} is not synced before {operation.target} appears" for path in bare]
        folder = str(Path(operation.target).parent)
        if Operation("fsync", folder) not in after and not folder.endswith(".part"):
            said.append(f"{folder} is not synced after {operation.target} appeared")
    return said
