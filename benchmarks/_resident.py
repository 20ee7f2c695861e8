"""Resident memory of this process, read from /proc."""

from pathlib import Path


def forget_peak() -> int:
    """Resident bytes now; Linux counts its peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Most resident bytes since ``forget_peak``, mapped files included."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Now."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
