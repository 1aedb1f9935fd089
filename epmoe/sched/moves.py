"""What has to travel from one placement to another, and how little that can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmoe.sched.placement import Placement


class Move(NamedTuple):
    """A slot that changes its expert, and the slot of the old placement to copy it from."""

    slot: int
    expert: int
    source: int


def moves(old: Placement, new: Placement) -> tuple[Move, ...]:
    """One move for every slot that changes, ascending; nothing for those that keep their expert.

    The source is on the same rank if that rank has the expert already; otherwise it is on the rank
    that was asked least so far, so that no rank is read by all others.  Experts with one old slot
    are placed first: they have no choice.

    >>> old = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)
    >>> moves(old, Placement(expert_of_S=(2, 1, 2, 0), experts=3, ranks=2))
    (Move(slot=0, expert=2, source=2),)
    """
    _check_alike(old, new)
    changed = [
        (slot, expert, old.slots_of(expert))
        for slot, expert in enumerate(new.expert_of_S)
        if expert != old.expert_of_S[slot]
    ]
    changed.sort(key=lambda one: len(one[2]))
    asked, each = [0] * old.ranks, old.slots_per_rank
    found = []
    for slot, expert, sources in changed:
        source, rank = sources[0], slot // each
        if len(sources) > 1:
            source = min(sources, key=lambda s: (s // each != rank, asked[s // each]))
        if source // each != rank:
            asked[source // each] += 1
        found.append(Move(slot, expert, source))
    return tuple(sorted(found))


def bytes_RR(moved: Iterable[Move], placement: Placement, slot_bytes: int) -> Tensor:
    """Bytes that every rank (row) sends to every rank (column), int64.

    ``slot_bytes`` is the sum of all per-slot tensors of one slot.  The diagonal is copied inside
    a rank; everything else crosses the wire.
    """
    if slot_bytes < 0:
        raise ValueError(f"slot_bytes must be at least 0, got {slot_bytes}")
    sent_RR = torch.zeros(placement.ranks, placement.ranks, dtype=torch.int64, device="cpu")
    for move in moved:
        sent_RR[placement.rank_of(move.source), placement.rank_of(move.slot)] += slot_bytes
    return sent_RR


def aligned(old: Placement, new: Placement) -> Placement:
    """``new`` with its ranks renamed and the slots inside each rank reordered: fewest moves.

    Which experts share a rank is kept, so the balance is that of ``new`` to the last bit; among
    all such renamings the number of ``moves(old, result)`` is the least possible.

    >>> old = Placement(expert_of_S=(0, 1, 2, 3), experts=4, ranks=2)
    >>> aligned(old, Placement(expert_of_S=(3, 2, 1, 0), experts=4, ranks=2)) == old
    True
    """
    _check_alike(old, new)
    if old.ranks == 1 or new == old:
        name_of_R = list(range(old.ranks))
    else:
        name_of_R = _assign(_shared_RR(old, new))
    expert_of_S: list[int] = []
    for rank in range(old.ranks):
        wanted = Counter(new.experts_on(name_of_R[rank]))
        kept: list[int | None] = []
        for expert in old.experts_on(rank):
            stays = wanted[expert] > 0
            wanted[expert] -= stays
            kept.append(expert if stays else None)
        arriving = wanted.elements()
        expert_of_S += [next(arriving) if expert is None else expert for expert in kept]
    return Placement(expert_of_S=tuple(expert_of_S), experts=old.experts, ranks=old.ranks)


def _check_alike(old: Placement, new: Placement) -> None:
    for name in ("experts", "ranks", "slots"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"old and new must have equally many {name}, "
                f"got {getattr(old, name)} and {getattr(new, name)}"
            )


def _shared_RR(old: Placement, new: Placement) -> npt.NDArray[np.int64]:
    """How many slots old rank (row) would keep if it became new rank (column)."""
    held = []
    for placement in (old, new):
        held_RE = np.zeros((placement.ranks, placement.experts), np.int64)
        rank_S = np.repeat(np.arange(placement.ranks), placement.slots_per_rank)
        np.add.at(held_RE, (rank_S, np.array(placement.expert_of_S)), 1)
        held.append(held_RE)
    shared_RR = np.zeros((old.ranks, old.ranks), np.int64)
    for times in range(1, int(held[0].max()) + 1):  # more than once only with twins on a rank
        shared_RR += (held[0] >= times).astype(np.int64) @ (held[1] >= times).T.astype(np.int64)
    return shared_RR


def _assign(gain_RR: npt.NDArray[np.int64]) -> list[int]:
    """The column of every row such that the sum of gains is the highest (shortest augmenting
    paths).  Rows whose own column is already their best need no search, the usual case here."""
    size = len(gain_RR)
    if (gain_RR.diagonal() == gain_RR.max(1)).all():
        return list(range(size))
    cost = gain_RR.max() - gain_RR
    row_price, column_price = np.zeros(size + 1, np.int64), np.zeros(size + 1, np.int64)
    row_of = np.full(size + 1, size)  # of every column; the last column stands for "none yet"
    far = np.iinfo(np.int64).max // 2
    for row in range(size):
        row_of[size] = row
        column, came_from = size, np.full(size + 1, size)
        slack, seen = np.full(size + 1, far), np.zeros(size + 1, bool)
        while row_of[column] != size or column == size:
            seen[column] = True
            here = row_of[column]
            through = cost[here] - row_price[here] - column_price[:size]
            better = ~seen[:size] & (through < slack[:size])
            slack[:size][better] = through[better]
            came_from[:size][better] = column
            open_slack = np.where(seen[:size], far, slack[:size])
            nearest = int(open_slack.argmin())
            step = open_slack[nearest]
            row_price[row_of[seen]] += step
            column_price[seen] -= step
            slack[~seen] -= step
            column = nearest
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    return [int(column) for column in np.argsort(row_of[:size])]
