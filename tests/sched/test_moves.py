"""Moves: what travels, from where, and never more than needed."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from epmoe.sched.moves import Move, _assign, aligned, bytes_RR, moves
from epmoe.sched.placement import Placement


def some(seed: int, experts: int = 6, slots: int = 8, ranks: int = 4) -> Placement:
    dice = random.Random(seed)
    held = [*range(experts), *(dice.randrange(experts) for _ in range(slots - experts))]
    dice.shuffle(held)
    return Placement(expert_of_S=tuple(held), experts=experts, ranks=ranks)


@pytest.mark.parametrize("seed", range(50))
def test_copying_every_move_from_the_old_slots_gives_the_new_placement(seed):
    old, new = some(seed), some(seed + 1000)
    held = list(old.expert_of_S)
    found = moves(old, new)
    for move in found:
        assert old.expert_of_S[move.source] == move.expert != old.expert_of_S[move.slot]
        held[move.slot] = old.expert_of_S[move.source]
        local = [s for s in old.slots_of(move.expert) if old.rank_of(s) == new.rank_of(move.slot)]
        assert not local or move.source in local
    assert tuple(held) == new.expert_of_S
    assert [move.slot for move in found] == sorted({move.slot for move in found})


def test_equal_placements_move_nothing():
    assert moves(some(1), some(1)) == ()


def test_reads_are_spread_over_the_ranks_that_hold_the_expert():
    old = Placement(expert_of_S=(0, 0, 0, 1, 2, 3, 4, 5), experts=6, ranks=8)
    new = Placement(expert_of_S=(0, 1, 2, 0, 0, 3, 4, 5), experts=6, ranks=8)
    assert moves(old, new) == (Move(1, 1, 3), Move(2, 2, 4), Move(3, 0, 0), Move(4, 0, 1))


def test_experts_without_a_choice_are_placed_before_those_that_have_one():
    old = Placement(expert_of_S=(0, 1, 2, 0, 3, 4), experts=5, ranks=3)  # 1 only beside 0
    new = Placement(expert_of_S=(4, 1, 2, 3, 0, 1), experts=5, ranks=3)
    sources = {move.slot: move.source for move in moves(old, new)}
    assert sources[5] == 1  # only rank 0 has expert 1, so expert 0 for slot 4 comes from rank 1
    assert sources[4] == 3


def test_bytes_between_ranks():
    old = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)
    new = Placement(expert_of_S=(0, 0, 2, 1), experts=3, ranks=2)
    found = moves(old, new)
    assert found == (Move(1, 0, 0), Move(3, 1, 1))
    assert bytes_RR(found, new, 10).tolist() == [[10, 10], [0, 0]]
    with pytest.raises(ValueError, match="slot_bytes must be at least 0, got -1"):
        bytes_RR(found, new, -1)


def best_by_trying(old: Placement, new: Placement) -> int:
    """Fewest changed slots over all ways to name the ranks (order inside a rank is free)."""
    fewest = old.slots
    for names in itertools.permutations(range(old.ranks)):
        changed = 0
        for rank, name in enumerate(names):
            left = list(new.experts_on(name))
            for expert in old.experts_on(rank):
                if expert in left:
                    left.remove(expert)
                else:
                    changed += 1
        fewest = min(fewest, changed)
    return fewest


@pytest.mark.parametrize("seed", range(60))
def test_aligned_keeps_who_lives_together_and_moves_the_fewest(seed):
    old, new = some(seed, 5, 12, 4), some(seed + 1000, 5, 12, 4)
    got = aligned(old, new)
    bags = [sorted(tuple(sorted(p.experts_on(r))) for r in range(4)) for p in (got, new)]
    assert bags[0] == bags[1]
    assert len(moves(old, got)) == best_by_trying(old, new)


@pytest.mark.parametrize("seed", range(60))
def test_assignment_is_the_best_of_all_permutations(seed):
    dice = np.random.default_rng(seed)
    size = int(dice.integers(1, 7))
    gain = dice.integers(0, 4, (size, size))
    got = _assign(gain)
    assert sorted(got) == list(range(size))
    best = max(sum(gain[i, p[i]] for i in range(size)) for p in itertools.permutations(range(size)))
    assert sum(gain[i, got[i]] for i in range(size)) == best


@pytest.mark.parametrize("other", [some(1, 5), some(1, slots=12), some(1, ranks=2)])
def test_placements_of_different_shapes_are_refused(other):
    for ask in (moves, aligned):
        with pytest.raises(ValueError, match="old and new must have equally many"):
            ask(some(1), other)
