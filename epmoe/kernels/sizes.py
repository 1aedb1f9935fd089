"""How the fused round cuts its work and how much memory that takes: pure, from the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.gemm import BLOCK

LAG = 2  # FC2 of a block comes this many times all clusters' tiles behind its FC1
GROUP = 16  # cu/tiles.cuh
TALL = 128  # weight rows of a tile where slots have few rows
SHARED_POOLS = ("origin", "scale", "rows", "mid", "results")


def refusal(config: MoEConfig) -> EpmoeError | ValueError | None:
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
    return None


def few_rows(config: MoEConfig, ranks: int, capacity: int) -> int:
    """128 if a slot expects so few rows that streaming weights is all that counts, else 0.

    From rank-identical numbers only.  Inside a round 128 beats 64: dsv3 at 32 rows a slot took 795
    microseconds against 858; at 64 rows a slot qwen3-30b takes 86 and 88 with 128 and 0, qwen3-235b
    230 and 206.
    """
    return TALL if capacity * config.choices * ranks <= 32 * config.places else 0


def talls(config: MoEConfig, ranks: int) -> tuple[int, ...]:
    """What ``few_rows`` may say of the rounds of a layer."""
    return (TALL,) if few_rows(config, ranks, config.max_rows) else (0, TALL)


def movers(config: MoEConfig) -> int:
    """CTAs that move rows, whole clusters of 2: 8 to 16 saturate the link (measured).

    The smaller the experts, the more bytes move for each product: on 2 GPUs 2,048 rows of
    qwen3-30b took 556 microseconds with 8 and 376 with 16; dsv3 2,434 with 8 and 2,468 with 16.
    """
    return 8 if config.inner >= 2048 else 16


def most_blocks(config: MoEConfig, ranks: int) -> int:
    """Blocks of rows that routing can send to one rank: all rows to it, a part block a slot.

    >>> most_blocks(MoEConfig(experts=4, choices=2, hidden=64, inner=64, max_rows=100), 2)
    6
    """
    local = config.slots_per_rank(ranks)
    rows = ranks * config.max_rows * min(config.choices, local)
    return -(-(rows + local * (BLOCK - 1)) // BLOCK)


def ring_blocks(
    config: MoEConfig, ranks: int, grid: int, communicators: int, among: Iterable[int]
) -> int:
    """Blocks that have memory at a time, whichever kernel of ``among`` runs.

    Enough that nothing can wait for ever: FC1 runs ``lag`` and up to a group of either GEMM ahead
    of FC2, and every row of a batch may lie in a block of its own; and some to ``spare``.
    """
    columns = config.inner * (2 if config.gated else 1)
    ahead = max(
        -(-lag(grid, communicators, tall) // max(1, -(-columns // (tall or 512)))) for tall in among
    )
    batch = min(32, max(1, 14336 // (2 * config.hidden)))  # cu/carry.cuh AT_ONCE, at most
    return min(most_blocks(config, ranks), ahead + 2 * GROUP + batch + spare(config, ranks))


def spare(config: MoEConfig, ranks: int) -> int:
    """Blocks beyond those without which a round could wait for ever: how far pulls run ahead."""
    return max(16, most_blocks(config, ranks) // 16)


def lag(grid: int, communicators: int, tall: int) -> int:
    """How many cluster tiles of FC1 lie between a tile of FC1 and the FC2 that needs it."""
    return LAG * (grid - communicators) // (1 if tall else 2)


def work_memory(
    config: MoEConfig,
    ranks: int,
    grid: int = 132,
    communicators: int | None = None,
    among: Iterable[int] | None = None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what a rank keeps beside its slab; no GPU needed.

    Those of SHARED_POOLS are the same memory for all layers of a lane that agree on them.
    """
    communicators, among = communicators or movers(config), among or talls(config, ranks)
    ring = BLOCK * ring_blocks(config, ranks, grid, communicators, among)
    return {
        "origin": ((ring,), torch.int64),
        "scale": ((ring,), torch.float32),
        "rows": ((ring, config.hidden), torch.bfloat16),
        "mid": ((ring, config.inner), torch.bfloat16),
        "results": ((ring, config.hidden), torch.bfloat16),
        "loads": ((config.places,), torch.int64),
        "progress": ((2, 4, most_blocks(config, ranks)), torch.int32),
        "scratch": ((grid, 4 * config.slots_per_rank(ranks) + 4), torch.int32),
        "numbers": ((8,), torch.int32),  # cu/exchange.cuh Counter
    }


def private_bytes(config: MoEConfig, ranks: int) -> int:
    """The sum of ``work_memory``: one layer's on one lane.

    >>> tiny = MoEConfig(experts=4, choices=2, hidden=64, inner=64, max_rows=100)
    >>> private_bytes(tiny, 2) // 1024
    303
    """
    memory = work_memory(config, ranks).values()
    return sum(math.prod(shape) * kind.itemsize for shape, kind in memory)
