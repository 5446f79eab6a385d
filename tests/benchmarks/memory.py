"""Resident memory of this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path


def restart_peak() -> int:
    """Forget the highest memory so far, and return the present one [bytes]."""
    gc.collect()
    try:
        # Freed memory that stays resident would be used again and not be counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):
        return peak()
    return present()


def present() -> int:
    """Resident memory now [bytes]."""
    return _status("VmRSS")


def peak() -> int:
    """Resident memory at its highest [bytes]."""
    return _status("VmHWM")


def available() -> float:
    """Memory that is free [bytes]; unlimited where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024.0 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):
        return float("inf")


def _status(key: str) -> int:
    try:
        # Linux hands ru_maxrss on to a child process, whose own memory may be far less.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition(f"{key}:")[2].split()[0])
    except (OSError, IndexError):
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found if sys.platform == "darwin" else 1024 * found
