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
COMMUNICATORS = 8  # CTAs that move rows: 8 to 16 saturate the link (measured), whole clusters of 2
LAG = 2  # FC2 of a block comes this many times all clusters' tiles behind its FC1


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
        counted: bool | None = None,
        communicators: int = COMMUNICATORS,
        tall: int | None = None,
        trace: bool = False,
    ) -> None:
        """``tall``: as in ``grouped_gemm``; None lets the rows that a slot expects decide.

        ``counted``: tiles by a counter; None means on the wide path only, where it was faster.
        ``trace``: add up where time goes, in ``trace`` (cu/trace.cuh).
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
        most = ranks * config.max_rows * min(config.choices, local)
        self.pool = -(-(most + local * (BLOCK - 1)) // BLOCK) * BLOCK
        self._grid = processors_of(torch.cuda.current_device()) // 2 * 2

        def cuda(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        self.loads = cuda(config.places, dtype=torch.int64)
        self.origin = cuda(self.pool, dtype=torch.int64)
        self.scale = cuda(self.pool, dtype=torch.float32)
        self.rows = cuda(self.pool, config.hidden, dtype=torch.bfloat16)
        self.mid = cuda(self.pool, config.inner, dtype=torch.bfloat16)
        self.results = cuda(self.pool, config.hidden, dtype=torch.bfloat16)
        blocks = self.pool // BLOCK
        self.progress = cuda(2, 3, blocks, dtype=torch.int32)
        self.scratch = cuda(self._grid, 4 * local + 4, dtype=torch.int32)
        self.numbers = cuda(8, dtype=torch.int32)  # cu/exchange.cuh Counter
        self.trace = cuda(self._grid, 24, dtype=torch.int64)  # cu/trace.cuh
        self._private = struct.pack(
            "<10QII",
            self.loads.data_ptr(),
            self.origin.data_ptr(),
            self.scale.data_ptr(),
            self.rows.data_ptr(),
            self.mid.data_ptr(),
            self.results.data_ptr(),
            self.progress.data_ptr(),
            self.scratch.data_ptr(),
            self.numbers.data_ptr(),
            self.trace.data_ptr(),
            blocks,
            0,
        )
        self._kernel = compiled(
            config,
            ranks,
            placed,
            layer,
            lane,
            counted=not self._tall if counted is None else counted,
            communicators=communicators,
            grid=self._grid,
            tall=self._tall,
            trace=trace,
        )
        self._weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
        self._maps = b""

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
            (self._grid,),
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


def compiled(
    config: MoEConfig,
    ranks: int,
    placed: Layout,
    layer: int,
    lane: int,
    *,
    counted: bool = True,
    communicators: int = COMMUNICATORS,
    grid: int = 132,
    tall: int = 0,
    trace: bool = False,
) -> CompiledKernel:
    """The kernel for this layer's shapes and offsets; needs no GPU."""
    at = placed.lanes[lane][layer]
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
        "LAG": LAG * (grid - communicators) // (1 if tall else 2),
        "TALL": tall,
    }
    for name in ("words", "heads", "counts", "lists", "weights", "rows", "results"):
        defines[f"{name.upper()}_AT"] = f"{at[name].at}ull"
    return compile_kernel("round.cu", "fused_round", defines)
