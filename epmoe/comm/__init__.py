"""Who takes part, and what they can see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epmoe.comm.group import Group
    from epmoe.comm.heap import Heap


def open_heap(kind: str, group: Group, nbytes: int, *, generation: int, limit_s: float) -> Heap:
    """A heap of ``kind`` with a slab of ``nbytes`` per rank; collective, all or nothing.

    What was asked for is what is made: a heap that cannot be had is an error, never another heap.
    The import is inside, so that a laptop never loads CUDA.
    """
    match kind:
        case "host":
            from epmoe.comm.host import HostHeap

            return HostHeap(group, nbytes, generation=generation, limit_s=limit_s)
        case "cuda":
            from epmoe.comm.cuda import CudaHeap

            return CudaHeap(group, nbytes, generation=generation, limit_s=limit_s)
        case "nvshmem":
            from epmoe.comm.nvshmem import NvshmemHeap

            return NvshmemHeap(group, nbytes, generation=generation, limit_s=limit_s)
    raise ValueError(f"heap must be host, cuda or nvshmem, got {kind!r}")
