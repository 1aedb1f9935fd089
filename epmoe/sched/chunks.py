"""How many chunks a forward is cut into, and which capacity each is padded to.

Both follow from numbers that every rank holds (the row counts of all ranks), so all ranks run the
same chunks at the same capacity without asking each other.  A rank whose rows are used up runs the
remaining chunks with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RUNGS = (16, 64, 256, 1024, 4096)  # a launch costs by its capacity: decode must not pay prefill's


@dataclass(frozen=True, slots=True)
class Chunks:
    """``rows_CR[chunk][rank]`` live rows; every chunk is padded to ``capacity`` on every rank."""

    rows_CR: tuple[tuple[int, ...], ...]
    capacity: int

    @property
    def count(self) -> int:
        """Chunks every rank runs, in this order."""
        return len(self.rows_CR)

    def span(self, chunk: int, rank: int) -> slice:
        """Which rows of its batch ``rank`` puts into ``chunk``."""
        start = sum(rows_R[rank] for rows_R in self.rows_CR[:chunk])
        return slice(start, start + self.rows_CR[chunk][rank])


def ladder(max_rows: int) -> tuple[int, ...]:
    """The capacities there are, ascending; the last is ``max_rows``.

    >>> ladder(300)
    (16, 64, 256, 300)
    """
    return (*(rung for rung in RUNGS if rung < max_rows), max_rows)


def capacity_for(rows: int, max_rows: int) -> int:
    """The smallest rung that holds ``rows``; more than ``max_rows`` is an error, never a clamp."""
    if not 0 <= rows <= max_rows:
        raise ValueError(f"rows must be in 0..{max_rows} (max_rows), got {rows}")
    return next(rung for rung in ladder(max_rows) if rows <= rung)


def cut(rows: int, count: int) -> tuple[int, ...]:
    """``rows`` in ``count`` pieces as even as possible, the longer ones first.

    >>> cut(7, 3), cut(1, 3)
    ((3, 2, 2), (1, 0, 0))
    """
    each, more = divmod(rows, count)
    return tuple(each + (piece < more) for piece in range(count))


def plan_chunks(rows_R: Sequence[int], max_rows: int) -> Chunks:
    """The chunks of a forward in which rank r has ``rows_R[r]`` rows.

    The longest batch decides, not the sum: capacity is per rank.

    >>> plan_chunks([5, 0, 9], max_rows=4)
    Chunks(rows_CR=((2, 0, 3), (2, 0, 3), (1, 0, 3)), capacity=4)
    """
    if not rows_R:
        raise ValueError("rows_R must name at least one rank, got none")
    if min(rows_R) < 0:
        raise ValueError(f"rows_R must be at least 0 on every rank, got {tuple(rows_R)}")
    count = max(1, -(-max(rows_R) // max_rows))
    pieces_RC = [cut(rows, count) for rows in rows_R]
    return Chunks(
        tuple(tuple(pieces_RC[r][c] for r in range(len(rows_R))) for c in range(count)),
        capacity_for(max(pieces[0] for pieces in pieces_RC), max_rows),
    )
