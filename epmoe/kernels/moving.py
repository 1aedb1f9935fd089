"""How bytes of slots get from one rank to another: by memory copies on the host, by copy engines.

A round's parcels lie in one half of the freight region.  They are laid out before C of a round and
fetched after all C of it; a fetch may go on until Y of the *next* round that carries freight, so
that on a GPU the copy engine works beside the kernels of two rounds and never waits for their
words.  The halves take turns over all layers of a heap: it has one carrier.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from epmoe.comm.heap import Heap
from epmoe.comm.layout import Region
from epmoe.kernels.launch import checked
from epmoe.sched.freight import PIECE

if TYPE_CHECKING:
    from epmoe.comm.device import DeviceSlabs

SUM = 16  # bytes of a checksum
APART = 256  # bytes that shadows on a GPU start at multiples of, as allocations do


class Checksum(Protocol):
    """Of a slot's bytes, taken piece by piece in ascending order."""

    def add(self, piece: Tensor, at: int) -> None:
        """``piece`` (uint8) starts at byte ``at`` of the slot."""

    def value(self) -> Tensor:
        """SUM bytes, where the slots are."""


class Carrier(Protocol):
    """Copies pieces (uint8 tensors of slots and shadows) into and out of freight regions.

    A ``place`` counts from the begin of the half whose turn it is.
    """

    def lay_out(self, place: int, piece: Tensor) -> None:
        """Before my C: ``piece`` to byte ``place`` of my region."""

    def fetching(self) -> AbstractContextManager[Any]:
        """After all C of a round, once: what is fetched or copied inside belongs to this round."""

    def fetch(self, rank: int, place: int, into: Tensor) -> None:
        """From byte ``place`` of the region of ``rank``."""

    def landed(self, *, now: bool = False) -> None:
        """Before my Y: what was fetched in the round before has arrived; the other half's turn.

        ``now``: so has what was fetched in this round.
        """

    def shadows(self, count: int, nbytes: int) -> list[Tensor]:
        """Memory of mine for the bytes of so many slots."""

    def checksum(self) -> Checksum:
        """A new one."""


class Halves:
    """Which half of the region a round's freight lies in: 300 bytes are halves of 144."""

    def __init__(self, freight: Region) -> None:
        self._starts = (freight.at, freight.at + freight.bytes // 2 // PIECE * PIECE)
        self._turn = 0

    def at(self, place: int) -> int:
        """Byte of the slab."""
        return self._starts[self._turn] + place

    def change(self) -> None:
        """The next round lies in the other half."""
        self._turn = 1 - self._turn


class HostCarrier:
    """Plain copies, done when the call returns."""

    def __init__(self, heap: Heap, freight: Region) -> None:
        self._heap, self._halves = heap, Halves(freight)

    def lay_out(self, place: int, piece: Tensor) -> None:
        """See ``Carrier``."""
        at = self._halves.at(place)
        self._heap.mine[at : at + piece.numel()].view(piece.shape).copy_(piece)

    def fetching(self) -> AbstractContextManager[Any]:
        """See ``Carrier``."""
        return nullcontext()

    def fetch(self, rank: int, place: int, into: Tensor) -> None:
        """See ``Carrier``."""
        at = self._halves.at(place)
        into.copy_(self._heap.peer(rank)[at : at + into.numel()])

    def landed(self, *, now: bool = False) -> None:
        """See ``Carrier``."""
        self._halves.change()

    def shadows(self, count: int, nbytes: int) -> list[Tensor]:
        """See ``Carrier``.  Touched here, or pages would be found one by one in the rounds."""
        return [torch.zeros(nbytes, dtype=torch.uint8, device="cpu") for _ in range(count)]

    def checksum(self) -> Checksum:
        """See ``Carrier``."""
        return Crc()


class Crc:
    """CRC-32."""

    def __init__(self) -> None:
        self._crc = 0

    def add(self, piece: Tensor, at: int) -> None:
        """See ``Checksum``; CRC needs the order, not ``at``."""
        self._crc = zlib.crc32(piece.contiguous().numpy().data, self._crc)

    def value(self) -> Tensor:
        """See ``Checksum``."""
        return torch.frombuffer(bytearray(self._crc.to_bytes(SUM, "little")), dtype=torch.uint8)


class CudaCarrier:
    """Copies enqueued on the caller's stream and, from the peers, on a stream beside it.

    Nothing waits on the host.  Order: lay out, then the kernel that publishes C; the kernel that
    has seen all C, then the fetches; the fetches of the round before, then the kernel that
    publishes Y.  A second stream for half of every fetch was slower (356 GB/s, not 364): one copy
    engine has the link.
    """

    def __init__(self, heap: DeviceSlabs, freight: Region) -> None:
        from cuda.bindings import driver

        self._driver, self._heap, self._halves = driver, heap, Halves(freight)
        self._device = torch.cuda.current_device()
        self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._begin = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # When the fetches of the last round were done, and of the one before.
        self._ends: list[torch.cuda.Event] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def lay_out(self, place: int, piece: Tensor) -> None:
        """See ``Carrier``."""
        to = self._heap.address(self._heap.rank) + self._halves.at(place)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._copy(to, piece.data_ptr(), piece.numel(), int(stream))

    def fetching(self) -> AbstractContextManager[Any]:
        """See ``Carrier``."""
        return _Beside(self._beside, self._begin, self._ends)

    def fetch(self, rank: int, place: int, into: Tensor) -> None:
        """See ``Carrier``."""
        source = self._heap.address(rank) + self._halves.at(place)
        self._copy(into.data_ptr(), source, into.numel(), self._beside.cuda_stream)

    def landed(self, *, now: bool = False) -> None:
        """See ``Carrier``."""
        self._ends[1 if now else 0].wait(torch.cuda.current_stream())
        self._halves.change()

    def shadows(self, count: int, nbytes: int) -> list[Tensor]:
        """See ``Carrier``.  The stream beside has them in use until its copies are done.

        One allocation: each costs a call now, a second one here, and an event when it goes.
        """
        apart = -(-nbytes // APART) * APART
        found = torch.empty(count, apart, dtype=torch.uint8, device="cuda")
        self._beside.wait_stream(torch.cuda.current_stream())
        found.record_stream(self._beside)
        return list(found[:, :nbytes].unbind())

    def checksum(self) -> Checksum:
        """See ``Carrier``."""
        return Sums()

    def _copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        checked(self._driver.cuMemcpyDtoDAsync(to, source, nbytes, stream))


class _Beside:
    """What is enqueued inside runs on the stream beside, after what the caller's stream has."""

    def __init__(
        self, stream: torch.cuda.Stream, begin: torch.cuda.Event, ends: list[torch.cuda.Event]
    ) -> None:
        self._inside = torch.cuda.stream(stream)
        self._stream, self._begin, self._ends = stream, begin, ends

    def __enter__(self) -> None:
        self._begin.record(torch.cuda.current_stream())
        self._begin.wait(self._stream)
        self._inside.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *what: Any) -> None:
        self._inside.__exit__(*what)
        self._ends.reverse()
        self._ends[1].record(self._stream)


class Sums:
    """The sum of all bytes and the sum of byte times place, modulo 2**64: order-free, on a GPU."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.int64, device="cuda")

    def add(self, piece: Tensor, at: int) -> None:
        """See ``Checksum``."""
        values = piece.flatten().long()
        places = torch.arange(at + 1, at + 1 + len(values), device=values.device)
        self._sums += torch.stack((values.sum(), (values * places).sum()))

    def value(self) -> Tensor:
        """See ``Checksum``."""
        return self._sums.view(torch.uint8)


class SlotBytes:
    """The bytes of a slot as one string: all its tensors by name, wherever they lie.

    Two tensors of 40 and 24 bytes: bytes 32..48 of the string are the last 8 of the first tensor
    and the first 8 of the second.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._parts: list[tuple[int, Tensor]] = []  # where each starts, [slots, runs, bytes]
        self.nbytes = 0
        for name in sorted(weights):  # the same order on every rank
            slots = weights[name]
            apart = not slots.is_contiguous()  # a matrix whose rows lie apart
            runs = slots if apart else slots.view(len(slots), 1, -1)
            self._parts.append((self.nbytes, runs.view(torch.uint8)))
            self.nbytes += slots.nbytes // len(slots)

    def pieces(self, slot: int, at: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """(where in the string, the bytes) of ``length`` bytes from ``at``; views, ascending.

        A view is one-dimensional, or whole rows that lie apart.
        """
        end = min(at + length, self.nbytes)
        for start, slots in self._parts:
            _, runs, width = slots.shape
            low, high = max(at - start, 0), min(end - start, runs * width)
            while low < high:
                run, inside = divmod(low, width)
                whole = (high - low) // width
                if inside or not whole:
                    stop = min(width, inside + high - low)
                    piece = slots[slot, run, inside:stop]
                else:
                    piece = slots[slot, 0] if runs == 1 else slots[slot, run : run + whole]
                yield start + low, piece
                low += piece.numel()
