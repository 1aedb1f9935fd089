"""Every byte of every moved slot travels once, and no rank carries more than the budget."""

import random
import sys

import pytest

from epmoe.sched.freight import PIECE, schedule
from epmoe.sched.moves import Move, moves
from epmoe.sched.placement import Placement


def draw(seed):
    rng = random.Random(seed)
    ranks, per_rank = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 2, 3, 5])
    slots = ranks * per_rank
    experts = rng.randint(1, slots)
    maps = []
    for _ in range(2):
        spare = [rng.randrange(experts) for _ in range(slots - experts)]
        held = [*range(experts), *spare]
        rng.shuffle(held)
        maps.append(Placement.of(held, experts=experts, ranks=ranks))
    return *maps, rng.choice([1, 15, 16, 40, 1000]), rng.choice([16, 33, 64, 5000])


@pytest.mark.parametrize("seed", range(300))
def test_every_byte_travels_once_within_the_budget(seed):
    old, new, slot_bytes, budget = draw(seed)
    moved = moves(old, new)
    seen = {}
    for parcels in schedule(moved, old, slot_bytes, budget):
        assert parcels, "a round without freight would be a wasted round"
        out_R, in_R = [0] * old.ranks, [0] * old.ranks
        taken = [[] for _ in range(old.ranks)]
        for p in parcels:
            source, target = old.rank_of(p.source), old.rank_of(p.slot)
            out_R[source] += p.length
            in_R[target] += p.length
            taken[source].append((p.place, p.place + p.length))
            assert p.place % PIECE == 0
            assert p.at % PIECE == 0
            seen.setdefault((p.slot, p.source), []).append((p.at, p.length))
        assert max(out_R) <= budget
        assert max(in_R) <= budget
        for spans in taken:
            spans.sort()
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert not spans or spans[-1][1] <= budget
    assert seen.keys() == {(m.slot, m.source) for m in moved}
    for pieces in seen.values():
        end = 0
        for at, length in pieces:
            assert at == end
            end += length
        assert end == slot_bytes


def test_a_budget_below_one_piece_is_refused():
    with pytest.raises(ValueError, match="budget must be at least 16 bytes, got 15"):
        next(schedule([Move(0, 1, 1)], Placement.linear(2, 2, 2), 40, 15))


def test_a_round_costs_time_in_its_parcels_not_in_the_moves_that_wait():
    new = Placement.of([*range(1, 512), 0], experts=512, ranks=4)
    moved = moves(Placement.linear(512, 512, 4), new)
    rounds = schedule(moved, new, 1 << 30, 1 << 20)
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event == "c_call"))
    for _ in range(100):
        assert len(next(rounds)) <= 8
    sys.setprofile(None)
    assert sum(calls) <= 100 * 200  # 512 moves wait all the time
