"""What the NVIDIA driver says; run as a program of its own, with nothing but the standard library.

A broken driver may hang or end the process that asks it, so ``doctor`` runs this file in another
one, with a limit, and reads the JSON it prints.  No context is made: no GPU memory is taken.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

ATTRIBUTES = {  # CUdevice_attribute
    "sms": 16,
    "major": 75,
    "minor": 76,
    "vmm": 102,  # virtual memory management: what a CUDA heap is made of
    "passes_fds": 103,  # its allocations can be handed over as descriptors
}
ACCESS, NATIVE_ATOMICS = 2, 3  # CUdevice_P2PAttribute
NVLINKS = 18  # the most links a GPU of this generation has


def ask() -> dict[str, Any]:
    """Driver version, devices with their attributes, who reaches whom, active NVLinks."""
    cuda = ctypes.CDLL("libcuda.so.1")
    checked(cuda, "cuInit", 0)
    version = ctypes.c_int()
    checked(cuda, "cuDriverGetVersion", ctypes.byref(version))
    count = ctypes.c_int()
    checked(cuda, "cuDeviceGetCount", ctypes.byref(count))
    devices = [device(cuda, number) for number in range(count.value)]
    pairs = [(a, b) for a in range(count.value) for b in range(count.value) if a != b]
    deaf = [f"{a}->{b}" for a, b in pairs if not p2p(cuda, ACCESS, a, b)]
    return {
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "devices": devices,
        "pairs": len(pairs),
        "no_peer_access": deaf,
        "nvlinks": nvlinks(count.value),
    }


def device(cuda: ctypes.CDLL, number: int) -> dict[str, Any]:
    """One device as the driver numbers it."""
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    checked(cuda, "cuDeviceGet", ctypes.byref(handle), number)
    checked(cuda, "cuDeviceGetName", name, 128, handle)
    checked(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    found: dict[str, Any] = {"name": name.value.decode(), "memory": memory.value}
    for key, attribute in ATTRIBUTES.items():
        value = ctypes.c_int()
        checked(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        found[key] = value.value
    return found


def p2p(cuda: ctypes.CDLL, attribute: int, a: int, b: int) -> int:
    """An attribute of the pair: ``a`` reaching into ``b``."""
    value = ctypes.c_int()
    checked(cuda, "cuDeviceGetP2PAttribute", ctypes.byref(value), attribute, a, b)
    return value.value


def nvlinks(devices: int) -> list[int] | str:
    """Active links of each device by the management library, or why it does not say."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        checked(nvml, "nvmlInit_v2")
        return [links(nvml, number) for number in range(devices)]
    except (OSError, AttributeError) as error:
        return f"not known: {error}"


def links(nvml: ctypes.CDLL, number: int) -> int:
    """Links of one device that are up; a link that does not exist is none."""
    handle, up, state = ctypes.c_void_p(), 0, ctypes.c_int()
    checked(nvml, "nvmlDeviceGetHandleByIndex_v2", number, ctypes.byref(handle))
    for link in range(NVLINKS):
        if nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(state)) == 0:
            up += state.value
    return up


def checked(library: ctypes.CDLL, name: str, *args: object) -> None:
    """Call; anything but 0 is an ``OSError`` that names the call."""
    code = getattr(library, name)(*args)
    if code:
        raise OSError(f"{name} answers {code}")


if __name__ == "__main__":
    try:
        answer = ask()
    except (OSError, AttributeError) as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)
