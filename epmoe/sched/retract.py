"""Takes back the changes of a placement that its balance does not need."""

from __future__ import annotations

import numpy as np

from epmoe.sched.placement import Placement
from epmoe.sched.search import GAIN, Floats


def retracted(loads_E: Floats, old: Placement, new: Placement, limit: float) -> Placement:
    """``new`` with as many slots as ``old`` had them as the limit on the fullest rank allows.

    A slot gets its old expert back from a changed slot that holds it now (the two exchange), or by
    dropping its new one where that has other replicas.  Tried slot by slot until none works: no
    single step back is left, which is no proof that a longer way back does not exist.
    """
    now = _Ranks(loads_E, new, limit)
    again = True
    while again:
        again = False
        for slot, expert in enumerate(old.expert_of_S):
            if now.expert_of_S[slot] == expert:
                continue
            donors = [s for s in sorted(now.slots_of[expert]) if old.expert_of_S[s] != expert]
            again |= now.drop(slot, expert) or any(now.swap(slot, donor) for donor in donors)
    return Placement(expert_of_S=tuple(now.expert_of_S), experts=new.experts, ranks=new.ranks)


class _Ranks:
    """A placement that is being changed; no change that lifts a rank above the limit is kept."""

    def __init__(self, loads_E: Floats, placement: Placement, limit: float) -> None:
        self.loads_E = loads_E.tolist()
        self.expert_of_S = list(placement.expert_of_S)
        self.slots_of = [set(placement.slots_of(e)) for e in range(placement.experts)]
        self.per_rank = placement.slots_per_rank
        self.limit, self.near = limit, limit * (1 + GAIN)
        self.load_R = [self._load(rank) for rank in range(placement.ranks)]

    def drop(self, slot: int, expert: int) -> bool:
        """Hold ``expert`` in the slot instead of one replica of what it holds now."""
        gone, mine = self.expert_of_S[slot], slot // self.per_rank
        count = len(self.slots_of[gone])
        if count == 1:
            return False
        eased = {s // self.per_rank for s in self.slots_of[expert]}
        raised = {s // self.per_rank for s in self.slots_of[gone]} - {mine}
        # Nearly all tries end at one of two cheap checks, of ranks that nothing makes lighter.
        share = self.loads_E[expert] / (len(self.slots_of[expert]) + 1)
        if mine not in eased and self.load_R[mine] - self._each(gone) + share > self.near:
            return False
        rise = self.loads_E[gone] / (count - 1) - self._each(gone)
        if any(self.load_R[rank] + rise > self.near for rank in raised - eased):
            return False
        return self._keep({slot: expert}, eased | raised | {mine})

    def swap(self, slot: int, other: int) -> bool:
        """Exchange two slots."""
        one, two = self.expert_of_S[slot], self.expert_of_S[other]
        ranks = (slot // self.per_rank, other // self.per_rank)
        shift = self._each(two) - self._each(one)
        highest = max(self.load_R[ranks[0]] + shift, self.load_R[ranks[1]] - shift)
        if ranks[0] != ranks[1] and highest > self.near:
            return False
        return self._keep({slot: two, other: one}, set(ranks))

    def _keep(self, change: dict[int, int], ranks: set[int]) -> bool:
        before = {slot: self.expert_of_S[slot] for slot in change}
        self._put(change)
        loads = {rank: self._load(rank) for rank in ranks}
        if max(loads.values()) > self.limit:
            self._put(before)
            return False
        for rank, load in loads.items():
            self.load_R[rank] = load
        return True

    def _put(self, change: dict[int, int]) -> None:
        for slot in change:
            self.slots_of[self.expert_of_S[slot]].discard(slot)
        for slot, expert in change.items():
            self.expert_of_S[slot] = expert
            self.slots_of[expert].add(slot)

    def _each(self, expert: int) -> float:
        return float(self.loads_E[expert] / len(self.slots_of[expert]))

    def _load(self, rank: int) -> float:
        """Added as ``rank_loads`` does, so that a limit that it computed can be reached."""
        held = self.expert_of_S[rank * self.per_rank : (rank + 1) * self.per_rank]
        return float(np.sort([self._each(expert) for expert in held]).sum())
