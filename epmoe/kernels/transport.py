"""Dispatch and combine alone, a launch each: for experts that somebody else computes."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from epmoe.comm.layout import HEAD, Layout
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.cuda import MOVER_SHARED, raw_stream
from epmoe.kernels.fused import (
    BAD,
    NOTE,
    NOTES,
    ROLES,
    SHARED,
    Worded,
    chosen,
    round_constants,
)
from epmoe.kernels.gemm import BLOCK, THREADS, processors_of
from epmoe.kernels.launch import CompiledKernel, Launch
from epmoe.kernels.sizes import most_blocks, parts, refusal, refusal_of_gpu

COMBINERS = 896  # cu/combine.cu
CHOICES = struct.Struct("<2Q2I")  # cu/choices.cuh


class Transport:
    """One layer's rows to its experts and back, on one lane of a heap, with the bits of ``MoE``.

    A round is one ``dispatch`` and one ``combine``.  Between them the caller turns ``rows`` into
    ``results``, both [pool, hidden]: slot s of this rank has ``slot_rows[s]`` rows, from
    ``gemm.starts(slot_rows)[s]`` on.  With ``weight_in`` "fc2" the caller multiplies them by
    ``scale`` [pool], else combine does.  Nothing waits for the GPU or allocates after ``__init__``;
    the pool holds whatever routing can send here.

    No other round of the lane may lie between a dispatch and its combine.  A wait ends by the limit
    of the lane's words, which the caller sets; then outputs are NaN and ``words.check`` raises.
    """

    def __init__(
        self,
        config: MoEConfig,
        placed: Layout,
        *,
        layer: int,
        lane: int,
        words: Worded,
        trace: bool = False,
    ) -> None:
        """``trace``: as in ``FusedOps``; either launch writes its notes over the other's."""
        if (refused := refusal(config, words.ranks)) is not None:
            raise refused
        self.config, ranks = config, words.ranks
        self._next = "dispatch"
        self.grid = grid = processors_of(torch.cuda.current_device())
        if (refused := refusal_of_gpu(config, ranks, grid)) is not None:
            raise refused
        blocks = most_blocks(config, ranks)
        pool = blocks * BLOCK

        def cuda(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        self.rows = cuda(pool, config.hidden, dtype=torch.bfloat16)
        self.results = cuda(pool, config.hidden, dtype=torch.bfloat16)
        self.slot_rows = cuda(config.slots_per_rank(ranks))
        self.scale = cuda(pool, dtype=torch.float32)
        self.loads = cuda(config.places, dtype=torch.int64)
        self._numbers = cuda(8)
        self.notes = cuda(grid * ROLES * NOTES * NOTE if trace else 0, dtype=torch.uint8)
        homes, progress = cuda(pool), cuda(2, 3, blocks)
        told = cuda(parts(grid, ranks), config.places, dtype=torch.int64)
        nothing = cuda(0)  # results of FC1, tables of tiles: nobody multiplies here
        self._kept = (
            *(self.loads, homes, self.scale, self.rows, nothing),
            *(progress, told, nothing, self._numbers, self.notes),
        )
        private = struct.pack("<10Q", *(t.data_ptr() for t in self._kept))
        kernels = compiled(config, ranks, placed, layer, lane, grid=grid, trace=trace)
        given = [words.world(), private]
        no_choices, no_head = bytes(CHOICES.size), bytes(8 * HEAD)
        dispatch = [*given, self.slot_rows, 0, no_choices, 0, 0, no_head]
        self._dispatch = Launch(kernels["dispatch"], (grid,), THREADS, dispatch, shared=SHARED)
        combine = [*given, self.results, self.slot_rows, no_choices, 0, 0, 0, 0]
        self._combine = Launch(kernels["combine"], (grid,), COMBINERS, combine, shared=MOVER_SHARED)

    def dispatch(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        head: tuple[int, ...],
        table: Tensor | None = None,
    ) -> None:
        """All ranks together: fills ``rows``, ``slot_rows``, ``scale``.

        Arguments as for ``FusedOps.round``.
        """
        self._turn("dispatch", x)
        choices = CHOICES.pack(*chosen(self.config, ids, table))
        packed = struct.pack(f"<{HEAD}q", *head)
        self._dispatch.enqueue(raw_stream(), x, choices, weights, len(x), packed)

    def combine(
        self,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
        shared: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        """All ranks together: ``results`` home, and the sum over choices; NaN after a fault."""
        self._turn("combine", out)
        choices = CHOICES.pack(*chosen(self.config, ids, table))
        self._combine.enqueue(
            raw_stream(), choices, weights, 0 if shared is None else shared, out, len(out)
        )

    def _turn(self, verb: str, rows: Tensor) -> None:
        if verb != self._next:
            raise EpmoeError(f"{verb}: {self._next} comes next, a round is one of each")
        if len(rows) > self.config.max_rows:
            raise ValueError(
                f"{verb} takes at most max_rows ({self.config.max_rows}) rows, got {len(rows)}"
            )
        self._next = "combine" if verb == "dispatch" else "dispatch"

    def bad(self) -> int:
        """Choices so far that named no slot; waits for the GPU."""
        return int(self._numbers[BAD])


def compiled(
    config: MoEConfig,
    ranks: int,
    placed: Layout,
    layer: int,
    lane: int,
    *,
    grid: int = 132,
    trace: bool = False,
) -> dict[str, CompiledKernel]:
    """Both kernels for this layer's shapes and offsets; needs no GPU."""
    at, blocks = placed.lanes[lane][layer], most_blocks(config, ranks)
    constants = round_constants(config, ranks, at, blocks=blocks, ring=blocks, grid=grid)
    constants |= {"TALL": 0, "TRACE": int(trace)}
    return {name: compile_kernel(f"{name}.cu", name, constants) for name in ("dispatch", "combine")}
