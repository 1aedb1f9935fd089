"""Every placement on the way is legal, no rank changes many slots at once, and the end is right."""

import random

import pytest

from epmoe.sched.placement import Placement
from epmoe.sched.steps import steps


def drawn(seed):
    rng = random.Random(seed)
    ranks, per_rank = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 5, 9])
    slots = ranks * per_rank
    experts = rng.choice([slots, rng.randint(1, slots)])
    maps = []
    for _ in range(2):
        held = [*range(experts), *(rng.randrange(experts) for _ in range(slots - experts))]
        rng.shuffle(held)
        maps.append(Placement.of(held, experts=experts, ranks=ranks))
    return *maps, rng.choice([1, 2, 100])


def changed(a, b):
    return [s for s in range(a.slots) if a.expert_of_S[s] != b.expert_of_S[s]]


@pytest.mark.parametrize("seed", range(300))
def test_every_step_is_legal_and_small(seed):
    old, new, most = drawn(seed)
    way, now = steps(old, new, most), old  # Placement itself refuses one that lost an expert
    seen = []
    for step in way:
        slots = changed(now, step)
        seen += slots
        in_R = [sum(old.rank_of(s) == r for s in slots) for r in range(old.ranks)]
        takers = {now.expert_of_S[s]: step.expert_of_S[s] for s in slots}
        for full in (r for r in range(old.ranks) if in_R[r] > most):
            mine = [s for s in slots if old.rank_of(s) == full]
            ring = [now.expert_of_S[mine[0]]]
            while takers[ring[-1]] not in ring:
                ring.append(takers[ring[-1]])
            assert takers[ring[-1]] == ring[0]
            assert {now.expert_of_S[s] for s in mine} <= set(ring), "two rings could be two steps"
            assert all(len(now.slots_of(expert)) == 1 for expert in ring), "one could go alone"
        now = step
    assert now == new
    assert sorted(seen) == changed(old, new), "no slot changes twice"
    if most == 100:
        assert len(way) == 1


def test_a_step_is_filled_before_the_next_begins():
    old = Placement(expert_of_S=(0, 1, 2, 3, 0, 1, 2, 3), experts=4, ranks=2)
    new = Placement(expert_of_S=(0, 1, 2, 3, 1, 2, 3, 0), experts=4, ranks=2)
    assert len(steps(old, new, 2)) == 2
    assert steps(old, old, 1) == (old,)


def test_a_step_of_no_slots_is_refused():
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        steps(Placement.linear(2, 2, 1), Placement.linear(2, 2, 1), 0)
