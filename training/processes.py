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
