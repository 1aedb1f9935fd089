"""Moves the bytes of slots between ranks while rounds go on.

A migration rides on the words of lane 0 and adds none.  Before its C a source lays the round's
parcels into its freight region; after the peers' C a target copies its parcels into shadows, and
is done with them before its Y of the next round: the region has two halves.  When all parcels have
arrived, every rank copies its shadows over its slots, before the same rounds: addresses stay, and
until then the old slots are untouched, so a migration that fails leaves the old placement in force.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from epmoe.errors import EpmoeError
from epmoe.kernels.moving import SUM, Carrier, Checksum, SlotBytes
from epmoe.sched.freight import PIECE, Parcel, schedule
from epmoe.sched.moves import Move, moves
from epmoe.sched.placement import Placement
from epmoe.sched.steps import steps


class Migration:
    """One layer on its way from one placement to another, as rank ``rank`` sees it.

    ``slots`` are this rank's.  No round copies more than ``budget`` bytes into or out of this rank,
    nor a switch, unless experts without a second slot change places in a ring.  ``most`` is what
    one round can carry.
    """

    def __init__(
        self,
        old: Placement,
        new: Placement,
        slots: SlotBytes,
        carrier: Carrier,
        *,
        rank: int,
        most: int,
        budget: int | None,
        verify: bool,
        settled: Callable[[], None],
    ) -> None:
        """Plans only.

        ``settled`` returns when the rounds that were queued are over, or raises what went wrong.
        """
        self.new, self._rank, self._carrier = new, rank, carrier
        self._per_rank, self._first = old.slots_per_rank, rank * old.slots_per_rank
        self._slots, moved = slots, moves(old, new)
        # Where a slot's checksum follows its bytes; what travels of a slot.
        self._sum_at = -(-slots.nbytes // PIECE) * PIECE
        self._total = self._sum_at + SUM if verify and slots.nbytes else slots.nbytes
        self._mine = {move.slot: move for move in moved if self._is_mine(move.slot)}
        self._sums: dict[int, Checksum] | None = None
        if verify:  # of the slots that I send or get, by where they go
            far = (m for m in moved if self._is_mine(m.slot) != self._is_mine(m.source))
            self._sums = {m.slot: carrier.checksum() for m in far}
        self._rounds = schedule(moved, old, self._total, most if budget is None else budget)
        self._now = next(self._rounds, None)  # the parcels of the next round
        # Rounds without parcels that follow: one to land in, one to compare checksums in.
        self._empty = 0 if self._now is None else 1 + verify
        at_once = max(1, old.slots if budget is None else budget // max(1, self._total))
        self._steps = iter(steps(old, new, at_once))
        self._next: Placement | None = next(self._steps)
        self._in_force, self._settled, self._sure = old, settled, False
        self._shadows: dict[int, Tensor] = {}
        self._laid_out = False

    @property
    def arrived(self) -> bool:
        """True once every rank has all its parcels: the next forward may switch."""
        return self._now is None

    @property
    def done(self) -> bool:
        """True once ``new`` is in force here."""
        return self._next is None

    def begin(self, *, at_once: bool) -> None:
        """Make the shadows, once, before the first round.

        ``at_once``: that round is the next of the heap.  Its freight is laid out first, so that a
        GPU copies while the shadows are made and the ranks still talk.
        """
        if at_once:
            self.load()
            self._laid_out = True
        shadows = self._carrier.shadows(len(self._mine), self._total)
        self._shadows = dict(zip(self._mine, shadows, strict=True))

    def load(self) -> None:
        """Before my C: what others wait for, into my freight region.

        In the last round of a verified migration nothing travels: a rank that raises here keeps
        its C, so that no peer can end this round and switch.
        """
        if self._laid_out:
            self._laid_out = False
            return
        if self._now == () and not self._empty and self._sums is not None:
            self._settled()
            for move in self._mine.values():
                self._check(move)
        for parcel in self._now or ():
            if self._is_mine(parcel.source) and not self._is_mine(parcel.slot):
                self._lay_out(parcel)

    def unload(self) -> None:
        """After all C: what others laid out for me, and what I have myself, into the shadows."""
        with self._carrier.fetching():
            for parcel in self._now or ():
                if self._is_mine(parcel.slot):
                    self._take(parcel)

    def landed(self, *, now: bool = False) -> None:
        """Before my Y: the peers may fill the half again that they filled a round ago.

        ``now``: what this round fetched has landed too, before anything that follows; for a round
        that has published its Y already.
        """
        self._carrier.landed(now=now)
        if self._now is not None:
            self._now = next(self._rounds, None)
        if self._now is None and self._empty:
            self._now, self._empty = (), self._empty - 1

    def switch(self) -> Placement:
        """Between rounds, in the same one on every rank: some shadows, or all, become slots.

        Returns the placement that this puts in force.
        """
        if self._next is None:
            raise EpmoeError("this migration has ended")
        before, after = self._in_force.expert_of_S, self._next.expert_of_S
        due = []  # named while a GPU still fetches
        for slot in self._next.slots_on(self._rank):
            if before[slot] != after[slot]:
                shadow = self._shadows.pop(slot)
                if shadow.is_cuda:  # made in the caller's stream of that time
                    shadow.record_stream(torch.cuda.current_stream())
                for at, piece in self._slots.pieces(slot - self._first, 0, self._slots.nbytes):
                    due.append((piece, shadow[at : at + piece.numel()].view(piece.shape)))
        if not self._sure:  # garbage that was fetched after a fault must become nobody's weights
            self._settled()
            self._sure = True
        for piece, content in due:
            piece.copy_(content)
        self._in_force, self._next = self._next, next(self._steps, None)
        return self._in_force

    def _lay_out(self, parcel: Parcel) -> None:
        total = self._sums[parcel.slot] if self._sums is not None else None
        place = parcel.place - parcel.at
        for at, piece in self._slots.pieces(parcel.source - self._first, parcel.at, parcel.length):
            self._carrier.lay_out(place + at, piece)
            if total is not None:
                total.add(piece, at)
        if total is not None and parcel.at + parcel.length > self._sum_at:
            self._carrier.lay_out(place + self._sum_at, total.value())

    def _take(self, parcel: Parcel) -> None:
        shadow = self._shadows[parcel.slot]
        if self._is_mine(parcel.source):
            source = parcel.source - self._first
            for at, piece in self._slots.pieces(source, parcel.at, parcel.length):
                shadow[at : at + piece.numel()].view(piece.shape).copy_(piece)
            return
        into = shadow[parcel.at : parcel.at + parcel.length]
        self._carrier.fetch(parcel.source // self._per_rank, parcel.place, into)
        if self._sums is not None:
            bytes_of_slot = into[: max(0, self._slots.nbytes - parcel.at)]
            self._sums[parcel.slot].add(bytes_of_slot, parcel.at)

    def _is_mine(self, slot: int) -> bool:
        return slot // self._per_rank == self._rank

    def _check(self, move: Move) -> None:
        if self._sums is None or self._is_mine(move.source):
            return
        if not torch.equal(self._sums[move.slot].value(), self._shadows[move.slot][self._sum_at :]):
            raise EpmoeError(
                f"rank {self._rank}: expert {move.expert} arrived damaged from slot "
                f"{move.source} for slot {move.slot}; the old placement stays"
            )
