"""Observed loads: what is counted, what is not, and the same bits on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epmoe.sched.loads import Loads, checked_loads, count


def test_masked_choices_and_dummy_rows_are_never_counted():
    ids = torch.tensor([[0, 3], [3, -1], [-1, -1], [2, 2]], dtype=torch.int32)
    assert count(ids, 4).tolist() == [1, 0, 2, 2]
    live = torch.tensor([True, True, True, False])
    assert count(ids, 4, live).tolist() == [1, 0, 0, 2]
    assert count(ids[:0], 4).tolist() == [0] * 4


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="live_T"):
        count(torch.zeros(3, 1, dtype=torch.int64), 4, torch.ones(2, dtype=torch.bool))


def test_counts_of_ranks_add_up_to_the_count_of_the_whole_batch():
    ids = torch.randint(-1, 9, (100, 3), generator=torch.Generator().manual_seed(0))
    parts = [count(part, 9) for part in ids.split([7, 0, 60, 33])]
    assert torch.equal(torch.stack(parts).sum(0), count(ids, 9))


def observed(rounds: torch.Tensor, **options) -> Loads:
    seen = Loads(experts=rounds.shape[1], **options)
    for counts in rounds:
        seen = seen.observe(counts)
    return seen


def test_a_plain_window_is_the_sum_of_its_rounds():
    rounds = torch.randint(0, 50, (30, 5), generator=torch.Generator().manual_seed(2))
    rounds[:, 0] += 1
    seen = observed(rounds, window=8)
    assert seen.loads_E.tolist() == rounds[-8:].sum(0).tolist()
    assert seen.rounds == 30


def test_older_rounds_weigh_less():
    seen = observed(torch.tensor([[8, 0], [0, 4], [1, 0]]), window=10, decay=0.5)
    assert seen.loads_E.tolist() == [8 / 4 + 1, 4 / 2]


def test_rounds_without_traffic_advance_the_number_and_forget_nothing():
    rounds = torch.tensor([[5, 1]] + [[0, 0]] * 9)
    seen = observed(rounds, window=2, decay=0.5)
    assert seen.loads_E.tolist() == [5, 1]
    assert seen.rounds == 10


def test_a_state_keeps_its_numbers_when_the_counts_are_reused():
    counts = torch.tensor([1, 2])
    first = Loads(experts=2).observe(counts)
    counts += 10  # the same tensor counts the next round
    second = first.observe(counts)
    assert first.loads_E.tolist() == [1, 2]
    assert second.loads_E.tolist() == [12, 14]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (torch.tensor([1, 2, 3]), "2 integers"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.tensor([3, -2]), r"counts_E\[1\] must be at least 0, got -2"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, says):
    with pytest.raises(ValueError, match=says):
        Loads(experts=2).observe(counts)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"window": 0}, "window"), ({"decay": 0.0}, "decay"), ({"decay": 1.5}, "1.5")],
)
def test_a_window_that_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Loads(experts=2, **options)


def test_checked_loads_are_a_copy_with_empty_layers_made_equal():
    given = np.array([[0.0, 0.0], [0.0, 3.0]])
    got = checked_loads(given)
    assert got.tolist() == [[1, 1], [0, 3]]
    assert given.tolist() == [[0, 0], [0, 3]]
    assert checked_loads(torch.tensor([2, 3], dtype=torch.int32)).tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("loads", "says"),
    [
        ([], "shape"),
        ([[[1.0]]], "shape"),
        ([[1, 2], [3]], "equally many"),
        (["a"], "numbers"),
        ([1, -0.5], "got -0.5 for expert 1 of layer 0"),
        ([float("nan")], "got nan"),
        ([1e31], "1e\\+31"),
    ],
)
def test_loads_that_cannot_be_are_refused(loads, says):
    with pytest.raises(ValueError, match=says):
        checked_loads(loads)
