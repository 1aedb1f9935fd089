"""The layer: loads its slots, runs rounds, closes."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from epmoe.accept import check_batch, check_weights
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.context import PHASES, ForwardContext
from epmoe.errors import EpmoeError
from epmoe.formats import format_of
from epmoe.kernels.host import HostOps
from epmoe.kernels.ops import VERBS, Ops
from epmoe.runtime import Lane, Runtime
from epmoe.sched.chunks import Chunks, plan_chunks
from epmoe.sched.placement import Placement, choose_slots
from epmoe.shared import shared_rows, shared_tensors


class MoE:
    """One mixture-of-experts layer over the ranks of a group.

    Promised: what every rank gets back is what ``reference_moe`` computes for it, or an exception.
    Not promised: anything for a rank that calls in another order than its peers, except that all
    of them raise ``ConfigMismatch`` or ``PeerLost`` within the stall limit.
    """

    def __init__(self, runtime: Runtime, layer: int) -> None:
        """Not for callers: ``open`` and ``open_all`` make layers."""
        self.config = runtime.configs[layer]
        self.layer = layer
        self._runtime = runtime
        self._device = torch.device("cpu")
        self._weights: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}
        group = runtime.group
        self.placement = Placement.linear(self.config.experts, self.config.places, group.size)
        self._ops: list[Ops] = [
            HostOps(
                self.config,
                runtime.heap,
                runtime.placed,
                layer=layer,
                lane=lane,
                words=runtime.lanes[lane].words,
                weights=self._weights,
                describe=runtime.describe,
            )
            for lane in range(self.config.lanes)
        ]
        runtime.views += [ops.close for ops in self._ops]

    @classmethod
    def open(cls, config: MoEConfig, group: Group) -> MoE:
        """One layer with a heap of its own.  Collective: all ranks succeed or all raise."""
        return cls.open_all([config], group)[0]

    @classmethod
    def open_all(cls, configs: Sequence[MoEConfig], group: Group) -> tuple[MoE, ...]:
        """Layers that share one heap and its rounds; closing one closes all.

        They run one at a time per lane, in the same order on every rank.
        """
        for config in configs:
            config.slots_per_rank(group.size)
        runtime = Runtime.open(configs, group)
        return tuple(cls(runtime, layer) for layer in range(len(configs)))

    def load(self, **tensors: Tensor) -> None:
        """The tensors of my slots, in the format's declared names; kept, not copied.

        Collective: every rank loads or every rank raises.  Plain weights are ``w1`` (slots, inner,
        hidden), ``w3`` (if gated), ``w2`` (slots, hidden, inner), biases ``b1``, ``b3``, ``b2``,
        and ``shared_w1`` and so on without the slot axis.
        """
        config, group = self.config, self._runtime.group
        self._runtime.check()
        with group.guarded(f"load layer {self.layer} ({config.name})", config.open_s):
            declared, shared = format_of(config).tensors(config), shared_tensors(config)
            slots = config.slots_per_rank(group.size)
            check_weights(declared, shared, tensors, slots, self._device)
        names = {t.name for t in shared}
        self._weights.update({n: t for n, t in tensors.items() if n not in names})
        self._shared.update({n: t for n, t in tensors.items() if n in names})

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        context: ForwardContext | None = None,
        lane: int = 0,
    ) -> Tensor:
        """One forward of this rank's rows; every rank calls it, also with none.

        ``ids`` name logical experts, -1 is no choice; a row without choices gives zeros (plus the
        shared expert).  A batch that is refused takes part as an empty one, so that peers get
        their answers, and raises afterwards.
        """
        runtime = self._runtime
        with runtime.turn(lane) as turn:
            if not self._weights:
                raise EpmoeError(
                    f"rank {runtime.group.rank}: layer {self.layer} ({self.config.name}) has no "
                    "weights; call load first"
                )
            refused = self._refusal(x, ids, weights, context)
            if refused is not None:
                x = torch.empty(0, self.config.hidden, dtype=self._row_dtype)
                ids = torch.empty(0, self.config.choices, dtype=torch.int64)
                weights = torch.empty(0, self.config.choices)
            slots = self._slots(ids)
            chunks = self._chunks(context, len(x), refused)
            outs = []
            for chunk in range(chunks.count):
                span = chunks.span(chunk, runtime.group.rank) if refused is None else slice(0, 0)
                head = self._head(chunks, chunk, context, lane)
                outs.append(self._round(turn, lane, x[span], slots[span], weights[span], head))
        if refused is not None:
            raise refused
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def check(self) -> None:
        """Raise if this layer's heap is closed or unusable; on the host nothing else is pending."""
        self._runtime.check()

    def close(self) -> None:
        """Leave and unmap, for every layer on this heap.  Local: waits for nobody."""
        self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._runtime.closed:
            self._runtime.poison(error, self._runtime.lanes[0].round)
        self.close()

    @property
    def _row_dtype(self) -> torch.dtype:
        return torch.float32 if self.config.dtype == "fp32" else torch.bfloat16

    def _round(
        self,
        turn: Lane,
        lane: int,
        x: Tensor,
        slots: Tensor,
        weights: Tensor,
        head: tuple[int, ...],
    ) -> Tensor:
        """Stage, C, plan, pull, experts, push, Y, reduce: see docs/design.md."""
        ops, round, limit_s = self._ops[lane], turn.round, self._runtime.limit_s(turn)
        ops.stage(x, slots, weights, head, round)
        shared = shared_rows(self.config, self._shared, x)  # while the peers' words travel
        plan = ops.wait_plan(round, limit_s)
        rows = ops.pull(plan)
        y = ops.ffn(rows, plan)
        ops.push(y, plan, round)
        out = ops.reduce(slots, weights, shared, round, limit_s)
        turn.round += 1
        return out

    def _refusal(
        self, x: Tensor, ids: Tensor, weights: Tensor, context: ForwardContext | None
    ) -> ValueError | TypeError | None:
        group = self._runtime.group
        try:
            check_batch(self.config, x, ids, weights, context, group.rank, group.size, self._device)
        except (ValueError, TypeError) as error:
            return type(error)(f"rank {group.rank}: {error}")
        return None

    def _slots(self, ids: Tensor) -> Tensor:
        if self.config.places == self.config.experts:
            return ids
        return choose_slots(ids, self.placement, rank=self._runtime.group.rank)

    def _chunks(
        self, context: ForwardContext | None, rows: int, refused: Exception | None
    ) -> Chunks:
        """From rank-identical numbers only; without a context every rank runs one full chunk."""
        size, max_rows = self._runtime.group.size, self.config.max_rows
        known = isinstance(context, ForwardContext) and context.rows is not None
        if known and context is not None and context.rows and len(context.rows) == size:
            return plan_chunks(context.rows, max_rows)
        return Chunks((tuple(rows for _ in range(size)),), max_rows)

    def _head(
        self, chunks: Chunks, chunk: int, context: ForwardContext | None, lane: int
    ) -> tuple[int, ...]:
        known = isinstance(context, ForwardContext)
        phase = PHASES.index(context.phase) if known and context is not None else 0
        epoch = context.epoch if known and context is not None else 0
        return (
            self.layer,
            VERBS.index("forward"),
            chunks.capacity,
            chunk,
            chunks.count,
            phase,
            epoch,
            lane,
        )
