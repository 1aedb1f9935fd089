"""What a heap promises, whatever it is made of."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

MOST_DEVICE_RANKS = 8  # slabs that a kernel is told of (cu/signals.cuh)


class Heap(Protocol):
    """All ranks' slabs, equally large, mapped into this process.

    Not promised: any order between stores (words do that), any lifetime of a view after
    ``close()``, any content but zeros when a heap is new.
    """

    rank: int
    ranks: int
    generation: int  # counts the heaps this group has made; messages and records carry it

    @property
    def mine(self) -> torch.Tensor:
        """My slab as bytes."""

    def peer(self, rank: int) -> torch.Tensor:
        """The slab of ``rank`` as bytes; mine for my own rank."""

    def close(self) -> None:
        """Unmap; local, never waits, may be called twice.  Views must have been dropped."""


@runtime_checkable
class DeviceHeap(Heap, Protocol):
    """A heap of GPU memory, whatever made it: kernels use ``address``, the host the rest."""

    def address(self, rank: int) -> int:
        """Where the slab of ``rank`` starts, in this process."""

    def write(self, rank: int, at: int, content: torch.Tensor, stream: int) -> None:
        """Bytes of the host into a slab, in order on ``stream``."""

    def read(self, rank: int, at: int, nbytes: int) -> bytes:
        """Bytes of a slab as they stand now, without waiting for kernels."""
