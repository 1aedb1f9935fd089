"""Headers of kernels compiled for this machine, with what they take from CUDA stood in for."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from epmoe.kernels.compile import SOURCES

STAND_INS = Path(__file__).parent / "kernels" / "on_cpu"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def built(folder, source, headers, constants=None):
    """``source`` of the stand-ins as a library, with ``headers`` of the kernels as they are."""
    for file in (*STAND_INS.iterdir(), *(SOURCES / name for name in headers)):
        shutil.copy(file, folder)
    run = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
    run += [f"-D{name}={value}" for name, value in (constants or {}).items()]
    made = folder / "made.so"
    subprocess.run([*run, "-o", made, folder / source], check=True)
    return ctypes.CDLL(str(made))
