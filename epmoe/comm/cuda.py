"""Heap of CUDA memory: one allocation per GPU, mapped by every rank of an NVLink domain.

The driver's virtual memory calls give each slab a POSIX descriptor, which travels like the host
heap's; kernels of one rank then load from and store to the slab of another by plain addresses.
Never multicast: no multicast object is made here, and none is needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from epmoe.comm.device import DeviceSlabs, driver, why_not
from epmoe.comm.fds import pass_fds
from epmoe.comm.group import Group

__all__ = ["CudaHeap", "why_not"]

log = logging.getLogger("epmoe")


class CudaHeap(DeviceSlabs):
    """One slab on the current CUDA device of every rank, all of them mapped here.

    Collective to make; the current device is the one the caller set.
    """

    def __init__(self, group: Group, nbytes: int, *, generation: int, limit_s: float) -> None:
        """All ranks get the heap or all raise; what was made for a heap that failed is undone."""
        super().__init__(group.rank, group.size, generation, nbytes)
        self._undo: list[Callable[[], object]] = []
        try:
            with group.guarded("make the slab", limit_s):
                self._expect_gpu()
                self._driver = driver()
                self._make()
            with group.guarded("map the peers", limit_s):
                self._map(group, limit_s)
            with group.guarded("clear the slab", limit_s):  # no peer may write before this ends
                self._clear()
        except BaseException:
            self.close()
            raise
        log.info("cuda heap: %d slabs of %.1f MiB", group.size, self._size / 2**20)

    def close(self) -> None:
        """Unmap all slabs after this device has finished; local, waits for no peer.

        A slab's memory lives until the last rank has unmapped it, so a late store of a peer lands
        in memory that nobody reads, not in somebody else's.
        """
        if self._undo:
            torch.cuda.synchronize(self._device)
        while self._undo:
            self._undo.pop()()
        self._addresses.clear()

    def _make(self) -> None:
        self._device = torch.cuda.current_device()
        torch.empty(1, device="cuda")  # the driver calls below need a current context
        driver = self._driver
        self._where = driver.CUmemLocation()
        self._where.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._where.id = self._device
        kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        props = driver.CUmemAllocationProp()
        props.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        props.requestedHandleTypes = kind
        props.location = self._where
        whole = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        piece = self._call(driver.cuMemGetAllocationGranularity, props, whole)
        self._size = -(-self._nbytes // piece) * piece
        self._expect_free(self._size)
        self._handle = self._call(driver.cuMemCreate, self._size, props, 0)
        self._undo.append(lambda: self._call(driver.cuMemRelease, self._handle))
        self._kind = kind

    def _map(self, group: Group, limit_s: float) -> None:
        driver = self._driver
        fd = int(self._call(driver.cuMemExportToShareableHandle, self._handle, self._kind, 0))
        try:
            fds = pass_fds(group, fd, what="slab", limit_s=limit_s)
        finally:
            os.close(fd)
        try:
            for rank in range(group.size):
                handle = self._handle
                if rank != group.rank:
                    handle = self._call(
                        driver.cuMemImportFromShareableHandle, fds[rank], self._kind
                    )
                self._addresses.append(self._mapped(handle))
                if rank != group.rank:  # the mapping keeps the memory; the handle may go
                    self._call(driver.cuMemRelease, handle)
        finally:
            for other in fds.values():
                os.close(other)

    def _mapped(self, handle: Any) -> int:
        driver = self._driver
        address = self._call(driver.cuMemAddressReserve, self._size, 0, 0, 0)
        self._undo.append(lambda: self._call(driver.cuMemAddressFree, address, self._size))
        self._call(driver.cuMemMap, address, self._size, 0, handle, 0)
        self._undo.append(lambda: self._call(driver.cuMemUnmap, address, self._size))
        access = driver.CUmemAccessDesc()
        access.location = self._where
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call(driver.cuMemSetAccess, address, self._size, [access], 1)
        return int(address)
