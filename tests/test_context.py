"""A context is checked when it is made."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ranks import ranks
from sim.draw import slots_of, weights_of

from epmoe import ConfigMismatch, MoE, MoEConfig
from epmoe.context import PHASES, ForwardContext

WRONG = [
    ({"phase": "train"}, ValueError, "phase must be one of .*'train'"),
    ({"phase": None}, ValueError, "phase must be one of .*None"),
    ({"rows": [1, 2]}, TypeError, "rows must be a tuple of int"),
    ({"rows": 3}, TypeError, "rows must be a tuple of int"),
    ({"rows": (1, 2.0)}, TypeError, "rows must be a tuple of int"),
    ({"rows": ()}, ValueError, "rows must be at least 0 on every rank"),
    ({"rows": (1, -1)}, ValueError, r"rows must be at least 0 on every rank, got \(1, -1\)"),
    ({"epoch": -1}, ValueError, "epoch must be at least 0, got -1"),
    ({"epoch": "1"}, TypeError, "epoch must be an int, got str"),
    ({"chunk": -1}, ValueError, "chunk must be at least 0, got -1"),
    ({"chunk": 1}, ValueError, r"chunk must be below chunks \(1\), got 1"),
    ({"chunks": 0}, ValueError, "chunks must be at least 1, got 0"),
    ({"chunks": 2}, ValueError, "capacity must be set for one of 2 chunks, got None"),
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
    ({"capacity": 1.5}, TypeError, "capacity must be an int, got float"),
]


@pytest.mark.parametrize(("given", "error", "text"), WRONG, ids=[str(g) for g, _, _ in WRONG])
def test_what_is_wrong_is_named(given, error, text):
    with pytest.raises(error, match=text):
        ForwardContext(**given)


def test_what_is_right_is_kept_and_cannot_change():
    for phase in PHASES:
        context = ForwardContext(phase=phase, rows=(0, 5), epoch=2)
        assert (context.phase, context.rows, context.epoch) == (phase, (0, 5), 2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            context.epoch = 3


def test_a_forward_is_cut_alike_on_every_rank_and_only_once():
    whole = ForwardContext(phase="decode", rows=(5, 0, 9), epoch=3)
    pieces = whole.chunked(4)
    assert [p.rows for p in pieces] == [(2, 0, 3), (2, 0, 3), (1, 0, 3)]
    assert [(p.chunk, p.chunks, p.capacity) for p in pieces] == [(0, 3, 4), (1, 3, 4), (2, 3, 4)]
    assert {(p.phase, p.epoch) for p in pieces} == {("decode", 3)}
    assert pieces[1].chunked(2) == (pieces[1],)
    with pytest.raises(ValueError, match="rows must be known on every rank"):
        ForwardContext().chunked(4)


@ranks(1, 3)
def test_a_forward_that_the_caller_cuts_gives_the_same_bits(rank, group):
    config = MoEConfig(
        experts=6, choices=2, hidden=32, inner=16, max_rows=4, stall_s=5.0, shared_inner=8
    )
    g = torch.Generator().manual_seed(1)
    weights = weights_of(config, g, group.size)
    rows_R = tuple([9, 0, 5][: group.size])
    x = torch.randn(rows_R[rank], 32, generator=g).bfloat16()
    ids = torch.randint(0, 6, (rows_R[rank], 2), generator=g)
    w = torch.rand(rows_R[rank], 2, generator=g)
    whole = ForwardContext(rows=rows_R)
    with MoE.open(config, group) as moe:
        moe.load(**slots_of(weights, rank, config.slots_per_rank(group.size)))
        want, have, at = moe(x, ids, w, context=whole), [], 0
        for piece in whole.chunked(config.max_rows):
            span = slice(at, at + piece.rows[rank])
            have.append(moe(x[span], ids[span], w[span], context=piece))
            at = span.stop
        assert torch.equal(torch.cat(have), want)
        tight = dataclasses.replace(whole.chunked(4)[0], capacity=2)
        with pytest.raises(ValueError, match="context.capacity must hold 3 rows"):
            moe(x[:3], ids[:3], w[:3], context=tight)


@ranks(2)
def test_ranks_in_different_chunks_are_a_mismatch_that_names_the_chunk(rank, group):
    config = MoEConfig(experts=2, choices=1, hidden=32, inner=16, max_rows=4, stall_s=5.0)
    weights = weights_of(config, torch.Generator().manual_seed(1), 2)
    piece = ForwardContext(rows=(0, 0), chunk=rank, chunks=2, capacity=4)
    with MoE.open(config, group) as moe:
        moe.load(**slots_of(weights, rank, 1))
        nothing = torch.empty(0, 32).bfloat16(), torch.empty(0, 1).long(), torch.empty(0, 1)
        with pytest.raises(ConfigMismatch, match="chunk is"):
            moe(*nothing, context=piece)
