"""The planner: never worse than the published one, and with a fraction of its moves."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from epmoe.config import MoEConfig
from epmoe.sched.balance import loads_by_rank, max_over_mean, plan, rebalance
from epmoe.sched.moves import aligned, moves
from epmoe.sched.placement import Placement
from epmoe.sched.published import published
from epmoe.sched.retract import retracted


def config(experts: int, slots: int = 0) -> MoEConfig:
    return MoEConfig(experts=experts, choices=1, hidden=64, inner=64, max_rows=8, slots=slots)


def zipf(random: np.random.Generator, layers: int, experts: int, power: float | None = None):
    power = random.uniform(0.5, 1.5, (layers, 1)) if power is None else power
    loads = np.arange(1, experts + 1) ** -np.broadcast_to(power, (layers, 1))
    return random.permuted(loads, axis=1) * random.choice([1e2, 1e4, 1e6])


def many(seed: int, shapes: int, layers: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Loads of five kinds for random legal shapes, more ranks than experts included."""
    random = np.random.default_rng(seed)
    for _ in range(shapes):
        experts = int(random.choice([1, 2, 3, 5, 8, 16, 32, 60, 64, 128]))
        ranks = int(random.choice([1, 2, 3, 4, 6, 8, 16, 32]))
        slots = (-(-experts // ranks) + int(random.choice([0, 0, 1, 1, 2, 3]))) * ranks
        burst = zipf(random, layers, experts)
        burst[np.arange(layers), random.integers(0, experts, layers)] *= random.uniform(10, 1000)
        counts = np.floor(zipf(random, layers, experts))
        for loads in (
            zipf(random, layers, experts),
            counts,
            burst,
            random.integers(0, 3, (layers, experts)).astype(float),  # ties
            counts * (random.random((layers, experts)) < 0.3),  # zeros, at times nothing else
        ):
            yield loads, slots, ranks


@pytest.mark.parametrize(
    "shapes", [20, pytest.param(200, marks=pytest.mark.night)], ids=["1000", "10000"]
)
def test_never_worse_than_published_and_after_a_drift_with_a_fraction_of_its_moves(shapes):
    random = np.random.default_rng(7)
    theirs = ours = over_half = cases = 0
    for loads, slots, ranks in many(1, shapes, layers=10):
        shape = {"slots": slots, "ranks": ranks}
        known, own = published(loads, **shape), plan(loads, **shape)
        assert np.less_equal(max_over_mean(loads, own), max_over_mean(loads, known)).all()

        drifted = loads * random.uniform(0.9, 1.1, loads.shape)
        known_next = published(drifted, **shape)
        own_next = plan(drifted, **shape, current=own)
        assert np.less_equal(
            max_over_mean(drifted, own_next), max_over_mean(drifted, known_next)
        ).all()
        for a, b, c, d in zip(known, known_next, own, own_next, strict=True):
            their, our = len(moves(a, b)), len(moves(c, d))
            theirs, ours, cases = theirs + their, ours + our, cases + 1
            over_half += 2 * our > their
    assert cases == shapes * 50
    assert ours <= 0.08 * theirs  # seen: 0.061
    assert over_half <= 0.035 * cases  # seen: 0.024; fewer were proved impossible in most of them


def test_speed_of_sixty_large_layers():
    random = np.random.default_rng(0)
    loads = zipf(random, 60, 256, 1.2)
    shape = {"slots": 288, "ranks": 32}
    seconds = []
    for _ in range(3):  # the best of three: other processes share this machine
        start = time.process_time()
        own = plan(loads, **shape)
        plan(loads * random.uniform(0.9, 1.1, loads.shape), **shape, current=own)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0  # both plans together; seen: 0.2 to 0.3


def test_published_vectors_are_reached():
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    shape = {"slots": 16, "ranks": 8}
    known = max_over_mean(loads, published(loads, **shape))
    assert [round(ratio, 3) for ratio in known] == [1.073, 1.190]
    assert np.less_equal(max_over_mean(loads, plan(loads, **shape)), known).all()
    hosts = max_over_mean(loads, published(loads, **shape, groups=4, hosts=2))
    assert [round(ratio, 3) for ratio in hosts] == [1.208, 1.242]


def test_never_worse_than_the_hierarchical_plan_when_told_its_hosts():
    cases = 0
    for loads, slots, ranks in many(5, 30, layers=4):
        if loads.shape[1] % 8 or ranks % 2:
            continue
        options = {"slots": slots, "ranks": ranks, "groups": 8, "hosts": 2}
        known, now = published(loads, **options), [line(loads.shape[1], slots, ranks)] * 4
        for own in (plan(loads, **options), plan(loads, **options, current=now)):
            assert np.less_equal(max_over_mean(loads, own), max_over_mean(loads, known)).all()
            cases += 1
    assert cases > 20


def test_what_is_good_enough_is_left_alone():
    now = Placement(expert_of_S=(3, 0, 2, 1), experts=4, ranks=2)
    assert rebalance([5, 5, 3.05, 3], config(4), 2, current=now) == now  # 8.05 and 8
    assert rebalance([5, 3, 3, 5.1], config(4), 2, current=now) != now  # 10.1 and 6
    assert rebalance([5, 3, 3, 5.1], config(4), 2, current=now, enough=1.3) == now  # of 8.05


def test_enough_trades_balance_for_moves():
    random = np.random.default_rng(3)
    loads = zipf(random, 8, 64, 0.7)
    now = plan(loads, slots=80, ranks=8)
    drifted = loads * random.uniform(0.5, 2, loads.shape)
    known = max_over_mean(drifted, published(drifted, slots=80, ranks=8))
    moved = []
    for enough in (1.0, 1.02, 1.05, 1.1):
        found = plan(drifted, slots=80, ranks=8, current=now, enough=enough)
        moved.append(sum(len(moves(a, b)) for a, b in zip(now, found, strict=True)))
        assert np.less_equal(max_over_mean(drifted, found), np.maximum(known, enough)).all()
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0


def test_no_renaming_of_ranks_and_no_single_step_back_would_save_a_move():
    random = np.random.default_rng(2)
    for loads, slots, ranks in many(12, 15, layers=4):
        shape = {"slots": slots, "ranks": ranks}
        now = published(loads, **shape)
        drifted = loads * random.uniform(0.5, 2, loads.shape)
        for old, new, row in zip(now, plan(drifted, **shape, current=now), drifted, strict=True):
            top = loads_by_rank(row, [new]).max()
            for less in (aligned(old, new), retracted(row, old, new, top)):
                assert len(moves(old, less)) == len(moves(old, new))


def test_enough_that_cannot_be_reached_is_still_no_worse_than_published():
    for loads, slots, ranks in many(11, 20, layers=5):
        known = max_over_mean(loads, published(loads, slots=slots, ranks=ranks))
        now = [line(loads.shape[1], slots, ranks)] * 5
        found = plan(loads, slots=slots, ranks=ranks, current=now, enough=1.0)
        assert np.less_equal(max_over_mean(loads, found), np.maximum(known, 1 + 1e-12)).all()


def test_no_load_at_all_gives_equally_many_replicas():
    assert rebalance([0] * 6, config(6, 12), 4).counts_E.tolist() == [2] * 6
    assert rebalance(torch.zeros(6), config(6, 12), 4, current=Placement.linear(6, 12, 4)) == (
        Placement.linear(6, 12, 4)
    )


def test_more_ranks_than_experts():
    got = rebalance([6, 1, 1], config(3, 8), 8)
    assert got.counts_E.tolist() == [6, 1, 1]


def test_equal_arguments_give_equal_placements():
    loads = zipf(np.random.default_rng(5), 3, 32)
    first = plan(loads, slots=40, ranks=8)
    assert plan(torch.from_numpy(loads), slots=40, ranks=8) == first
    alone = tuple(plan(row, slots=40, ranks=8)[0] for row in loads)
    assert alone == first  # layers planned together do not influence each other


def test_loads_by_rank_of_placements():
    got = loads_by_rank([[6, 2, 2, 2], [1, 1, 1, 5]], [Placement.linear(4, 6, 2)] * 2)
    assert got.tolist() == [[6 / 2 + 2 / 2 + 2, 2 + 6 / 2 + 2 / 2], [2, 6]]


def line(experts: int, slots: int, ranks: int) -> Placement:
    return Placement.linear(experts, slots, ranks)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: rebalance([1, float("nan")], config(2), 2), "got nan for expert 1 of layer 0"),
        (lambda: rebalance([1, -1], config(2), 2), "got -1.0 for expert 1"),
        (lambda: rebalance([1, 1, 1], config(2), 2), "loads_E must hold one load for each"),
        (lambda: rebalance([[1, 1]] * 2, config(2), 2), "loads_E must hold one load for each"),
        (lambda: rebalance([1, 1], config(2, 5), 2), r"slots \(5\) must be a multiple"),
        (lambda: rebalance([1, 1], config(2), 2, enough=0.5), "enough must be at least 1, got 0.5"),
        (lambda: rebalance([1, 1], config(2), 2, current=line(2, 4, 2)), r"\(2, 2, 2\), got"),
        (lambda: plan([1, 1], slots=1, ranks=1), "slots must be at least experts"),
        (lambda: plan([1, 1], slots=2, ranks=1, current=[]), "must be 1, one per layer, got 0"),
        (lambda: max_over_mean([1, 1], []), "one per layer"),
    ],
)
def test_what_cannot_be_planned_is_refused(ask, says):
    with pytest.raises(ValueError, match=says):
        ask()
