"""Counts to offsets, against loops that share no code with them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from epmoe.sched.plan import plan, request


@pytest.mark.parametrize("seed", range(50))
def test_request_lists_every_live_choice_once_in_slot_order(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks, each = rng.choice([1, 2, 3, 8]), rng.choice([1, 2, 5])
    rows, choices = rng.choice([0, 1, 7, 40]), rng.choice([1, 2, 8])
    slots = torch.randint(-1, ranks * each, (rows, choices), generator=g)
    slots = slots.to(rng.choice([torch.int32, torch.int64]))
    if rng.random() < 0.2:
        slots[:] = -1
    ask = request(slots, ranks, each)
    wanted = {}
    for cell, slot in enumerate(slots.reshape(-1).tolist()):
        if slot >= 0:
            wanted.setdefault(slot, []).append(cell)
    for rank in range(ranks):
        mine = [c for slot in range(rank * each, rank * each + each) for c in wanted.get(slot, [])]
        assert ask.cells_R()[rank].tolist() == mine
    counted = [[len(wanted.get(r * each + s, [])) for s in range(each)] for r in range(ranks)]
    assert ask.counts_RL.tolist() == counted
    assert ask.cells_N.dtype == np.int32


@pytest.mark.parametrize("seed", range(50))
def test_plan_lays_rows_out_by_source_then_slot(seed):
    rng = np.random.default_rng(seed)
    ranks, each = 1 + seed % 5, 1 + seed % 3
    counts = rng.integers(0, 4, (ranks, each))
    found, at = plan(counts), 0
    by_slot = {slot: [] for slot in range(each)}
    for source in range(ranks):
        start = at
        for slot in range(each):
            n = int(counts[source, slot])
            if n:
                by_slot[slot].append(slice(at, at + n))
            at += n
        assert found.source(source) == slice(start, at)
    assert found.rows == at
    assert {slot: found.pieces(slot) for slot in range(each)} == by_slot


def test_no_rows_at_all():
    found = plan(np.zeros((3, 2), dtype=np.int64))
    assert (found.rows, found.pieces(0), found.source(2)) == (0, [], slice(0, 0))
    ask = request(torch.full((4, 2), -1), 3, 2)
    assert [len(ask.cells_R()[r]) for r in range(3)] == [0, 0, 0]
