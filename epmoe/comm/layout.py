"""The only place where an offset of the symmetric memory is computed.

A slab is the same on every rank: first the rank's last words and the freight of a migration,
then one set of regions per lane.
Layers that share a heap share the regions: each region is as large as the largest layer needs and
starts at the same offset for all of them, so a fast rank that is already in the next layer's round
can only write where that round's protocol lets it write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.config import MoEConfig
from epmoe.formats import RowTensor, format_of

ALIGN = 128  # bytes; a bulk copy wants 16, a cache line 64, and two lines are fetched together
HEAD = 8  # int64 values that travel with the counts: which round of which layer this is
LAST_WORDS = 2048  # bytes of text a leaving rank leaves behind


@dataclass(frozen=True, slots=True)
class Region:
    """A typed piece of a slab: ``shape`` items of ``item`` bytes from byte ``at``."""

    at: int
    shape: tuple[int, ...]
    item: int

    @property
    def bytes(self) -> int:
        """Bytes in use; the next region starts at the next multiple of 128."""
        return math.prod(self.shape) * self.item


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies: ``lanes[lane][layer][name]`` and ``rank[name]``; ``total`` bytes."""

    rank: dict[str, Region]
    lanes: tuple[tuple[dict[str, Region], ...], ...]
    total: int


def record(config: MoEConfig) -> tuple[dict[str, tuple[int, RowTensor]], int]:
    """Where each part of a row lies in its record on the wire, and the bytes of a record.

    Parts start at multiples of 16 bytes, so that one bulk copy moves a whole row.

    >>> tiny = MoEConfig(experts=4, choices=2, hidden=72, inner=128, max_rows=8)
    >>> record(tiny)[1]
    144
    """
    parts: dict[str, tuple[int, RowTensor]] = {}
    at = 0
    for part in format_of(config).wire(config):
        parts[part.name] = (at, part)
        at += -(-part.nbytes // 16) * 16
    return parts, at


def _shapes(config: MoEConfig, ranks: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, item) of one lane's regions for one layer; who writes each, and when.

    ``words`` C, Y, leave: row w, column src is written by rank src only.
    ``heads``, ``counts``, ``lists``: row src is pushed by rank src before its word C; counts are
    those of all slots, so that every rank knows every slot's load.  ``pulled``, ``siblings``: the
    same, of the fused round only (kernels/cu/exchange.cuh).
    ``rows``, ``weights``: staged by the owner before its C, pulled by peers before their Y.
    ``results``: cell token * choices + k is pushed by the owner of that choice before its Y.
    """
    cells = config.max_rows * config.choices
    return {
        "words": ((3, ranks), 8),
        "heads": ((ranks, HEAD), 8),
        "counts": ((ranks, config.places), 4),
        "lists": ((ranks, cells), 4),
        "pulled": ((ranks, config.slots_per_rank(ranks)), 4),
        "siblings": ((ranks, cells), 4),
        "weights": ((config.max_rows, config.choices), 4),
        "rows": ((config.max_rows, record(config)[1]), 1),
        "results": ((cells, config.hidden), config.itemsize),
    }


def layout(configs: Sequence[MoEConfig], ranks: int) -> Layout:
    """Every offset of the slab that ``configs`` (layers sharing one heap) use on ``ranks`` ranks.

    >>> tiny = MoEConfig(experts=4, choices=2, hidden=128, inner=128, max_rows=8)
    >>> layout([tiny], ranks=2).lanes[0][0]["rows"]
    Region(at=1051520, shape=(8, 256), item=1)
    """
    if not configs:
        raise ValueError("configs must name at least one layer, got none")
    lanes = {config.lanes for config in configs}
    if len(lanes) > 1:
        raise ValueError(f"lanes must be equal for layers that share a heap, got {sorted(lanes)}")
    at = 0

    def place(nbytes: int) -> int:
        nonlocal at
        start, at = at, -(-(at + nbytes) // ALIGN) * ALIGN
        return start

    freight = max(config.freight for config in configs)
    rank = {
        "last_words": Region(place(LAST_WORDS), (LAST_WORDS,), 1),
        "freight": Region(place(freight), (freight,), 1),
    }
    shapes = [_shapes(config, ranks) for config in configs]
    placed = []
    for _ in range(configs[0].lanes):
        layers: list[dict[str, Region]] = [{} for _ in configs]
        for name in shapes[0]:
            start = place(max(math.prod(s[name][0]) * s[name][1] for s in shapes))
            for layer, s in zip(layers, shapes, strict=True):
                layer[name] = Region(start, *s[name])
        placed.append(tuple(layers))
    return Layout(rank, tuple(placed), at)


def table(configs: Sequence[MoEConfig], ranks: int) -> list[tuple[str, int, str, int]]:
    """Rows (region, at, shape × item, bytes) of ``epmoe doctor --layout``, first layer's shapes."""
    placed = layout(configs, ranks)
    regions = list(placed.rank.items())
    for lane, layers in enumerate(placed.lanes):
        regions += [(f"lane {lane} {name}", region) for name, region in layers[0].items()]
    return [
        (name, r.at, f"{' x '.join(map(str, r.shape))} x {r.item} B", r.bytes)
        for name, r in regions
    ]
