"""Offsets: nothing overlaps, lanes are apart, layers share, and one worked example."""

from __future__ import annotations

import math
import random

import pytest
from sim.draw import draw_config

from epmoe.comm.layout import ALIGN, HEAD, LAST_WORDS, Region, layout, record, table
from epmoe.config import MoEConfig

TINY = MoEConfig(experts=4, choices=2, hidden=128, inner=128, max_rows=8)


def pieces(placed, layer=0):
    """(start, end, name) of everything in a slab as one layer sees it."""
    found = [(r.at, r.at + r.bytes, name) for name, r in placed.rank.items()]
    for number, lane in enumerate(placed.lanes):
        found += [(r.at, r.at + r.bytes, f"lane {number} {n}") for n, r in lane[layer].items()]
    return sorted(found)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_overlaps_and_everything_is_aligned_and_inside(seed):
    rng = random.Random(seed)
    ranks, lanes = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 2, 3])
    configs = [draw_config(rng, ranks, rng.choice([1, 5, 300]), lanes=lanes) for _ in range(3)]
    placed = layout(configs, ranks)
    for layer in range(3):
        found = pieces(placed, layer)
        for (_, end, name), (start, _, after) in zip(found, found[1:], strict=False):
            assert end <= start, (name, after)
        assert all(start % ALIGN == 0 for start, _, _ in found)
        assert found[-1][1] <= placed.total
    for lane in placed.lanes:
        for name in lane[0]:
            assert len({layer[name].at for layer in lane}) == 1, f"{name} moves with the layer"


def test_every_region_has_room_for_what_the_protocol_writes():
    at = layout([TINY], ranks=2).lanes[0][0]
    assert at["words"].shape == (3, 2)
    assert at["heads"] == Region(at["heads"].at, (2, HEAD), 8)
    assert at["counts"].shape == (2, 4)
    assert at["lists"].shape == at["siblings"].shape == (2, 8 * 2)
    assert at["pulled"].shape == (2, 2)
    assert at["rows"].shape == (8, record(TINY)[1])
    assert at["results"].shape == (8 * 2, 128)
    assert layout([TINY], ranks=2).rank["last_words"].bytes == LAST_WORDS


def test_records_are_whole_multiples_of_sixteen_bytes():
    for seed in range(60):
        config = draw_config(random.Random(seed), 2, 5)
        parts, size = record(config)
        assert size % 16 == 0
        ends = sorted((at, at + part.nbytes) for at, part in parts.values())
        assert ends[-1][1] <= size < ends[-1][1] + 16
        assert all(at % 16 == 0 for at, _ in ends)
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))


def test_offsets_beyond_four_gigabytes_are_exact():
    """A slab of DeepSeek's shape at 100,000 rows; nothing is mapped, only computed."""
    wide = MoEConfig(experts=256, choices=8, hidden=7168, inner=2048, max_rows=100_000)
    placed = layout([wide], ranks=8)
    results = placed.lanes[0][0]["results"]
    assert results.bytes == 100_000 * 8 * 7168 * 2
    assert results.at > 1 << 30
    assert placed.total == math.ceil((results.at + results.bytes) / ALIGN) * ALIGN


def test_the_table_is_the_layout():
    rows = table([TINY], 2)
    assert {(at, size) for _, at, _, size in rows} == {
        (s, e - s) for s, e, _ in pieces(layout([TINY], 2))
    }
    assert any("8 x 256 x 1 B" in shape for _, _, shape, _ in rows)


def test_layers_of_different_lanes_and_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        layout([], 2)
    two = MoEConfig(experts=4, choices=2, hidden=128, inner=128, max_rows=8, lanes=2)
    with pytest.raises(ValueError, match=r"lanes must be equal .* got \[1, 2\]"):
        layout([TINY, two], 2)
