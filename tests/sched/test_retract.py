"""Retracting: fewer moves, never more load."""

from __future__ import annotations

import numpy as np
import pytest

from epmoe.sched.moves import moves
from epmoe.sched.placement import Placement
from epmoe.sched.retract import retracted
from epmoe.sched.search import rank_loads


def top(loads: np.ndarray, placement: Placement) -> float:
    held = np.array([placement.expert_of_S])
    return float(rank_loads(loads[None, :], held, placement.ranks).max())


def some(random: np.random.Generator, experts: int, slots: int, ranks: int) -> Placement:
    extra = random.integers(0, experts, slots - experts)
    held = random.permutation(np.concatenate([np.arange(experts), extra]))
    return Placement.of(held, experts=experts, ranks=ranks)


def steps_back(old: Placement, new: Placement) -> list[Placement]:
    """Everything one drop or one exchange away that gives at least one slot its old expert."""
    found = []
    for slot, expert in enumerate(old.expert_of_S):
        if new.expert_of_S[slot] == expert:
            continue
        one = list(new.expert_of_S)
        one[slot] = expert
        if new.counts_E[new.expert_of_S[slot]] > 1:
            found.append(one)
        for other in new.slots_of(expert):
            if old.expert_of_S[other] != expert:
                two = list(one)
                two[other] = new.expert_of_S[slot]
                found.append(two)
    return [Placement.of(f, experts=old.experts, ranks=old.ranks) for f in found]


@pytest.mark.parametrize("seed", range(80))
def test_the_limit_holds_and_no_single_step_back_is_left(seed):
    random = np.random.default_rng(seed)
    experts, ranks = int(random.integers(1, 9)), int(random.integers(1, 5))
    slots = (-(-experts // ranks) + int(random.integers(0, 3))) * ranks
    old, new = (some(random, experts, slots, ranks) for _ in range(2))
    loads = random.exponential(size=experts)
    limit = top(loads, new) * float(random.choice([1, 1.05]))
    got = retracted(loads, old, new, limit)
    assert top(loads, got) <= limit
    assert len(moves(old, got)) <= len(moves(old, new))
    assert not [back for back in steps_back(old, got) if top(loads, back) <= limit * (1 - 1e-12)]


def test_an_exchange_of_equals_is_taken_back():
    old = Placement.linear(4, 4, 2)
    new = Placement(expert_of_S=(0, 3, 2, 1), experts=4, ranks=2)
    assert retracted(np.array([3.0, 0, 3, 0]), old, new, 3.0) == old


def test_without_a_limit_nothing_moves():
    random = np.random.default_rng(0)
    old, new = some(random, 8, 16, 4), some(random, 8, 8 * 2, 4)
    assert len(moves(old, retracted(np.ones(8), old, new, 1e9))) <= len(moves(old, new)) // 2
