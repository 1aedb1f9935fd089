"""Placement: one map, and everything derived from it."""

from __future__ import annotations

import itertools

import pytest
import torch

from epmoe.sched.placement import Placement, choose_from, choose_slots


def spread() -> Placement:
    """6 experts on 4 ranks of 2 slots; 0 lives on ranks 0 and 3, 4 on ranks 1 and 2."""
    return Placement(expert_of_S=(0, 1, 4, 2, 3, 4, 5, 0), experts=6, ranks=4)


def test_tables_follow_from_the_map():
    p = spread()
    assert (p.slots, p.slots_per_rank) == (8, 2)
    assert p.counts_E.tolist() == [2, 1, 1, 1, 2, 1]
    assert p.replicas_EX.tolist() == [[0, 7], [1, -1], [3, -1], [4, -1], [2, 5], [6, -1]]
    assert p.replicas_EX.dtype == p.counts_E.dtype == torch.int32
    assert [p.experts_on(r) for r in range(4)] == [(0, 1), (4, 2), (3, 4), (5, 0)]
    assert p.slots_of(4) == (2, 5)
    assert p.slot_of(4, 1) == 5
    assert p.rank_of(5) == 2
    assert p.slots_on(3) == range(6, 8)
    assert torch.equal(p.replicas(3)[:, :2], p.replicas_EX)
    assert (p.replicas(3)[:, 2] == -1).all()


def test_equal_maps_are_equal_and_hash_equal():
    assert spread() == spread()
    assert len({spread(), spread(), Placement.linear(6, 8, 4)}) == 2
    assert Placement.of(torch.tensor([0, 1, 0, 1]), experts=2, ranks=4) == Placement.linear(2, 4, 4)


def test_linear_without_spare_slots_is_the_identity():
    assert Placement.linear(6, 6, 3).expert_of_S == tuple(range(6))
    assert Placement.linear(4, 6, 2).expert_of_S == (0, 1, 2, 3, 0, 1)


@pytest.mark.parametrize(
    ("expert_of_S", "experts", "ranks", "says"),
    [
        ((0, 1, 1, 0), 3, 2, r"missing \[2\]"),
        ((0, 1, 2), 3, 2, "got 3"),
        ((0, 1), 3, 2, "got 2"),
        ((0, 1, 3, 2), 3, 2, r"expert_of_S\[2\] must be in 0..2, got 3"),
        ((0, -1, 1, 2), 3, 2, r"expert_of_S\[1\] must be in 0..2, got -1"),
        ((), 1, 1, "got 0"),
        ((0,), 0, 1, "experts must be at least 1, got 0"),
        ((0,), 1, 0, "ranks must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_a_placement_is_refused_by_value(expert_of_S, experts, ranks, says):
    with pytest.raises(ValueError, match=says):
        Placement(expert_of_S=expert_of_S, experts=experts, ranks=ranks)


def test_what_is_not_a_map_of_integers_is_refused_by_type():
    with pytest.raises(TypeError, match="Placement.of"):
        Placement(expert_of_S=[0, 1], experts=2, ranks=1)
    with pytest.raises(TypeError, match="expert_of_S"):
        Placement(expert_of_S=(0, 1.0), experts=2, ranks=1)
    with pytest.raises(TypeError, match="ranks"):
        Placement(expert_of_S=(0, 1), experts=2, ranks=True)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda p: p.slots_of(6), "expert must be in 0..5, got 6"),
        (lambda p: p.slot_of(1, 1), "replica of expert 1 must be in 0..0, got 1"),
        (lambda p: p.slots_on(-1), "rank must be in 0..3, got -1"),
        (lambda p: p.rank_of(8), "slot must be in 0..7, got 8"),
        (lambda p: p.replicas(1), "width must be at least 2"),
    ],
)
def test_questions_outside_the_map_are_refused(ask, says):
    with pytest.raises(ValueError, match=says):
        ask(spread())


def batch(rows: int, choices: int = 3, experts: int = 6, masked: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, experts, generator=generator).argsort(1)[:, :choices]
    return torch.where(torch.rand(rows, choices, generator=generator) < masked, -1, ids)


@pytest.mark.parametrize("rows", [0, 1, 5, 200])
@pytest.mark.parametrize("invariant", [False, True])
def test_every_choice_lands_on_a_slot_of_its_expert(rows, invariant):
    p, ids = spread(), batch(rows)
    slots = choose_slots(ids, p, rank=1, tokens_T=torch.arange(rows) if invariant else None)
    holds = torch.tensor(p.expert_of_S)
    assert slots.shape == ids.shape
    assert slots.dtype == ids.dtype
    assert torch.equal(torch.where(slots < 0, slots, holds[slots]), ids)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_without_tokens_replicas_of_an_expert_differ_by_one_row_at_most(rank):
    p, ids = spread(), batch(301)
    rows_S = torch.bincount(choose_slots(ids, p, rank=rank).flatten() + 1, minlength=9)[1:]
    for expert in range(6):
        rows = [int(rows_S[slot]) for slot in p.slots_of(expert)]
        assert sum(rows) == int((ids == expert).sum())
        assert max(rows) - min(rows) <= 1


def test_ranks_with_one_row_each_do_not_all_pick_the_first_replica():
    p, one = spread(), torch.tensor([[4]])
    assert {int(choose_slots(one, p, rank=rank)) for rank in range(4)} == {2, 5}


def test_masked_choices_do_not_take_a_turn():
    p = spread()
    with_gap = choose_slots(torch.tensor([[4], [-1], [4]]), p)
    assert with_gap.tolist() == [[2], [-1], [5]]


def test_with_tokens_any_rank_computes_the_same_slot_for_the_same_token():
    p, ids, tokens = spread(), batch(64), torch.arange(64) * 7 + 3
    whole = choose_slots(ids, p, tokens_T=tokens)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for rank, part in itertools.product(range(4), (shuffled[:10], shuffled[10:], shuffled)):
        assert torch.equal(
            choose_slots(ids[part], p, rank=rank, tokens_T=tokens[part]), whole[part]
        )


@pytest.mark.parametrize("stride", [1, 2, 4, 64])
def test_with_tokens_both_replicas_are_used_about_equally(stride):
    slots = choose_slots(
        torch.full((4000, 1), 4), spread(), tokens_T=torch.arange(4000) * stride
    ).flatten()
    share = float((slots == 2).float().mean())
    assert 0.45 < share < 0.55  # six sigma of 4,000 fair picks is 0.047


def test_a_wider_table_chooses_the_same():
    p, ids = spread(), batch(50)
    assert torch.equal(choose_from(ids, p.replicas(5), p.counts_E), choose_slots(ids, p))


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        (torch.tensor([[6]]), {}, "ids_TK must be in -1..5, got 6"),
        (torch.tensor([[-2]]), {}, "got -2"),
        (torch.tensor([0]), {}, "shape"),
        (torch.tensor([[0.0]]), {}, "float32"),
        (torch.tensor([[0]]), {"rank": 4}, "rank must be in 0..3, got 4"),
        (torch.tensor([[0]]), {"tokens_T": torch.arange(2)}, "tokens_T"),
    ],
)
def test_choices_that_cannot_be_are_refused(ids, options, says):
    with pytest.raises(ValueError, match=says):
        choose_slots(ids, spread(), **options)
