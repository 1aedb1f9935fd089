"""The verbs of a round on a GPU, a launch each, the experts two: nothing here waits for the GPU."""

from __future__ import annotations

import struct
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from epmoe.comm.device_words import DeviceWords
from epmoe.comm.layout import HEAD, Layout, Region, record
from epmoe.config import MoEConfig
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.gemm import BLOCK, grouped_gemm, interleave, processors_of
from epmoe.kernels.launch import CompiledKernel, Launch
from epmoe.kernels.sizes import most_blocks, refusal

MOVERS = 7  # cu/copy.cuh
MOVER_SHARED = MOVERS * 4 * (7168 + 8) + 128
COPIERS = 96  # blocks that stage rows beside those that write lists
FEW = 64  # grouped_gemm's ``tall`` for few rows a slot
# Blocks that pull: 8 to 16 saturate the link.  Those that push are all: 4 GPUs, 4,096 rows of dsv3,
# dispatch with 16 / 32 / 64 / 132 of both 1,123 / 1,127 / 1,222 / 1,177 us, combine 1,314 / 1,283 /
# 1,295 / 1,160.
PULLING = 16


class CudaOps:
    """One layer on one lane of a CUDA heap, as separate launches.

    Its row pool holds whatever routing can send here, so that it can serve as an oracle for any
    traffic: that is much memory at large capacities.  Layers that run one after the other share it:
    they are given the same ``pools``.
    """

    def __init__(
        self,
        config: MoEConfig,
        placed: Layout,
        *,
        layer: int,
        lane: int,
        words: DeviceWords,
        pools: MutableMapping[object, Tensor] | None = None,
        rows: int | None = None,
    ) -> None:
        """``rows``: what the pool holds; None: whatever routing can send here."""
        if (refused := refusal(config, words.ranks)) is not None:
            raise refused
        self.config, self.words = config, words
        ranks = self.ranks = words.ranks
        local = config.slots_per_rank(ranks)
        pool = most_blocks(config, ranks) * BLOCK if rows is None else rows
        hidden, inner = config.hidden, config.inner

        def cuda(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        def shared(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
            found = (pools or {}).get((name, shape))
            if found is None:
                found = cuda(*shape, dtype=dtype)
                if pools is not None:
                    pools[name, shape] = found
            return found

        self.counts = cuda(ranks, local, dtype=torch.int32)
        self.slot_rows = cuda(local, dtype=torch.int32)
        self.loads = cuda(config.places, dtype=torch.int64)
        self.origin = shared("origin", pool, dtype=torch.int64)
        self.scale = shared("scale", pool, dtype=torch.float32)
        self.rows = shared("rows", pool, hidden, dtype=torch.bfloat16)
        self.mid = shared("mid", pool, inner, dtype=torch.bfloat16)
        self.results = shared("results", pool, hidden, dtype=torch.bfloat16)
        self.tallies = cuda(5, dtype=torch.int32)  # staged, pushed, reduced, bad, came
        self._kernels = compiled(config, ranks, placed, layer, lane)
        self._world = words.world()
        tallies = [self.tallies.data_ptr() + 4 * i for i in range(5)]
        kept = (self.counts, self.slot_rows, self.loads, self.origin, self.scale)
        both = (self.rows, self.results)
        addresses = (*(t.data_ptr() for t in (*kept, *both)), *tallies)
        self._private = struct.pack("<12QII", *addresses, pool, 0)
        # One rank has no link to saturate: all processors pull.
        all_of_them = processors_of(torch.cuda.current_device())
        pulling = PULLING if ranks > 1 else all_of_them
        moving = {"block": MOVERS * 32, "shared": MOVER_SHARED}
        given = [self._world, self._private]
        self._pull = Launch(self._kernels["pull"], grid=(pulling,), args=given, **moving)
        self._push = Launch(self._kernels["push"], grid=(all_of_them,), args=given, **moving)
        head = bytes(8 * HEAD)
        stage = [*given, 0, 0, 0, 0, head]
        self._stage = Launch(self._kernels["stage"], (ranks + COPIERS,), 1024, stage)
        grid = 3 * all_of_them  # cu/verbs.cu
        self._reduce = Launch(self._kernels["reduce"], (grid,), 256, [*given, 0, 0, 0, 0, 0])
        self._gemms: dict[int, tuple[Launch, ...]] = {}
        self._weights: tuple[Tensor | None, ...] = ()

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """The slots' weights, as ``laid_out``; before the first round and any capture."""
        config = self.config
        kept = laid_out(config, weights)
        up = "13" if config.gated else "1"
        w1, w2, b1, b2 = kept["w" + up], kept["w2"], kept.get("b" + up), kept.get("b2")
        scale = self.scale if config.weight_in == "fc2" else None
        self._weights = (w1, w2, b1, b2)  # a launch holds addresses only
        self._gemms = {
            tall: (
                grouped_gemm(
                    self.rows,
                    w1,
                    self.mid,
                    self.slot_rows,
                    activation=config.activation,
                    clamp=config.clamp,
                    bias_LN=b1,
                    scale_P=scale,
                    tall=tall,
                ),
                grouped_gemm(
                    self.mid, w2, self.results, self.slot_rows, bias_LN=b2, scale_P=scale, tall=tall
                ),
            )
            for tall in (0, FEW)
        }

    def stage(self, x: Tensor, slots: Tensor, weights: Tensor, head: tuple[int, ...]) -> None:
        """My rows into my slab, counts and lists to the peers, C to each.  int32 slots."""
        packed = struct.pack(f"<{HEAD}q", *head)
        self._stage.enqueue(raw_stream(), x, slots, weights, len(x), packed)

    def pull(self) -> None:
        """Wait for all C; the asked rows into the pool, grouped by slot."""
        self._pull.enqueue(raw_stream())

    def ffn(self, capacity: int | None = None) -> None:
        """Both GEMMs with the activation between them; ``capacity`` rows a rank at most (max_rows).

        Few rows a slot: weights become the 64-row operand.  No bit of an answer depends on it.
        """
        config = self.config
        expected = (capacity or config.max_rows) * config.choices * self.ranks / config.places
        for gemm in self._gemms[FEW if expected <= 32 else 0]:
            gemm.enqueue(raw_stream())

    def push(self) -> None:
        """Results to their sources' cells, then Y to every peer."""
        self._push.enqueue(raw_stream())

    def reduce(self, slots: Tensor, weights: Tensor, shared: Tensor | None, out: Tensor) -> None:
        """Wait for all Y; the sum over choices; NaN after a fault.  The round is over."""
        self._reduce.enqueue(
            raw_stream(), slots, weights, 0 if shared is None else shared, out, len(out)
        )

    def round(
        self,
        x: Tensor,
        slots: Tensor,
        weights: Tensor,
        head: tuple[int, ...],
        out: Tensor,
        shared: Tensor | None = None,
    ) -> None:
        """All verbs in order on the current stream."""
        self.stage(x, slots, weights, head)
        self.pull()
        self.ffn()
        self.push()
        self.reduce(slots, weights, shared, out)


def laid_out(config: MoEConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Plain slots as the kernels read them: ``w13`` is w1 and w3 interleaved, ``b13`` likewise.

    What is laid out already comes back as it is.
    """
    if not config.gated or "w13" in weights:
        return weights
    kept = {"w13": interleave(weights["w1"], weights["w3"]), "w2": weights["w2"]}
    if config.bias:
        kept |= {"b13": interleave(weights["b1"], weights["b3"]), "b2": weights["b2"]}
    return kept


def compiled(
    config: MoEConfig, ranks: int, placed: Layout, layer: int, lane: int
) -> dict[str, CompiledKernel]:
    """The verbs' kernels for this layer's shapes and offsets; needs no GPU."""
    constants = mailbox_constants(config, ranks, placed.lanes[lane][layer])
    verbs = ("stage", "pull", "push", "reduce")
    return {verb: compile_kernel("verbs.cu", verb, constants) for verb in verbs}


def mailbox_constants(
    config: MoEConfig, ranks: int, at: Mapping[str, Region]
) -> dict[str, int | str]:
    """What cu/mailbox.cuh and everything that finds its way in a slab are compiled with."""
    constants: dict[str, int | str] = {
        "RANKS": ranks,
        "LOCAL": config.slots_per_rank(ranks),
        "CHOICES": config.choices,
        "HIDDEN": config.hidden,
        "MAX_ROWS": config.max_rows,
        "RECORD": record(config)[1],
        "WEIGHT_IN_FC2": int(config.weight_in == "fc2"),
    }
    return constants | {f"{name.upper()}_AT": f"{region.at}ull" for name, region in at.items()}


def raw_stream() -> int:
    """As ``torch.cuda.currentraw_stream().cuda_stream``, without an object: seven times a round."""
    return int(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))
