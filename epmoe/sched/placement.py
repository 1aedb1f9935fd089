"""One map slot -> expert; every other table is derived from it.

Five expert maps that were updated one after the other disagreed in the field; here there is one,
and it cannot change.  A slot ``s`` lives on rank ``s // slots_per_rank``.  X in shape suffixes is
the most replicas of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epmoe.config import check_count


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which expert every slot of every rank holds: one layer, all ranks.

    ``expert_of_S[slot]`` is the whole truth: equal maps are equal placements.  Every expert has at
    least one slot; a rank may hold the same expert twice (useless, but legal: a published
    algorithm does it).

    >>> p = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)   # rank 1 holds 2 and 0
    >>> p.slots_of(0), p.counts_E.tolist(), p.replicas_EX.tolist()
    ((0, 3), [2, 1, 1], [[0, 3], [1, -1], [2, -1]])
    """

    expert_of_S: tuple[int, ...]
    experts: int
    ranks: int

    def __post_init__(self) -> None:
        for name in ("experts", "ranks"):
            check_count(name, getattr(self, name), 1)
        if not isinstance(self.expert_of_S, tuple):
            raise TypeError(
                f"expert_of_S must be a tuple of int (Placement.of takes tensors and lists), "
                f"got {type(self.expert_of_S).__name__}"
            )
        if len(self.expert_of_S) < self.experts or len(self.expert_of_S) % self.ranks:
            raise ValueError(
                f"expert_of_S must have at least experts ({self.experts}) entries, a multiple of "
                f"ranks ({self.ranks}), got {len(self.expert_of_S)}"
            )
        for slot, expert in enumerate(self.expert_of_S):
            if not isinstance(expert, int) or isinstance(expert, bool):
                raise TypeError(
                    f"expert_of_S[{slot}] must be an int, got {type(expert).__name__} {expert!r}"
                )
            if not 0 <= expert < self.experts:
                raise ValueError(
                    f"expert_of_S[{slot}] must be in 0..{self.experts - 1}, got {expert}"
                )
        if len(set(self.expert_of_S)) < self.experts:
            missing = sorted(set(range(self.experts)) - set(self.expert_of_S))
            raise ValueError(f"expert_of_S must hold every expert, missing {missing[:8]}")

    @classmethod
    def of(cls, expert_of_S: Tensor | Iterable[int], *, experts: int, ranks: int) -> Placement:
        """From anything that lists integers: a tensor, an array, a list."""
        listed = expert_of_S.tolist() if hasattr(expert_of_S, "tolist") else list(expert_of_S)
        return cls(expert_of_S=tuple(listed), experts=experts, ranks=ranks)

    @classmethod
    def linear(cls, experts: int, slots: int, ranks: int) -> Placement:
        """Slot ``s`` holds expert ``s % experts``: the identity when there is no spare slot.

        >>> Placement.linear(3, 4, 2).expert_of_S
        (0, 1, 2, 0)
        """
        if experts < 1:
            raise ValueError(f"experts must be at least 1, got {experts}")
        return cls(
            expert_of_S=tuple(slot % experts for slot in range(slots)), experts=experts, ranks=ranks
        )

    @property
    def slots(self) -> int:
        """Slots of all ranks together."""
        return len(self.expert_of_S)

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    def rank_of(self, slot: int) -> int:
        """The rank that slot lives on."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot must be in 0..{self.slots - 1}, got {slot}")
        return slot // self.slots_per_rank

    def slots_on(self, rank: int) -> range:
        """The slots of one rank, ascending."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be in 0..{self.ranks - 1}, got {rank}")
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """What the slots of one rank hold, in slot order."""
        mine = self.slots_on(rank)
        return self.expert_of_S[mine.start : mine.stop]

    @cached_property
    def _slots_of_E(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in range(self.experts)]
        for slot, expert in enumerate(self.expert_of_S):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    def slots_of(self, expert: int) -> tuple[int, ...]:
        """All slots that hold an expert, ascending: replica ``x`` is entry ``x``."""
        if not 0 <= expert < self.experts:
            raise ValueError(f"expert must be in 0..{self.experts - 1}, got {expert}")
        return self._slots_of_E[expert]

    def slot_of(self, expert: int, replica: int = 0) -> int:
        """The slot of one replica of an expert."""
        slots = self.slots_of(expert)
        if not 0 <= replica < len(slots):
            raise ValueError(
                f"replica of expert {expert} must be in 0..{len(slots) - 1}, got {replica}"
            )
        return slots[replica]

    @cached_property
    def counts_E(self) -> Tensor:
        """Replicas of every expert, int32, all >= 1.  Read only: the table is shared."""
        return torch.tensor(
            [len(slots) for slots in self._slots_of_E], dtype=torch.int32, device="cpu"
        )

    @cached_property
    def replicas_EX(self) -> Tensor:
        """Slots of every expert, int32, padded with -1 to the most replicas.  Read only."""
        return self.replicas(max(map(len, self._slots_of_E)))

    def replicas(self, width: int) -> Tensor:
        """``replicas_EX`` padded to a given width, for a table whose address and shape must stay.

        ``slots - experts + 1`` is wide enough for every placement of the same slots.
        """
        most = max(map(len, self._slots_of_E))
        if width < most:
            raise ValueError(f"width must be at least {most} (most replicas), got {width}")
        rows = [slots + (-1,) * (width - len(slots)) for slots in self._slots_of_E]
        return torch.tensor(rows, dtype=torch.int32, device="cpu")


def choose_slots(
    ids_TK: Tensor, placement: Placement, *, rank: int = 0, tokens_T: Tensor | None = None
) -> Tensor:
    """One replica for every choice: slots of the shape and dtype of ``ids_TK``; -1 stays -1.

    Without ``tokens_T`` the rows of this batch are dealt round robin: the j-th choice of an expert
    (row by row) takes replica ``(j + rank) % count``, so the replicas of every expert get equally
    many rows, give or take one.  Pass the source rank, or all ranks start at the same replica.

    With ``tokens_T`` (any number that names the token everywhere, such as its position in the
    whole batch) the slot depends on token and expert only: every rank computes the same slot for
    the same token, whatever else is in its batch.  Needed wherever one token is seen by several
    ranks; a rank-dependent pick there adds an expert twice or not at all, without any error.

    >>> p = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)
    >>> choose_slots(torch.tensor([[0, 1], [2, 0], [0, -1]]), p).tolist()
    [[0, 1], [2, 3], [0, -1]]
    """
    if ids_TK.dim() != 2 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids_TK must be int32 or int64 of shape [T, K], "
            f"got {ids_TK.dtype} {tuple(ids_TK.shape)}"
        )
    if ids_TK.numel():
        low, high = int(ids_TK.min()), int(ids_TK.max())
        if low < -1 or high >= placement.experts:
            raise ValueError(
                f"ids_TK must be in -1..{placement.experts - 1}, got {low if low < -1 else high}"
            )
    if not 0 <= rank < placement.ranks:
        raise ValueError(f"rank must be in 0..{placement.ranks - 1}, got {rank}")
    if tokens_T is not None and (
        tokens_T.shape != ids_TK.shape[:1] or tokens_T.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"tokens_T must be int32 or int64 of shape [{ids_TK.shape[0]}], "
            f"got {tokens_T.dtype} {tuple(tokens_T.shape)}"
        )
    tables = (placement.replicas_EX, placement.counts_E)
    replicas_EX, counts_E = (table.to(ids_TK.device) for table in tables)
    return choose_from(ids_TK, replicas_EX, counts_E, rank=rank, tokens_T=tokens_T)


def choose_from(
    ids_TK: Tensor,
    replicas_EX: Tensor,
    counts_E: Tensor,
    *,
    rank: int = 0,
    tokens_T: Tensor | None = None,
) -> Tensor:
    """``choose_slots`` without its checks: reads nothing back, so a CUDA graph can hold it.

    ``replicas_EX`` may be wider than needed; overwrite it in place to switch placements.
    """
    live_TK = ids_TK >= 0
    expert_TK = ids_TK.clamp(min=0).long()
    if tokens_T is None:
        turn_TK = _occurrence(torch.where(live_TK, expert_TK, -1).flatten()).view_as(expert_TK)
        turn_TK = turn_TK + rank
    else:
        turn_TK = _mixed(tokens_T.long()[:, None], expert_TK)
    replica_TK = turn_TK % counts_E.long()[expert_TK]
    slot_TK = replicas_EX[expert_TK, replica_TK].to(ids_TK.dtype)
    return torch.where(live_TK, slot_TK, -1)


def _occurrence(ids_M: Tensor) -> Tensor:
    """How often the same id came earlier: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    sorted_M, order_M = ids_M.sort(stable=True)
    place_M = torch.arange(ids_M.numel(), device=ids_M.device)
    nth_M = place_M - torch.searchsorted(sorted_M, sorted_M)
    return torch.empty_like(nth_M).scatter_(0, order_M, nth_M)


def _mixed(token_T1: Tensor, expert_TK: Tensor) -> Tensor:
    """31 well mixed bits of (token, expert), equal on every machine.

    A plain ``token % count`` would send all even tokens of every doubled expert to replica 0,
    and a batch whose rows come from one of two streams would load one replica only.
    """
    mask = 0x7FFFFFFF
    x = ((token_T1 & mask) * 0x9E3779B1 + expert_TK * 0x85EBCA77) & mask  # below 2**63: no overflow
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & mask
    x = ((x ^ (x >> 12)) * 0x297A2D39) & mask
    return x ^ (x >> 15)
