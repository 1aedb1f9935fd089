"""Moves the bytes of slots between ranks while rounds go on.

A migration rides on the words of lane 0 and adds none.  Before its C a source lays the round's
parcels into its freight region; between the peers' C and its own Y a target copies its parcels into
shadows; Y says that the region may be filled again.  When all parcels have arrived, every rank
copies its shadows over its slots before the same next round: addresses stay, and until then the old
slots are untouched, so a migration that fails leaves the old placement in force.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from epmoe.comm.heap import Heap
from epmoe.comm.layout import Layout
from epmoe.errors import EpmoeError
from epmoe.formats import SlotTensor
from epmoe.sched.freight import Parcel, schedule
from epmoe.sched.moves import Move, moves
from epmoe.sched.placement import Placement


class Migration:
    """One layer on its way from one placement to another, as one rank sees it.

    ``declared`` names every per-slot tensor of the format, so whatever the format adds travels too.
    """

    def __init__(
        self,
        old: Placement,
        new: Placement,
        declared: Sequence[SlotTensor],
        weights: Mapping[str, Tensor],
        heap: Heap,
        placed: Layout,
        *,
        budget: int,
        verify: bool,
    ) -> None:
        """Takes the moves within this rank at once: they cost a copy and no wire."""
        self.new, self._verify = new, verify
        self._declared, self._weights = declared, weights
        self._heap, self._freight = heap, placed.rank["freight"]
        self._per_rank, self._first = old.slots_per_rank, heap.rank * old.slots_per_rank
        slot_bytes = sum(t.nbytes for t in declared)
        self._sums = slot_bytes if verify else None  # where a slot's checksum follows its bytes
        moved = moves(old, new)
        self._mine = [m for m in moved if new.rank_of(m.slot) == heap.rank]
        total = slot_bytes + (4 if verify else 0)
        self._shadows = {m.slot: torch.empty(total, dtype=torch.uint8) for m in self._mine}
        for move in self._mine:
            if old.rank_of(move.source) == heap.rank:
                self._shadows[move.slot][:] = self._slot(move.source)
        self._rounds = schedule(moved, old, total, budget)
        self._outgoing: dict[int, Tensor] = {}
        self._now = next(self._rounds, None)

    @property
    def arrived(self) -> bool:
        """True once the last parcel of every rank has been unloaded: the next round may switch."""
        return self._now is None

    def load(self) -> None:
        """Before my C: what others wait for, into my freight region."""
        for parcel in self._now or ():
            if self._is_mine(parcel.source):
                source = self._outgoing.get(parcel.source)
                if source is None:
                    source = self._outgoing[parcel.source] = self._slot(parcel.source)
                at = self._freight.at + parcel.place
                self._heap.mine[at : at + parcel.length] = source[
                    parcel.at : parcel.at + parcel.length
                ]

    def unload(self) -> None:
        """After all C and before my Y: what others laid out for me, into the shadows."""
        for parcel in self._now or ():
            if self._is_mine(parcel.slot):
                self._take(parcel)
        self._now = next(self._rounds, None)
        if self.arrived:
            self._outgoing.clear()
            for move in self._mine:
                self._check(move)

    def switch(self) -> None:
        """Between rounds, in the same one on every rank: the shadows become the slots."""
        for move in self._mine:
            at = 0
            for tensor in self._declared:
                slot = self._weights[tensor.name][move.slot - self._first]
                part = self._shadows[move.slot][at : at + tensor.nbytes]
                if slot.is_contiguous():
                    slot.view(-1).view(torch.uint8)[:] = part
                else:  # rows that lie apart; such a format has one dtype, so ``part`` is aligned
                    slot.copy_(part.view(tensor.dtype).view(tensor.shape))
                at += tensor.nbytes

    def _take(self, parcel: Parcel) -> None:
        at = self._freight.at + parcel.place
        slab = self._heap.peer(parcel.source // self._per_rank)
        self._shadows[parcel.slot][parcel.at : parcel.at + parcel.length] = slab[
            at : at + parcel.length
        ]

    def _is_mine(self, slot: int) -> bool:
        return slot // self._per_rank == self._heap.rank

    def _slot(self, slot: int) -> Tensor:
        """All bytes of one of my slots, in declared order, and their checksum if asked for."""
        parts = [
            self._weights[t.name][slot - self._first].contiguous().view(-1).view(torch.uint8)
            for t in self._declared
        ]
        whole = torch.cat(parts)
        if not self._verify:
            return whole
        return torch.cat([whole, _checksum(whole)])

    def _check(self, move: Move) -> None:
        if self._sums is None:
            return
        shadow = self._shadows[move.slot]
        if not torch.equal(_checksum(shadow[: self._sums]), shadow[self._sums :]):
            raise EpmoeError(
                f"rank {self._heap.rank}: expert {move.expert} arrived damaged from slot "
                f"{move.source} for slot {move.slot}; the old placement stays"
            )


def _checksum(whole: Tensor) -> Tensor:
    return torch.frombuffer(
        bytearray(zlib.crc32(whole.numpy().data).to_bytes(4, "little")), dtype=torch.uint8
    )
