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

from epmoe.comm.fds import pass_fds
from epmoe.comm.group import Group
from epmoe.errors import EpmoeError

log = logging.getLogger("epmoe")


class CudaHeap:
    """One slab on the current CUDA device of every rank, all of them mapped here.

    ``address(rank)`` is what kernels use.  ``peer(rank)`` is a tensor over the same bytes, on the
    device that holds them.  Collective to make; the current device is the one the caller set.
    """

    def __init__(self, group: Group, nbytes: int, *, generation: int, limit_s: float) -> None:
        """All ranks get the heap or all raise; what was made for a heap that failed is undone."""
        self.rank, self.ranks, self.generation = group.rank, group.size, generation
        self._undo: list[Callable[[], object]] = []
        self._addresses: list[int] = []
        try:
            with group.guarded("make the slab", limit_s):
                self._driver = _driver()
                self._make(group, nbytes)
            with group.guarded("map the peers", limit_s):
                self._map(group, limit_s)
            with group.guarded("clear the slab", limit_s):  # no peer may write before this ends
                self._call(self._driver.cuMemsetD8, self.address(self.rank), 0, self._size)
                self._call(self._driver.cuCtxSynchronize)
        except BaseException:
            self.close()
            raise
        log.info("cuda heap: %d slabs of %.1f MiB", group.size, self._size / 2**20)

    @property
    def mine(self) -> torch.Tensor:
        """My slab as bytes."""
        return self.peer(self.rank)

    def peer(self, rank: int) -> torch.Tensor:
        """The slab of ``rank`` as bytes, on the device where it lies."""
        return torch.as_tensor(_Span(self._addresses[rank], self._nbytes))

    def address(self, rank: int) -> int:
        """Where the slab of ``rank`` starts, in this process."""
        return self._addresses[rank]

    def write(self, rank: int, at: int, content: torch.Tensor, stream: int) -> None:
        """Bytes of the host into a slab, in order on ``stream``; the host waits for its turn."""
        size = content.numel() * content.element_size()
        where = self._addresses[rank] + at
        self._call(self._driver.cuMemcpyHtoDAsync, where, content.data_ptr(), size, stream)

    def read(self, rank: int, at: int, nbytes: int) -> bytes:
        """Bytes of a slab as they stand now."""
        content = torch.empty(nbytes, dtype=torch.uint8)
        # Not behind kernels that wait.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        where = self._addresses[rank] + at
        self._call(
            self._driver.cuMemcpyDtoHAsync, content.data_ptr(), where, nbytes, stream.cuda_stream
        )
        stream.synchronize()
        return bytes(content.tolist())

    def close(self) -> None:
        """Unmap all slabs after this device has finished; local, waits for no peer.

        A slab's memory lives until the last rank has unmapped it, so a late store of a peer lands
        in memory that nobody reads, not in somebody else's.
        """
        if self._undo:
            torch.cuda.synchronize()
        while self._undo:
            self._undo.pop()()
        self._addresses.clear()

    def _make(self, group: Group, nbytes: int) -> None:
        device = torch.cuda.current_device()
        torch.empty(1, device="cuda")  # the driver calls below need a current context
        driver = self._driver
        self._nbytes = nbytes
        self._where = driver.CUmemLocation()
        self._where.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._where.id = device
        kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        props = driver.CUmemAllocationProp()
        props.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        props.requestedHandleTypes = kind
        props.location = self._where
        whole = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        piece = self._call(driver.cuMemGetAllocationGranularity, props, whole)
        self._size = -(-nbytes // piece) * piece
        free, _ = torch.cuda.mem_get_info(device)
        if self._size > free:
            raise EpmoeError(
                f"rank {group.rank}: the slab needs {self._size / 2**20:.1f} MiB and "
                f"{free / 2**20:.1f} MiB of GPU memory are free; lower max_rows or lanes"
            )
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

    def _call(self, function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
        status, *values = function(*args)
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            what = text.decode() if text else str(status)
            raise EpmoeError(f"rank {self.rank}: {function.__name__}: {what}")
        return values[0] if values else None


class _Span:
    """Bytes at an address, as torch reads them without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def why_not() -> str:
    """An empty text, or why this process cannot make a CUDA heap.  Never raises."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"device 0 has compute capability {major}.{minor}; the kernels are for 9.0 (Hopper)"
    try:
        _driver()
    except EpmoeError as error:
        return str(error)
    return ""


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EpmoeError(f"the extra epmoe[cuda] is not installed: {error}") from error
    return driver
