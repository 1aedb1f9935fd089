"""Which bytes of which slot travel in which round of a migration.

Every rank computes the same schedule from the same moves, so a round's freight needs no header: a
source knows what to lay out, a target knows where to find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from epmoe.sched.moves import Move
from epmoe.sched.placement import Placement

PIECE = 16  # bytes; parcels start at multiples of it, in the slot and in the freight region


@dataclass(frozen=True, slots=True)
class Parcel:
    """``length`` bytes from byte ``at`` of slot ``source``, for slot ``slot``.

    They lie at byte ``place`` of the freight region of the rank that holds ``source``.
    """

    slot: int
    source: int
    at: int
    length: int
    place: int


def schedule(
    moved: Iterable[Move], placement: Placement, slot_bytes: int, budget: int
) -> Iterator[tuple[Parcel, ...]]:
    """The parcels of every round, in order; moves within a rank are not freight.

    No rank sends more than ``budget`` bytes in a round, and none receives more, so the slowest
    rank of a round copies a bounded amount whatever the moves are.

    >>> p = Placement(expert_of_S=(0, 1), experts=2, ranks=2)
    >>> for parcels in schedule([Move(0, 1, 1)], p, slot_bytes=40, budget=32): print(parcels)
    (Parcel(slot=0, source=1, at=0, length=32, place=0),)
    (Parcel(slot=0, source=1, at=32, length=8, place=0),)
    """
    if budget < PIECE:
        raise ValueError(f"budget must be at least {PIECE} bytes, got {budget}")
    budget -= budget % PIECE
    crossing = [m for m in moved if placement.rank_of(m.source) != placement.rank_of(m.slot)]
    pending = [(move, 0) for move in crossing] if slot_bytes else []
    while pending:
        out_R = [0] * placement.ranks
        in_R = [0] * placement.ranks
        parcels, left = [], []
        for move, at in pending:
            source, target = placement.rank_of(move.source), placement.rank_of(move.slot)
            room = budget - max(out_R[source], in_R[target])
            length = min(slot_bytes - at, room - room % PIECE)
            if length > 0:
                parcels.append(Parcel(move.slot, move.source, at, length, out_R[source]))
                taken = -(-length // PIECE) * PIECE
                out_R[source] += taken
                in_R[target] += taken
                at += length
            if at < slot_bytes:
                left.append((move, at))
        pending = left
        yield tuple(parcels)
