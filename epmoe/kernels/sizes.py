"""How the fused round cuts its work and how much memory that takes: pure, from the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.gemm import BLOCK

LAG = 2  # FC2 of a block comes so many tiles of each cluster that does not pull behind its FC1
GROUP = 16  # cu/tiles.cuh
NARROW = 1024  # an expert of at most so much inner width
SPARE = 16  # blocks of the ring beyond those without which a round could wait for ever
MOST_CELLS = 1 << 19  # a part of them is kept in shared memory (cu/tell.cuh)
SHARED_POOLS = ("homes", "scale", "rows", "mid")


@dataclass(frozen=True)
class Cut:
    """The tiles of one kernel: ``columns`` weight rows by 128 rows of the pool, or by at most 64.

    ``tall``: the weights are the side of the matrix instruction that is 64 rows tall.
    """

    columns: int
    tall: bool = False


# As slots have few, some or many rows.
FEW, SOME, MANY = Cut(128, tall=True), Cut(128), Cut(256)


def most_slots(ranks: int) -> int:
    """Slots on all ranks together for which a CTA that pulls has room (cu/exchange.cuh Tables).

    >>> [most_slots(ranks) for ranks in (1, 2, 4, 8)]
    [559, 746, 892, 992]
    """
    # FEW has least room: its ring ends at byte 215,040, carried rows and their barriers at 201,600.
    words = (215040 - 201600) // 4
    return (words - 2) // (3 * ranks + 3) * ranks


def refusal(config: MoEConfig, ranks: int) -> EpmoeError | ValueError | None:
    """Why the CUDA kernels do not compute this layer; None if they do."""
    if config.dtype != "bf16" or config.format != "plain":
        return EpmoeError(
            f"the CUDA kernels compute plain bf16, got {config.format} {config.dtype}"
        )
    if config.hidden % 64 or config.inner % 64:
        return ValueError(
            f"hidden and inner must be multiples of 64 on a GPU, "
            f"got {config.hidden}, {config.inner}"
        )
    if config.max_rows * config.choices > MOST_CELLS:
        return ValueError(
            f"max_rows times choices must be at most {MOST_CELLS} on a GPU, "
            f"got {config.max_rows} x {config.choices}"
        )
    if config.places > most_slots(ranks):
        return ValueError(
            f"slots must be at most {most_slots(ranks)} on {ranks} GPUs, got {config.places}"
        )
    return None


def refusal_of_gpu(config: MoEConfig, ranks: int, grid: int) -> EpmoeError | ValueError | None:
    """Why ``grid`` processors of each GPU are too few for this layer; None if they are enough.

    >>> full = MoEConfig(experts=64, choices=8, hidden=64, inner=64, max_rows=65536)
    >>> refusal_of_gpu(full, 8, 132) is None
    True
    >>> print(refusal_of_gpu(full, 8, 32))
    max_rows must be at most 24516 with 8 choices on 8 GPUs of 32 processors, got 65536
    """
    least = max(4, ranks + 1)  # a cluster pulls, another multiplies; not all tell, one stages
    if grid < least:
        return EpmoeError(
            f"a round of {ranks} ranks needs at least {least} processors of each GPU, got {grid}"
        )
    # cu/tell.cuh Telling: a word a slot of all ranks, five a slot of mine, one a cell, two more.
    cells = 196608 // 4 - config.places - 5 * config.slots_per_rank(ranks) - 2
    most = cells // config.choices * parts(grid, ranks)
    if config.max_rows > most:
        return ValueError(
            f"max_rows must be at most {most} with {config.choices} choices on {ranks} GPUs of "
            f"{grid} processors, got {config.max_rows}"
        )
    return None


def cut_of(config: MoEConfig, ranks: int, capacity: int) -> Cut:
    """How a round of at most ``capacity`` rows a rank is cut; from rank-identical numbers only.

    FEW where a slot expects so few rows that streaming weights is all that counts.  SOME where
    MANY has so few tiles, or each so few rows, that SMs would stand idle.  Load of 8 on 4 GPUs, FEW
    / SOME / MANY in microseconds: dsv3 at 32 rows a slot 724 / 736 / -, at 128: - / 955 / 905;
    qwen3-30b at 32: 77 / 79 / -, at 128: - / 104 / 115, at 192: - / 127 / 125, at 256: - / 145 /
    140; qwen3-235b at 128: - / 252 / 247, at 256: - / 360 / 343; gpt-oss at 64: 297 / 255 / 265;
    mixtral at 32: 148 / 146 / -, at 256: - / 243 / 302, at 384: - / 286 / 353.
    """
    rows, places = capacity * config.choices * ranks, config.places
    if rows <= 32 * places:
        return FEW
    local = places // ranks
    tiles = local * -(-config.hidden // MANY.columns) * -(-rows // (BLOCK * places))
    if rows > 96 * places and (tiles > 128 or rows > 384 * places):
        return MANY
    return SOME


def up_columns(config: MoEConfig) -> int:
    """Columns of FC1's result: gate and up side by side."""
    return config.inner * (2 if config.gated else 1)


def cuts(config: MoEConfig, ranks: int) -> tuple[Cut, ...]:
    """What ``cut_of`` may say of the rounds of a layer: it grows with the capacity."""
    more = 32 * config.places // (config.choices * ranks) + 1  # rows, too many for FEW
    capacities = (1, min(more, config.max_rows), config.max_rows)
    return tuple(dict.fromkeys(cut_of(config, ranks, c) for c in capacities))


def pullers_of(config: MoEConfig, cut: Cut, ranks: int, grid: int) -> int:
    """CTAs that pull rows before they multiply, whole clusters of 2, at most half of ``grid``.

    Where rows are few, nobody can multiply before they are there. On one or two ranks many choices
    of a row are here, and to write it for each takes longer than to fetch it (16 of MANY write 40
    GB/s each); a link needs fewer, and fewest where experts are wide and products take long.
    Load of 8 in microseconds. One rank of eight, its peers ready (tests/gpu/one_of_eight.py),
    16 / 24 / 32: MANY: qwen3-30b at 512 rows 140 / 141 / 144, at 2,048 388 / 376 / 386; qwen3-235b
    at 512 338 / 333 / 337, at 2,048 1,024 / 1,048 / -; dsv3 at 512 856 / 860 / -; SOME: qwen3-30b
    at 128 76.4 / 76.0 / 76.7.  4 GPUs, 8 / 16 / 24 / 32: SOME: qwen3-235b at 128 212 / 206 /
    206 / 210, qwen3-30b at 128 97 / 96 / 95 / 95; FEW: qwen3-30b at 64 - / 80.6 / - / 79.8, gpt-oss
    at 128 - / 241 / - / 245. 2 GPUs, 16 / 24 / 32 / 48 / 64: MANY: qwen3-30b at 2,048 344 / 328 /
    324 / 322 / 323, at 512 124 / 118 / 114 / 119 / 123, qwen3-235b at 512 329 / 322 / 316 / 315 /
    -; SOME: qwen3-30b at 128 73 / 71 / 70 / 69 / 75, qwen3-235b at 128 190 / 188 / 187 / 191 / 192;
    FEW: dsv3 at 128 714 / 710 / 707 / 704 / 705. One GPU, MANY: qwen3-30b at 2,048 338 / - / 313 /
    304 / 296, at 512 114 / - / 107 / 107 / 112.
    """
    if ranks > 2:
        most = 16 if cut == MANY and config.inner > NARROW else 24
    else:
        most = 48 if cut == FEW or (cut == MANY and ranks == 1) else 32
    return min(most, grid // 4 * 2)


def most_blocks(config: MoEConfig, ranks: int) -> int:
    """Blocks of rows that routing can send to one rank: all choices to it, a part block a slot.

    All of a row's, even where it has fewer slots: a slot named twice is asked twice.

    >>> most_blocks(MoEConfig(experts=4, choices=2, hidden=64, inner=64, max_rows=100), 2)
    6
    """
    local = config.slots_per_rank(ranks)
    rows = ranks * config.max_rows * config.choices
    return -(-(rows + local * (BLOCK - 1)) // BLOCK)


def ring_blocks(
    config: MoEConfig, ranks: int, grid: int, pullers: int | None, among: Iterable[Cut]
) -> int:
    """Blocks that have memory at a time, whichever kernel of ``among`` runs.

    Enough that nothing can wait for ever: FC1 runs ``lag`` and up to a group of either GEMM ahead
    of FC2, and every row of a batch may lie in a block of its own; and enough for even routing.
    """

    def ahead(cut: Cut) -> int:
        tiles_of_block = -(-up_columns(config) // (cut.columns * (1 if cut.tall else 2)))
        return -(-lag(grid, pullers or pullers_of(config, cut, ranks, grid), cut) // tiles_of_block)

    batch = min(8, max(1, 14336 // (2 * config.hidden)))  # cu/carry.cuh AT_ONCE, at most
    must = max(ahead(cut) for cut in among) + 2 * GROUP + batch
    return min(most_blocks(config, ranks), max(must + SPARE, even_blocks(config, ranks)))


def even_blocks(config: MoEConfig, ranks: int) -> int:
    """What full and even routing sends to one rank: then nobody ever waits for a place in the ring.

    On 2 GPUs 2,048 rows of qwen3-235b took 1,009 microseconds, not 1,029, of dsv3 2,331, not 2,413.
    """
    rows = config.max_rows * config.choices
    return -(-rows // BLOCK) + config.slots_per_rank(ranks)


def lag(grid: int, pullers: int, cut: Cut) -> int:
    """How many tiles of FC1 (pairs, where CTAs work in pairs) lie between it and its FC2."""
    return LAG * (grid - pullers) // (1 if cut.tall else 2)


def parts(grid: int, ranks: int) -> int:
    """CTAs that tell one peer what this rank asks of it, each a part of the rows if many."""
    return max(1, min(16, grid // ranks))


def work_memory(
    config: MoEConfig,
    ranks: int,
    grid: int = 132,
    pullers: int | None = None,
    among: Iterable[Cut] | None = None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what a rank keeps beside its slab; no GPU needed.

    Those of SHARED_POOLS are the same memory for all layers of a lane that agree on them.
    """
    among = among or cuts(config, ranks)
    ring = BLOCK * ring_blocks(config, ranks, grid, pullers, among)
    return {
        "homes": ((ring,), torch.int32),
        "scale": ((ring,), torch.float32),
        "rows": ((ring, config.hidden), torch.bfloat16),
        "mid": ((ring, config.inner), torch.bfloat16),
        "loads": ((config.places,), torch.int64),
        "progress": ((2, 3, most_blocks(config, ranks)), torch.int32),
        "parts": ((parts(grid, ranks), config.places), torch.int64),
        "scratch": ((grid, 4 * config.slots_per_rank(ranks) + 4), torch.int32),
        "numbers": ((8,), torch.int32),  # cu/exchange.cuh Counter
    }


def private_bytes(config: MoEConfig, ranks: int) -> int:
    """The sum of ``work_memory``: one layer's on one lane.

    >>> tiny = MoEConfig(experts=4, choices=2, hidden=64, inner=64, max_rows=100)
    >>> private_bytes(tiny, 2) // 1024
    204
    """
    memory = work_memory(config, ranks).values()
    return sum(math.prod(shape) * kind.itemsize for shape, kind in memory)
