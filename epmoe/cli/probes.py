"""Questions to a machine, each of which may go wrong without harm to the others."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from epmoe.cli import gpu
from epmoe.cli.machine import cores, processor
from epmoe.cli.ranks import launcher
from epmoe.cli.tables import size
from epmoe.comm import host
from epmoe.config import HEAPS
from epmoe.local import NO_MULTICAST

ASK_S = 20.0  # the first cuInit on a machine of eight GPUs may take seconds
PACKAGES = (
    *("torch", "numpy", "rich", "safetensors"),
    *("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvshmem4py-cu13", "mpi4py", "openmpi"),
    *("transformers", "matplotlib"),
)
EMPTY_KERNEL = b'extern "C" __global__ void nothing() {}'

Fact = str | list[str]


def asked(probe: Callable[..., Any], *args: object) -> Any:
    """The probe's answer, or why there is none."""
    try:
        return probe(*args)
    except Exception as error:  # noqa: BLE001  # whatever is broken here is the answer
        return f"not known: {type(error).__name__}: {error}"


def everything() -> dict[str, dict[str, Any]]:
    """All sections; ``heaps`` maps each heap to why it cannot be had, empty if it can."""
    devices = asked(ask_driver)
    return {
        "machine": {
            "system": asked(platform.platform),
            "processor": asked(processor),
            "cores": asked(lambda: f"{cores()} for this process, {os.cpu_count()} in all"),
            "memory": asked(lambda: f"{free_memory()} free"),
            "memory files": asked(memory_files),
            "pidfd": asked(pidfd),
            "open files": asked(open_files),
        },
        "software": {"python": f"{platform.python_version()} ({sys.executable})"}
        | {name: asked(version, name) for name in PACKAGES},
        "launchers": {
            "this process": asked(started_by),
            "torchrun": asked(program, "torchrun"),
            "mpirun": asked(program, "mpirun"),
            "srun": asked(program, "srun"),
        },
        "gpu": asked(gpus, devices) if isinstance(devices, dict) else {"driver": devices},
        "kernels": {"compile for sm_90a": asked(compiles)},
        "multicast": {name: asked(multicast, name) for name in NO_MULTICAST},
        "heaps": {heap: asked(why_not, heap, devices) for heap in HEAPS},
    }


def free_memory() -> str:
    """What a process here could still take."""
    return size(host.free_memory())


def memory_files() -> str:
    """Tries what a host heap is made of: a nameless file whose size is sealed."""
    fd = os.memfd_create("epmoe-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    finally:
        os.close(fd)
    return "memfd_create and seals work"


def pidfd() -> str:
    """Tries what tells a rank at once that another has ended."""
    os.close(os.pidfd_open(os.getpid()))
    return "pidfd_open works: a rank's end is seen at once"


def open_files() -> str:
    """A group needs a descriptor or two for each of its ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"at most {soft} (could be raised to {hard})"


def version(package: str) -> str:
    """Of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def started_by() -> str:
    """The launcher whose variables are set."""
    name = launcher(os.environ)
    return f"a rank started by {name}" if name else "started by no launcher: it would be one rank"


def program(name: str) -> str:
    """Beside this Python, where it fits our packages, or anywhere on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or "not found"


def ask_driver() -> dict[str, Any]:
    """The answer of ``gpu.py``, from a process of its own."""
    run = [sys.executable, "-I", gpu.__file__]
    done = subprocess.run(run, capture_output=True, timeout=ASK_S, check=False, text=True)
    if done.returncode:
        raise ChildProcessError(f"asking the driver ended with status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def gpus(answer: dict[str, Any]) -> dict[str, Fact]:
    """The driver's answer in words."""
    if "error" in answer:
        return {"driver": answer["error"]}
    devices, deaf = answer["devices"], answer["no_peer_access"]
    links, pairs = answer["nvlinks"], answer["pairs"]
    return {
        "driver": f"for CUDA {answer['cuda']}",
        "devices": [
            "{name}, {sms} SMs, capability {major}.{minor}, ".format(**d) + size(d["memory"])
            for d in devices
        ]
        or "none",
        "memory that can be mapped by peers": [
            f"{n}: {'yes' if d['vmm'] and d['passes_fds'] else 'no'}" for n, d in enumerate(devices)
        ]
        or "none",
        "peer access": f"all {pairs} pairs" if not deaf else [f"not {pair}" for pair in deaf],
        "nvlinks up": links if isinstance(links, str) else ", ".join(map(str, links)) or "none",
    }


def compiles() -> str:
    """Compiles a kernel that does nothing; needs neither driver nor GPU."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    error, made = nvrtc.nvrtcCreateProgram(EMPTY_KERNEL, b"nothing.cu", 0, [], [])
    if int(error) == 0:
        (error,) = nvrtc.nvrtcCompileProgram(made, 1, [b"--gpu-architecture=sm_90a"])
    if int(error):
        return f"no: NVRTC answers {error.name}"
    major, minor = nvrtc.nvrtcVersion()[1:]
    return f"yes, by NVRTC {major}.{minor}"


def multicast(name: str) -> str:
    """Our launchers switch it off for what runs below us; nothing here uses it."""
    value = os.environ.get(name)
    if value == NO_MULTICAST[name]:
        return f"{value} (off)"
    shown = "not set" if value is None else value
    return f"{shown}; launch/*.sh and epmoe's own ranks set {NO_MULTICAST[name]} (off)"


def why_not(heap: str, devices: dict[str, Any] | str) -> str:
    """Why a heap cannot be had here; empty if it can."""
    if heap == "host":
        return host.why_not()
    if importlib.util.find_spec(f"epmoe.comm.{heap}") is None:
        reason = f"this version has no {heap} heap"
        if heap == "nvshmem" and importlib.util.find_spec("nvshmem") is None:
            reason += "; nvshmem4py is not installed"
        return reason
    if isinstance(devices, str):
        return devices
    if "error" in devices:
        return str(devices["error"])
    if not devices["devices"]:
        return "the driver knows no device"
    reason = str(importlib.import_module(f"epmoe.comm.{heap}").why_not())
    deaf = ", ".join(devices["no_peer_access"])
    return reason or (f"no peer access: {deaf}" if deaf else "")
