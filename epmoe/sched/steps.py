"""The placements on the way from one to another, so that no round switches many slots at once."""

from __future__ import annotations

from collections import Counter

from epmoe.sched.placement import Placement


def steps(old: Placement, new: Placement, most: int) -> tuple[Placement, ...]:
    """Legal placements that end with ``new``; each changes at most ``most`` slots of any rank.

    A slot can change alone while its expert has another slot.  Experts that have none form rings
    (the first takes the slot of the second, and so on), which have to change together: only a ring
    that holds more than ``most`` slots of one rank is a larger step.

    >>> old = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)
    >>> new = Placement(expert_of_S=(1, 2, 0, 1), experts=3, ranks=2)
    >>> [step.expert_of_S for step in steps(old, new, 1)]
    [(1, 1, 2, 0), (1, 2, 2, 0), (1, 2, 0, 0), (1, 2, 0, 1)]
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if most >= old.slots_per_rank:
        return (new,)
    now, wanted = list(old.expert_of_S), new.expert_of_S
    count = Counter(now)
    pending = [slot for slot, expert in enumerate(wanted) if now[slot] != expert]
    found: list[Placement] = []
    used_R = Counter[int]()
    while pending:
        free = [slot for slot in pending if count[now[slot]] > 1]
        roomy = (slot for slot in free if used_R[old.rank_of(slot)] < most)
        together = [next(roomy, free[0])] if free else _ring(now, wanted, pending)
        adds_R = Counter(old.rank_of(slot) for slot in together)
        if used_R and any(used_R[rank] + adds > most for rank, adds in adds_R.items()):
            found.append(Placement.of(now, experts=old.experts, ranks=old.ranks))
            used_R.clear()
        used_R += adds_R
        for slot in together:
            count[now[slot]] -= 1
            count[wanted[slot]] += 1
            now[slot] = wanted[slot]
            pending.remove(slot)
    return (*found, new)


def _ring(now: list[int], wanted: tuple[int, ...], pending: list[int]) -> list[int]:
    """Slots that can only change together, when no pending slot holds an expert twice.

    Each one's expert is taken over by the next one; the last one's by the first.
    """
    taker = {wanted[slot]: slot for slot in reversed(pending)}
    chain = [pending[0]]
    while taker[now[chain[-1]]] not in chain:
        chain.append(taker[now[chain[-1]]])
    return chain[chain.index(taker[now[chain[-1]]]) :]
