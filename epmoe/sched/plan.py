"""Counts of all sources → every offset of the round on this rank, and what each source asks for.

Pure: the host ops call it, the device kernels compute the same numbers from the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """What this rank asks of every rank: cells (token * K + choice) grouped by slot.

    ``cells_N`` lists the live choices in order of slot, ascending inside a slot; ``counts_RL`` says
    how many of them go to each slot of each rank.
    """

    cells_N: npt.NDArray[np.int32]
    counts_RL: npt.NDArray[np.int64]

    def cells_R(self) -> tuple[npt.NDArray[np.int32], ...]:
        """For every rank the cells whose experts live there, grouped by its slots."""
        ends = [0, *self.counts_RL.sum(1).cumsum().tolist()]
        return tuple(self.cells_N[a:b] for a, b in pairwise(ends))


def request(slots_TK: Tensor, ranks: int, slots_per_rank: int) -> Request:
    """Which cells go where; a choice of -1 goes nowhere, a slot named twice is asked twice.

    >>> ask = request(torch.tensor([[3, 0], [-1, 3]]), ranks=2, slots_per_rank=2)
    >>> ask.cells_N.tolist(), ask.counts_RL.tolist()
    ([1, 0, 3], [[1, 0], [0, 2]])
    """
    flat = slots_TK.reshape(-1).numpy()
    places = ranks * slots_per_rank
    # numpy sorts 16-bit keys by radix: 2,048 choices take 15 µs, torch's int64 sort takes 80.
    order = np.argsort(flat.astype(np.int16 if places < 1 << 15 else np.int64), kind="stable")
    counts = np.bincount(flat + 1, minlength=places + 1)  # the first are those that go nowhere
    cells_N = order[counts[0] :].astype(np.int32)
    return Request(cells_N, counts[1:].reshape(ranks, slots_per_rank))


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every row of the round lies on this rank, in the order (source, slot, list).

    ``starts_R1[r]`` is the first row of source r; ``starts_RL[r][l]`` its first row for slot l.
    """

    counts_RL: tuple[tuple[int, ...], ...]
    starts_R1: tuple[int, ...]
    starts_RL: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """Rows of this rank in this round."""
        return self.starts_R1[-1]

    def source(self, rank: int) -> slice:
        """Rows that came from ``rank``."""
        return slice(self.starts_R1[rank], self.starts_R1[rank + 1])

    def pieces(self, slot: int) -> list[slice]:
        """Rows of a local slot, one slice per source that sent any, sources ascending."""
        return [
            slice(starts[slot], starts[slot] + counts[slot])
            for starts, counts in zip(self.starts_RL, self.counts_RL, strict=True)
            if counts[slot]
        ]


def plan(counts_RL: npt.NDArray[np.int64]) -> Plan:
    """Offsets from how many rows each source sends to each local slot.

    >>> plan(np.array([[2, 0], [1, 3]])).pieces(0)
    [slice(0, 2, None), slice(2, 3, None)]
    """
    ends_N = counts_RL.reshape(-1).cumsum()
    starts = (ends_N.reshape(counts_RL.shape) - counts_RL).tolist()
    per_source = counts_RL.sum(1).cumsum().tolist()
    return Plan(tuple(map(tuple, counts_RL.tolist())), (0, *per_source), tuple(map(tuple, starts)))
