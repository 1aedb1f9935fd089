"""A round in one launch: check, launch."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Protocol

import torch
from torch import Tensor

from epmoe.comm.layout import HEAD, Layout, Region
from epmoe.config import MoEConfig
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.cuda import laid_out, mailbox_constants, raw_stream
from epmoe.kernels.gemm import THREADS, processors_of, tensor_map
from epmoe.kernels.launch import CompiledKernel, Launch
from epmoe.kernels.ops import HEAD_FIELDS
from epmoe.kernels.sizes import (
    MANY,
    SHARED_POOLS,
    Cut,
    cut_of,
    cuts,
    lag,
    most_blocks,
    parts,
    pullers_of,
    refusal,
    refusal_of_gpu,
    ring_blocks,
    work_memory,
)

SHARED = 231296  # what a CTA may have, less 1024 that the static word makes; cu/round.cu checks
BAD = 4  # cu/exchange.cuh Counter
CALL = struct.Struct(f"<3Q2I5QIf{HEAD}q")  # cu/hands.cuh
CAPACITY = HEAD_FIELDS.index("capacity")
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
        pools: MutableMapping[object, Tensor] | None = None,
        counted: bool = True,
        pullers: int | None = None,
        cut: Cut | None = None,
        trace: bool = False,
    ) -> None:
        """``pools``: layers that run one after the other on a lane share their rows by it.

        ``counted``: tiles by a counter that all CTAs share, else by a fixed stride.
        ``pullers``: CTAs that pull rows; None: what ``pullers_of`` says.
        ``cut``: of every round; None: what ``cut_of`` says of each.
        ``trace``: note what each role does when, in ``notes`` (cu/trace.cuh).
        """
        if (refused := refusal(config, words.ranks)) is not None:
            raise refused
        self.config, self._words = config, words
        self._cuts = cuts(config, words.ranks) if cut is None else (cut,)
        self.grid = processors_of(torch.cuda.current_device()) // 2 * 2
        if (refused := refusal_of_gpu(config, words.ranks, self.grid)) is not None:
            raise refused
        if self.grid < (pullers or 0) + 2:
            raise ValueError(f"pullers must be at most {self.grid - 2} here, got {pullers}")
        pools = {} if pools is None else pools

        def cuda(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if name not in SHARED_POOLS:
                return torch.zeros(shape, dtype=dtype, device="cuda")
            if (name, shape) not in pools:
                pools[name, shape] = torch.zeros(shape, dtype=dtype, device="cuda")
            return pools[name, shape]

        memory = work_memory(config, words.ranks, self.grid, pullers, self._cuts)
        self._kept = {name: cuda(name, *kind) for name, kind in memory.items()}
        self.loads, self._numbers = self._kept["loads"], self._kept["numbers"]
        noted = self.grid * ROLES * NOTES * NOTE if trace else 0
        self.notes = torch.zeros(noted, dtype=torch.uint8, device="cuda")
        self._kernels = {
            one: compiled(
                config,
                words.ranks,
                placed,
                layer,
                lane,
                counted=counted,
                pullers=pullers,
                grid=self.grid,
                cut=one,
                among=self._cuts,
                trace=trace,
            )
            for one in self._cuts
        }
        self._weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
        self._launches: dict[Cut, Launch] = {}

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """The slots' weights, as ``laid_out``; before the first round and any capture."""
        kept, up = laid_out(self.config, weights), "13" if self.config.gated else "1"
        w1, w2 = kept["w" + up], kept["w2"]
        self._weights = (w1, w2, kept.get("b" + up), kept.get("b2"))
        pools = [self._kept[name] for name in SHARED_POOLS]
        own = [self._kept[name] for name in ("progress", "parts", "scratch", "numbers")]
        addresses = [t.data_ptr() for t in (self.loads, *pools, *own, self.notes)]
        private = struct.pack("<10Q", *addresses)
        rows, mid = (self._kept[n].unsqueeze(0) for n in ("rows", "mid"))
        for cut, kernel in self._kernels.items():
            boxes: tuple[tuple[Tensor, int], ...]
            wide = cut.columns
            if cut.tall:
                boxes = ((rows, 8), (rows, 32), (w1, wide), (mid, 8), (mid, 32), (w2, wide))
            else:  # half of the columns: the CTAs of a cluster may load one each
                boxes = ((rows, 64), (w1, wide // 2), (mid, 64), (w2, wide // 2))
            maps = b"".join(tensor_map(tensor, box) for tensor, box in boxes)
            given = [maps, self._words.world(), private, bytes(CALL.size)]
            self._launches[cut] = Launch(
                kernel, (self.grid,), THREADS, given, cluster=2, shared=SHARED
            )

    def round(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        head: tuple[int, ...],
        out: Tensor,
        shared: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        """All verbs, one launch on the current stream.  fp32 weights, ids of int32 or int64.

        ``ids`` name slots or, with a ``table``, its entries: int32, the slot of each expert.
        """
        b1, b2 = self._weights[2:]
        call = CALL.pack(
            x.data_ptr(),
            *chosen(self.config, ids, table),
            weights.data_ptr(),
            0 if shared is None else shared.data_ptr(),
            out.data_ptr(),
            0 if b1 is None else b1.data_ptr(),
            0 if b2 is None else b2.data_ptr(),
            len(x),
            ctypes.c_float(self.config.clamp).value,  # inf, if it has no float
            *head,
        )
        cut = self._cuts[0]
        if len(self._cuts) > 1:
            cut = cut_of(self.config, self._words.ranks, head[CAPACITY])
        self._launches[cut].enqueue(raw_stream(), call)

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
    counted: bool = True,
    pullers: int | None = None,
    grid: int = 132,
    cut: Cut = MANY,
    among: Iterable[Cut] | None = None,
    trace: bool = False,
) -> CompiledKernel:
    """The kernel for this layer's shapes and offsets; needs no GPU."""
    ring = ring_blocks(config, ranks, grid, pullers, among or cuts(config, ranks))
    at, pullers = placed.lanes[lane][layer], pullers or pullers_of(config, cut, ranks, grid)
    blocks = most_blocks(config, ranks)
    defines = round_constants(config, ranks, at, blocks=blocks, ring=ring, grid=grid) | {
        "COUNTED": int(counted),
        "TRACE": int(trace),
        "PULLERS": pullers,
        "LAG": lag(grid, pullers, cut),
        "TALL": cut.columns if cut.tall else 0,
        "WIDE": cut.columns if not cut.tall else MANY.columns,
    }
    return compile_kernel("round.cu", "fused_round", defines)


def round_constants(
    config: MoEConfig,
    ranks: int,
    at: Mapping[str, Region],
    *,
    blocks: int,
    ring: int,
    grid: int,
) -> dict[str, int | str]:
    """What cu/exchange.cuh and cu/tell.cuh are compiled with."""
    return mailbox_constants(config, ranks, at) | {
        "INNER": config.inner,
        "ACT": config.activation.upper(),
        "BIAS": int(config.bias),
        "BLOCKS": f"{blocks}u",
        "RING": f"{ring}u",
        "PARTS": f"{parts(grid, ranks)}u",
    }


def chosen(config: MoEConfig, ids: Tensor, table: Tensor | None) -> tuple[int, int, int, int]:
    """The fields of cu/choices.cuh; ``ids`` and ``table`` as in ``FusedOps.round``."""
    known = config.places if table is None else config.experts
    address = 0 if table is None else table.data_ptr()
    return ids.data_ptr(), address, known, int(ids.dtype == torch.int64)
