"""Chunks: every row once, every rank the same number, the smallest rung that holds them."""

from __future__ import annotations

import random

import pytest

from epmoe.sched.chunks import RUNGS, capacity_for, cut, ladder, plan_chunks


@pytest.mark.parametrize("seed", range(200))
def test_every_row_is_in_one_chunk_in_order_and_all_fit(seed):
    rng = random.Random(seed)
    most = rng.choice([1, 3, 16, 17, 300, 5000])
    rows_R = [rng.choice([0, 1, most, rng.randrange(3 * most + 1)]) for _ in range(1 + seed % 6)]
    chunks = plan_chunks(rows_R, most)
    assert chunks.count == max(1, -(-max(rows_R) // most))
    for rank, rows in enumerate(rows_R):
        spans = [chunks.span(chunk, rank) for chunk in range(chunks.count)]
        assert [i for span in spans for i in range(span.start, span.stop)] == list(range(rows))
        sizes = [span.stop - span.start for span in spans]
        assert max(sizes) - min(sizes) <= 1
    largest = max(map(max, chunks.rows_CR))
    assert largest <= chunks.capacity <= most
    assert chunks.capacity in ladder(most)
    assert all(rung >= chunks.capacity for rung in ladder(most) if rung >= largest)


def test_the_ladder_ends_with_max_rows_and_has_no_rung_twice():
    for most in (1, 15, 16, 17, 64, 4096, 4097, 10_000):
        rungs = ladder(most)
        assert rungs[-1] == most
        assert list(rungs) == sorted(set(rungs))
        assert set(rungs[:-1]) <= set(RUNGS)
        assert [capacity_for(n, most) for n in rungs] == list(rungs)


def test_more_than_the_capacity_is_an_error_never_a_clamp():
    for rows in (-1, 17):
        with pytest.raises(ValueError, match=rf"rows must be in 0..16 \(max_rows\), got {rows}"):
            capacity_for(rows, 16)
    with pytest.raises(ValueError, match="at least one rank"):
        plan_chunks([], 4)
    with pytest.raises(ValueError, match=r"at least 0 on every rank, got \(3, -1\)"):
        plan_chunks([3, -1], 4)


def test_cut_is_even_with_the_longer_pieces_first():
    assert cut(0, 3) == (0, 0, 0)
    assert cut(10, 4) == (3, 3, 2, 2)
