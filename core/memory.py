"""How much memory there is, and refusals of what cannot fit, before it is asked for. No torch here."""

import os
from pathlib import Path

from core.choices import UserError

GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine_bytes() -> int:
    """Memory that this process may have: the machine's, or its container's limit."""
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = GROUP_LIMIT.read_text().strip() if GROUP_LIMIT.is_file() else ""
    return min(here, int(limit)) if limit.isdigit() else here


def check_fits(what: str, needed: int, there: int, change: str) -> None:
    """Raise `UserError` where something is larger than the memory for it.

    Args:
        what: it, with the settings that make it large. needed: bytes that it takes at the very least. there: bytes
            of the device. change: what to do.
    """
    if needed > there:
        found = f"{what} takes at least {needed / 1e9:,.1f} GB of memory, here are {there / 1e9:,.1f} GB"
        raise UserError(f"{found}: {change}")
