"""The machine that figures were measured on, in words."""

import os
import platform
import resource
import sys
from pathlib import Path


def hardware(device: str) -> dict[str, str]:
    """CPU, device and Python."""
    return {"CPU": cpu(), "device": device, "Python": platform.python_version()}


def cpu() -> str:
    """The processor's name and how many of its cores this process may use."""
    return f"{cpu_name()}, {cores()} cores"


def cores() -> int:
    """Cores that this process may use."""
    available = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if available else os.cpu_count() or 1


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_host_memory() -> int:
    """Bytes that this process held at most, everything included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
