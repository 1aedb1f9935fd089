"""Which bytes of which slot travel in which round of a migration.

Every rank computes the same schedule from the same moves, so a round's freight needs no header: a
source knows what to lay out, a target knows where to find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from epmoe.sched.moves import Move
from epmoe.sched.placement import Placement

PIECE = 16  # bytes; parcels start at multiples of it, in the slot and in the freight region


class Parcel(NamedTuple):
    """``length`` bytes from byte ``at`` of slot ``source``, for slot ``slot``.

    They lie at byte ``place`` of the freight of the rank that holds ``source``; if that rank holds
    ``slot`` too, it copies them and ``place`` means nothing.
    """

    slot: int
    source: int
    at: int
    length: int
    place: int


def schedule(
    moved: Iterable[Move], placement: Placement, slot_bytes: int, budget: int
) -> Iterator[tuple[Parcel, ...]]:
    """The parcels of every round, in order; those of one slot travel in ascending order.

    No rank reads more than ``budget`` bytes of its slots in a round, and none receives more, so the
    slowest rank of a round copies a bounded amount whatever the moves are.  A round costs time in
    the parcels it has, not in the moves that wait.

    >>> p = Placement(expert_of_S=(0, 1), experts=2, ranks=2)
    >>> for parcels in schedule([Move(0, 1, 1)], p, slot_bytes=40, budget=32): print(parcels)
    (Parcel(slot=0, source=1, at=0, length=32, place=0),)
    (Parcel(slot=0, source=1, at=32, length=8, place=0),)
    """
    if budget < PIECE:
        raise ValueError(f"budget must be at least {PIECE} bytes, got {budget}")
    budget -= budget % PIECE
    per_rank, first = placement.slots_per_rank, 0
    waiting_R: list[list[list[int]]] = [[] for _ in range(placement.ranks)]  # slot, source, at
    for move in moved if slot_bytes else ():
        waiting_R[move.source // per_rank].append([move.slot, move.source, 0])
    while any(waiting_R):
        in_R = [budget] * placement.ranks  # what each may still receive
        parcels = []
        for step in range(placement.ranks):
            waiting = waiting_R[(first + step) % placement.ranks]
            out = done = 0
            for left in waiting:
                slot, source, at = left
                target = slot // per_rank
                length = min(slot_bytes - at, budget - out, in_R[target])
                if length <= 0:
                    if out == budget:
                        break
                    continue
                parcels.append(Parcel(slot, source, at, length, out))
                taken = -(-length // PIECE) * PIECE
                out += taken
                in_R[target] -= taken
                left[2] = at + length
                done += left[2] == slot_bytes
            if done:
                waiting[:] = [left for left in waiting if left[2] < slot_bytes]
        first += 1  # who comes first finds all targets free: that shall not be one rank for ever
        yield tuple(parcels)
