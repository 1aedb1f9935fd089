"""The verbs on the host: what a broken peer writes into a mailbox is never used as an index."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from sim.slabs import layers, load_alone

from epmoe.comm.words import word
from epmoe.config import MoEConfig
from epmoe.errors import ConfigMismatch, PeerLost
from epmoe.kernels.ops import HEAD_FIELDS

CONFIG = MoEConfig(
    experts=6, choices=2, hidden=16, inner=8, max_rows=4, dtype="fp32", stall_s=5.0, open_s=5.0
)
HEAD = (0, 0, 4, 0, 1, 0, 0, 0)
LIMIT_S = 5.0


@pytest.fixture
def pair():
    """The verbs of two ranks over one set of slabs; both have staged round 1."""
    found = []
    g = torch.Generator().manual_seed(1)
    for (moe,) in layers([CONFIG], 2):
        shapes = {"w1": (3, 8, 16), "w3": (3, 8, 16), "w2": (3, 16, 8)}
        load_alone(moe, {name: torch.randn(s, generator=g) for name, s in shapes.items()})
        found.append(moe._rounds[0].ops)
    for ops in found:
        stage(ops)
    return found


def stage(ops, head=HEAD, round=1):
    rng = random.Random(ops.rank)
    ids = torch.tensor([[rng.randrange(6), rng.randrange(6)] for _ in range(4)])
    ops.stage(torch.ones(4, 16), ids, torch.ones(4, 2), head, round)


def test_a_sound_mailbox_is_a_plan(pair):
    plan = pair[0].wait_plan(1, LIMIT_S)
    assert plan.plan.rows == sum(len(cells) for cells in plan.cells_R)
    total = plan.plan.rows + pair[1].wait_plan(1, LIMIT_S).plan.rows
    assert total == int(plan.rows_S.sum()) == 2 * 4 * 2


def test_plans_are_private_copies(pair):
    plan = pair[0].wait_plan(1, LIMIT_S)
    kept = [cells.copy() for cells in plan.cells_R]
    pair[0]._lists[0].fill(-7)
    pair[0]._counts[0].fill(-7)
    assert all(np.array_equal(a, b) for a, b in zip(plan.cells_R, kept, strict=True))


COUNTS = [-1, -(1 << 31), 1 << 30, (1 << 31) - 1]


@pytest.mark.parametrize("value", COUNTS)
@pytest.mark.parametrize("slot", range(3))
def test_a_count_that_cannot_be_is_reported_before_a_row_is_read(pair, value, slot):
    pair[0]._counts[0][1, slot] = value
    with pytest.raises(PeerLost, match="the mailbox of rank 1 holds counts") as caught:
        pair[0].wait_plan(1, LIMIT_S)
    assert (caught.value.ranks, caught.value.how) == ((1,), "corrupt")


def test_counts_of_the_right_sum_but_one_below_zero(pair):
    asked = int(pair[0]._counts[0][1, :3].sum())
    pair[0]._counts[0][1, :3] = [asked + 1, -1, 0]
    with pytest.raises(PeerLost, match=r"holds counts .*-1"):
        pair[0].wait_plan(1, LIMIT_S)


@pytest.mark.parametrize("value", [-1, 8, 1 << 20, (1 << 31) - 1, -(1 << 31)])
def test_a_list_entry_that_is_no_cell_is_reported(pair, value):
    pair[0]._lists[0][1, 0] = value
    with pytest.raises(PeerLost, match=r"the mailbox of rank 1 holds a list entry outside 0..7"):
        pair[0].wait_plan(1, LIMIT_S)


def test_a_word_of_more_rows_than_the_mailbox_holds(pair):
    for value in (9, 1 << 20, (1 << 31) - 1):
        pair[0].words._mine[1] = word(1, value)
        with pytest.raises(PeerLost, match=f"counts .* for a word of {value} rows"):
            pair[0].wait_plan(1, LIMIT_S)


def test_ten_thousand_mailboxes_of_garbage_never_index(pair):
    """Each is reported as corrupt, as a mismatch, or is harmless by chance: cells that exist."""
    rng, ops, reported = random.Random(5), pair[0], 0
    for _ in range(10_000):
        stage(pair[1])
        region = rng.choice([ops._lists[0], ops._counts[0]])
        at = (1, rng.randrange(region.shape[1]))
        old, region[at] = int(region[at]), rng.choice([rng.getrandbits(31), -rng.getrandbits(31)])
        try:
            plan = ops.wait_plan(1, LIMIT_S)
        except PeerLost as error:
            reported += (error.how, error.ranks) == ("corrupt", (1,))
        else:
            assert all(int(c.min()) >= 0 and int(c.max()) < 8 for c in plan.cells_R if len(c))
        region[at] = old
    assert reported > 4000


@pytest.mark.parametrize("field", range(8))
def test_a_head_that_differs_is_named(pair, field):
    other = tuple(n + (i == field) for i, n in enumerate(HEAD))
    stage(pair[1], other)
    for ops in pair:
        with pytest.raises(ConfigMismatch, match=f"round 1: {HEAD_FIELDS[field]} is ") as caught:
            ops.wait_plan(1, LIMIT_S)
        assert "on rank 0" in str(caught.value)
        assert "on rank 1" in str(caught.value)


def test_results_of_unused_choices_are_never_read(pair):
    ops = pair[0]
    ops._results.fill_(float("nan"))
    ids = torch.full((3, 2), -1)
    for one in pair:
        one.words.publish(1, 0, 1, 0)
    out = ops.reduce(ids, torch.full((3, 2), float("nan")), None, 1, LIMIT_S)
    assert torch.equal(out, torch.zeros(3, 16))


def test_nobody_is_everyones_first():
    for ranks in (1, 2, 4):
        ops = [moe._rounds[0].ops for (moe,) in layers([config_of(ranks)], ranks)]
        orders = [one._peers for one in ops]
        for step in range(ranks):
            assert sorted(order[step] for order in orders) == list(range(ranks))
        assert [order[-1] for order in orders] == list(range(ranks))


def config_of(ranks):
    return MoEConfig(experts=2 * ranks, choices=1, hidden=16, inner=8, max_rows=4)
