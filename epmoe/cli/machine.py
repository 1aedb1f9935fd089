"""What a figure was measured on, in a few words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Cores, processor, memory, Python, torch; a fact that cannot be had says so."""
    return {
        "cores": f"{cores()} cores",
        "processor": processor(),
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
    }


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """The processor's name from /proc/cpuinfo, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
