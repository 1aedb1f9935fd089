"""Heap of NVSHMEM: its symmetric memory, reached by plain addresses like every other heap's.

NVSHMEM is process-wide and collective to start, to allocate and to end, and none of its waits has
a limit.  So it is started here by name (``init`` with an id that the group carried), only after
every rank has passed every check that can fail alone; and ``close`` leaves its memory alone, since
giving it back would wait for peers that may be dead: that is ``finalize``, for a program that ends
in order.  Never multicast: NVLS is switched off before NVSHMEM sees the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import Any

import numpy as np
import torch

from epmoe.comm import device
from epmoe.comm.device import DeviceSlabs, driver
from epmoe.comm.group import Group
from epmoe.comm.layout import ALIGN
from epmoe.errors import EpmoeError

log = logging.getLogger("epmoe")

OWN = 128 << 20  # bytes of a symmetric heap beside the slab: NVSHMEM's own tables and teams
ALWAYS = {  # whatever was set: peers are reached by load or not at all, and never by multicast
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_DISABLE_NCCL": "1",
}
STARTED = (2, 3, 4)  # nvshmemx_init_status_t: initialised, and its two states of shared GPUs


class NvshmemHeap(DeviceSlabs):
    """One slab on the current CUDA device of every rank, allocated by NVSHMEM.

    Collective to make.  NVSHMEM's ranks are the group's: a process that has started NVSHMEM with
    other ranks cannot have this heap.  A peer that no load can reach is an error that names it.
    """

    def __init__(self, group: Group, nbytes: int, *, generation: int, limit_s: float) -> None:
        """All ranks get the heap or all raise, except that a rank that dies inside NVSHMEM's own
        collectives (start, allocation) leaves the others waiting there."""
        super().__init__(group.rank, group.size, generation, nbytes)
        self._base = 0  # what NVSHMEM returned; the slab starts at the next multiple of ALIGN
        with group.guarded("find NVSHMEM", limit_s):
            self._driver, self._core, self._bindings = driver(), *_modules()
            self._expect_gpu()
            self._device = torch.cuda.current_device()
            torch.empty(1, device="cuda")  # NVSHMEM wants a context, and takes the current one
            self._expect_free(nbytes)
        self._start(group, limit_s)
        with group.guarded("make the slab", limit_s):
            self._base = int(self._bindings.malloc(nbytes + ALIGN))  # collective
            if not self._base:
                raise EpmoeError(
                    f"rank {group.rank}: NVSHMEM has no {nbytes / 2**20:.1f} MiB left in its heap; "
                    "NVSHMEM_SYMMETRIC_SIZE must be larger if it was set or started before"
                )
        with group.guarded("map the peers", limit_s):
            start = -(-self._base // ALIGN) * ALIGN
            for rank in range(group.size):
                address = start if rank == group.rank else int(self._bindings.ptr(start, rank))
                if not address:
                    raise EpmoeError(
                        f"rank {group.rank} cannot reach {group.peers[rank]} by load; rounds need "
                        "one NVLink domain"
                    )
                self._addresses.append(address)
        with group.guarded("clear the slab", limit_s):  # no peer may write before this ends
            self._clear()
        log.info("nvshmem heap: %d slabs of %.1f MiB", group.size, nbytes / 2**20)

    def close(self) -> None:
        """Forget the slabs after this device has finished; local, waits for no peer.

        The memory stays NVSHMEM's until ``finalize`` or the end of the process.
        """
        if self._addresses:
            torch.cuda.synchronize()
        self._addresses.clear()

    def finalize(self) -> None:
        """Give the slab back and end NVSHMEM.  Collective, without a limit: every rank must come.

        Only for a program that ends in order, and after every other user of NVSHMEM has finished;
        the end of the process does it as well.
        """
        self.close()
        if self._base:
            self._bindings.free(self._base)
            self._core.finalize()
            self._base = 0

    def _start(self, group: Group, limit_s: float) -> None:
        """Start NVSHMEM unless every rank of the group has done so already."""
        size, rank = group.size, group.rank
        with group.guarded("look at NVSHMEM", limit_s):
            self._core.get_version()  # loads its library
            running = int(self._bindings.init_status()) in STARTED
            if running and (self._core.my_pe(), self._core.n_pes()) != (rank, size):
                raise EpmoeError(
                    f"rank {rank} of {size}: this process is rank {self._core.my_pe()} of "
                    f"{self._core.n_pes()} in NVSHMEM already"
                )
        answers = group.allgather(bytes([running]), what="NVSHMEM runs", limit_s=limit_s)
        if len(set(answers)) > 1:
            who = ", ".join(str(r) for r, answer in enumerate(answers) if answer != b"\1")
            raise EpmoeError(f"NVSHMEM runs on some ranks already, but not on rank {who}")
        if running:
            return
        with group.guarded("prepare NVSHMEM", limit_s):
            os.environ.update(ALWAYS)
            os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(self._nbytes + OWN))
            if len({peer.host for peer in group.peers}) == 1:
                os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")
            uid = self._core.get_unique_id(empty=rank != 0)
        said = group.allgather(uid._data.tobytes(), what="NVSHMEM id", limit_s=limit_s)[0]
        uid._data[:] = np.frombuffer(said, dtype=uid._data.dtype)
        with group.guarded("start NVSHMEM", limit_s):
            here = importlib.import_module("cuda.core").Device(self._device)
            here.set_current()
            self._core.init(device=here, uid=uid, rank=rank, nranks=size, initializer_method="uid")


def why_not() -> str:
    """An empty text, or why this process cannot make an NVSHMEM heap.  Never raises."""
    if reason := device.why_not():
        return reason
    try:
        core, _ = _modules()
        core.get_version()
    except Exception as error:  # noqa: BLE001  # a library that does not load has many ways
        return f"{type(error).__name__}: {error}"
    return ""


def _modules() -> tuple[Any, Any]:
    """``nvshmem.core``, and its bindings: a core buffer that is collected says so on stdout, and
    one that is freed waits for all ranks; an address of the bindings does neither."""
    if importlib.util.find_spec("nvshmem") is None:
        raise EpmoeError("the extra epmoe[nvshmem] is not installed: no module nvshmem")
    try:
        return importlib.import_module("nvshmem.core"), importlib.import_module("nvshmem.bindings")
    except ImportError as error:
        raise EpmoeError(f"nvshmem4py cannot be used: {error}") from error
