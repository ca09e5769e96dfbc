"""Processes that are started from here end with the one that started them, even if that is killed. No torch here."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def tell_kernel() -> None:
    """Let the kernel end this process with its parent process. Linux alone can; what is forked must ask anew."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent() -> None:
    """Let a worker end as soon as the process that asked for it is gone.

    A worker is the child of a fork server, with which the kernel ends it (at once, where `fork_server` was loaded); a
    thread waits for the asking process, whose end of a pipe closes then.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        tell_kernel()
        threading.Thread(target=_leave_after, args=(parent.sentinel,), daemon=True, name="end-with-parent").start()


def _leave_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def reuse_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors, process-wide; other C libraries are left alone.

    By default large blocks go back to the system and return page by page: on a CPU a pass over 128 x 512 weights
    then spends up to half its time on ten thousand page faults. The peak stays, the memory is held until the end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        _ = mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # 32 MiB is the most that some accept
