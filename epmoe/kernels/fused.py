"""A round in one launch: check, launch."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from epmoe.comm.layout import HEAD, Layout, record
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.compile import CompiledKernel, Launch, compile_kernel
from epmoe.kernels.gemm import BLOCK, THREADS, interleave, processors_of, tensor_map

SHARED = 231296  # what a CTA may have, less 1024 that the static word makes; cu/round.cu checks
LAG = 2  # FC2 of a block comes this many times all clusters' tiles behind its FC1
GROUP = 16  # cu/tiles.cuh
ROLES, NOTES, NOTE = 7, 4096, 16  # cu/trace.cuh: roles of a CTA, notes of a role, bytes of a note


class Worded(Protocol):
    """What a round needs of the words of a lane (``comm.device_words``)."""

    ranks: int

    def world(self) -> bytes: ...


class FusedOps:
    """One layer on one lane: the same answer as ``CudaOps.round``, bit for bit."""

    def __init__(
        self,
        config: MoEConfig,
        placed: Layout,
        *,
        layer: int,
        lane: int,
        words: Worded,
        counted: bool = True,
        communicators: int | None = None,
        tall: int | None = None,
        trace: bool = False,
    ) -> None:
        """``tall``: as in ``grouped_gemm``; None lets the rows that a slot expects decide.

        ``counted``: tiles by a counter that all CTAs share, else by a fixed stride.
        ``communicators``: CTAs that move rows; None: what ``movers`` says.
        ``trace``: note what each role does when, in ``notes`` (cu/trace.cuh).
        """
        if config.dtype != "bf16" or config.format != "plain":
            raise EpmoeError(
                f"the CUDA kernels compute plain bf16, got {config.format} {config.dtype}"
            )
        if config.hidden % 64 or config.inner % 64:
            raise ValueError(
                f"hidden and inner must be multiples of 64 on a GPU, "
                f"got {config.hidden}, {config.inner}"
            )
        self.config, self._words = config, words
        self._tall = few_rows(config, words.ranks) if tall is None else tall
        ranks, local = words.ranks, config.slots_per_rank(words.ranks)
        communicators = communicators or movers(config)
        self.grid = processors_of(torch.cuda.current_device()) // 2 * 2
        blocks = most_blocks(config, ranks)
        self.ring = ring_blocks(config, ranks, self.grid, communicators, self._tall) * BLOCK

        def cuda(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        self.loads = cuda(config.places, dtype=torch.int64)
        self.origin = cuda(self.ring, dtype=torch.int64)
        self.scale = cuda(self.ring, dtype=torch.float32)
        self.rows = cuda(self.ring, config.hidden, dtype=torch.bfloat16)
        self.mid = cuda(self.ring, config.inner, dtype=torch.bfloat16)
        self.results = cuda(self.ring, config.hidden, dtype=torch.bfloat16)
        self.progress = cuda(2, 4, blocks, dtype=torch.int32)
        self.scratch = cuda(self.grid, 4 * local + 4, dtype=torch.int32)
        self.numbers = cuda(8, dtype=torch.int32)  # cu/exchange.cuh Counter
        noted = self.grid * ROLES * NOTES * NOTE if trace else 0
        self.notes = cuda(noted, dtype=torch.uint8)
        self._kernel = compiled(
            config,
            ranks,
            placed,
            layer,
            lane,
            counted=counted,
            communicators=communicators,
            grid=self.grid,
            tall=self._tall,
            trace=trace,
        )
        self._weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
        self._maps = self._private = b""

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """The slots' weights, gate and up interleaved; before the first round and any capture."""
        w1, w2, b1, b2 = weights["w1"], weights["w2"], weights.get("b1"), weights.get("b2")
        if self.config.gated:
            w1 = interleave(w1, weights["w3"])
            b1 = interleave(b1, weights["b3"]) if b1 is not None else None
        self._weights = (w1, w2, b1, b2)
        self.adopt_maps()

    def adopt_maps(self) -> None:
        """Describe pools and weights to the copy engine; again after weights have moved."""
        w1, w2 = self._weights[:2]
        rows, mid, results = (t.unsqueeze(0) for t in (self.rows, self.mid, self.results))
        if self._tall:
            boxes: tuple[tuple[Tensor, int], ...] = (
                (rows, 8),
                (rows, 32),
                (w1, self._tall),
                (mid, 8),
                (mid, 32),
                (w2, self._tall),
            )
        else:
            boxes = ((rows, 64), (w1, 128), (mid, 64), (w2, 128), (results, 64))
        self._maps = b"".join(tensor_map(tensor, box) for tensor, box in boxes)
        pools = [self.origin, self.scale, self.rows, self.mid, self.results]
        kept = [self.loads, *pools, self.progress, self.scratch, self.numbers, self.notes, w1]
        self._private = struct.pack("<12Q", *(t.data_ptr() for t in kept), w1.nbytes)

    def round(
        self,
        x: Tensor,
        slots: Tensor,
        weights: Tensor,
        head: tuple[int, ...],
        out: Tensor,
        shared: Tensor | None = None,
    ) -> None:
        """All verbs, one launch on the current stream.  int32 slots, fp32 weights."""
        b1, b2 = self._weights[2:]
        call = struct.pack(
            f"<7QIf{HEAD}q",
            x.data_ptr(),
            slots.data_ptr(),
            weights.data_ptr(),
            0 if shared is None else shared.data_ptr(),
            out.data_ptr(),
            0 if b1 is None else b1.data_ptr(),
            0 if b2 is None else b2.data_ptr(),
            len(x),
            min(self.config.clamp, math.inf),
            *head,
        )
        Launch(
            self._kernel,
            (self.grid,),
            THREADS,
            [self._maps, self._words.world(), self._private, call],
            cluster=2,
            shared=SHARED,
        ).enqueue(int(torch.cuda.current_stream().cuda_stream))


def few_rows(config: MoEConfig, ranks: int) -> int:
    """128 if a slot expects so few rows that streaming weights is all that counts, else 0.

    From rank-identical numbers only.  Inside a round 128 beats 64: dsv3 at 32 rows a slot took 795
    microseconds against 858.
    """
    return 128 if config.max_rows * config.choices * ranks <= 32 * config.places else 0


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


def ring_blocks(config: MoEConfig, ranks: int, grid: int, communicators: int, tall: int) -> int:
    """Blocks that have memory at a time.

    Enough that nothing can wait for ever: FC1 runs ``LAG`` and up to a group of either GEMM ahead
    of FC2, a batch of rows spans at most 32 blocks; and 32 more so that it seldom waits at all.
    """
    columns = config.inner * (2 if config.gated else 1)
    ahead = -(-lag(grid, communicators, tall) // max(1, -(-columns // (tall or 512))))
    return min(most_blocks(config, ranks), ahead + 2 * GROUP + 32 + 32)


def lag(grid: int, communicators: int, tall: int) -> int:
    """How many cluster tiles of FC1 lie between a tile of FC1 and the FC2 that needs it."""
    return LAG * (grid - communicators) // (1 if tall else 2)


def compiled(
    config: MoEConfig,
    ranks: int,
    placed: Layout,
    layer: int,
    lane: int,
    *,
    counted: bool = True,
    communicators: int | None = None,
    grid: int = 132,
    tall: int = 0,
    trace: bool = False,
) -> CompiledKernel:
    """The kernel for this layer's shapes and offsets; needs no GPU."""
    at, communicators = placed.lanes[lane][layer], communicators or movers(config)
    defines: dict[str, int | str] = {
        "RANKS": ranks,
        "LOCAL": config.slots_per_rank(ranks),
        "CHOICES": config.choices,
        "HIDDEN": config.hidden,
        "INNER": config.inner,
        "MAX_ROWS": config.max_rows,
        "RECORD": record(config)[1],
        "WEIGHT_IN_FC2": int(config.weight_in == "fc2"),
        "ACT": config.activation.upper(),
        "BIAS": int(config.bias),
        "COUNTED": int(counted),
        "TRACE": int(trace),
        "COMM": communicators,
        "LAG": lag(grid, communicators, tall),
        "TALL": tall,
        "BLOCKS": f"{most_blocks(config, ranks)}u",
        "RING": f"{ring_blocks(config, ranks, grid, communicators, tall)}u",
    }
    for name in ("words", "heads", "counts", "lists", "weights", "rows", "results"):
        defines[f"{name.upper()}_AT"] = f"{at[name].at}ull"
    return compile_kernel("round.cu", "fused_round", defines)
