"""The search for few moves: against all placements there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from epmoe.sched.fewest import fewest
from epmoe.sched.moves import moves
from epmoe.sched.placement import Placement
from epmoe.sched.search import rank_loads


def tops(loads: np.ndarray, rows: np.ndarray, ranks: int) -> np.ndarray:
    return rank_loads(np.tile(loads, (len(rows), 1)), rows, ranks).max(1)


def every(experts: int, slots: int) -> np.ndarray:
    """All placements that hold every expert."""
    rows = np.array(list(itertools.product(range(experts), repeat=slots)))
    return rows[[len(set(row)) == experts for row in rows.tolist()]]


@pytest.mark.parametrize(
    ("experts", "slots", "ranks"), [(3, 6, 2), (3, 6, 3), (4, 6, 3), (2, 8, 4)]
)
def test_small_layers_move_as_few_slots_as_any_placement_could(experts, slots, ranks):
    random, rows = np.random.default_rng(experts * slots + ranks), every(experts, slots)
    found = missed = 0
    for _ in range(25):
        loads, old = random.exponential(size=experts), random.choice(rows)
        top = tops(loads, rows, ranks)
        limit = float(np.quantile(top, random.choice([0.0, 0.05, 0.3])))
        mine = Placement.of(old, experts=experts, ranks=ranks)
        if tops(loads, old[None], ranks)[0] <= limit:
            continue
        good = rows[top <= limit]
        least = int((good != old).sum(1).min())
        assert fewest(loads, mine, limit, below=least) is None
        got = fewest(loads, mine, limit, below=slots + 1)
        if got is None or len(moves(mine, got)) > least:
            missed += 1
            continue
        found += 1
        assert tops(loads, np.array([got.expert_of_S]), ranks)[0] <= limit
    assert found >= 10
    assert missed == 0  # seen, not promised


def test_what_cannot_move_is_not_found():
    old = Placement.linear(4, 4, 2)
    assert fewest(np.array([4.0, 1, 1, 1]), old, 3.9, below=4) is None  # no slot to spare
    assert fewest(np.array([4.0, 1, 1, 1]), old, 5.0, below=1) is None  # nothing to improve on


def test_one_move_that_eases_many_ranks_is_seen():
    """Expert 0 fills three ranks; one more replica eases all of them, a swap only one."""
    old = Placement(expert_of_S=(0, 1, 0, 2, 0, 3, 4, 4), experts=5, ranks=4)
    loads = np.array([9.0, 1, 1, 1, 0.5])
    got = fewest(loads, old, 3.3, below=8)
    assert got is not None
    assert len(moves(old, got)) == 1
    assert got.counts_E.tolist() == [4, 1, 1, 1, 1]


def test_what_looks_alike_by_its_excess_is_searched_too():
    """Expert 0 in the place of a 1 shows only in ranks that are not full: so does expert 3."""
    old = Placement(expert_of_S=(4, 3, 3, 1, 1, 2, 1, 1, 2, 1, 0, 3), experts=5, ranks=4)
    loads = np.array([176.8, 987.7, 312.4, 450.0, 219.5])
    got = fewest(loads, old, 545.1, below=4)  # the fullest rank carries 551.3
    assert got is not None
    assert got.counts_E.tolist() == [3, 3, 2, 3, 1]
    assert len(moves(old, got)) == 2


def test_large_layers_are_not_searched():
    old = Placement.linear(256, 288, 32)
    loads = np.arange(256.0)
    assert fewest(loads, old, 1.2 * float(loads.mean() * 256 / 32), below=40) is None
