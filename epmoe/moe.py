"""The layer: loads its slots, runs rounds, closes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from epmoe.accept import check_batch, check_epoch, check_weights
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.context import PHASES, ForwardContext
from epmoe.errors import EpmoeError
from epmoe.formats import format_of
from epmoe.formats.declare import agreed_values
from epmoe.kernels.ops import VERBS
from epmoe.observed import Observed
from epmoe.operator import enrolled, forward
from epmoe.placing import Placing, nothing
from epmoe.rounds import open_rounds
from epmoe.runtime import Runtime, agree
from epmoe.sched import chunks as cutting
from epmoe.sched.chunks import Chunks
from epmoe.sched.placement import Placement
from epmoe.shared import shared_tensors

# All layers of a step ask for the same, and every decode step for what the one before asked.
plan_chunks = functools.lru_cache(maxsize=256)(cutting.plan_chunks)


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
        self.number = enrolled(self)  # in this process: by it a compiled graph finds the layer
        self._label = f"epmoe {self.config.name}"
        self._runtime = runtime
        self._device = runtime.device
        self._weights: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}
        self._rounds = [
            open_rounds(runtime, layer, lane, self._weights, self._shared)
            for lane in range(self.config.lanes)
        ]
        queued = self._device.type != "cpu"
        self._observed = Observed(self.config.experts, self._rounds, queued=queued)
        self._placing = Placing(runtime, layer, self._weights, self._rounds)
        runtime.views += [rounds.close for rounds in self._rounds]

    @classmethod
    def open(cls, config: MoEConfig, group: Group) -> MoE:
        """One layer with a heap of its own.  Collective: all ranks succeed or all raise."""
        return cls.open_all([config], group)[0]

    @classmethod
    def open_all(cls, configs: Sequence[MoEConfig], group: Group) -> tuple[MoE, ...]:
        """Layers that share one heap and its rounds; closing one closes all.

        They run one at a time per lane, in the same order on every rank.
        """
        configs = tuple(configs)
        with torch.inference_mode(False):  # or the heap could not be written outside of that mode
            runtime = Runtime.open(configs, group)
            try:
                with group.guarded("make the layers", configs[0].open_s):
                    return tuple(cls(runtime, layer) for layer in range(len(configs)))
            except BaseException:
                runtime.close()
                raise

    def load(self, **tensors: Tensor) -> None:
        """The tensors of my slots, in the format's declared names; kept, not copied.

        On the host plain matrices may be views with contiguous rows (halves of a stored gate_up).
        On a GPU gate and up are copied into one tensor, and not kept, unless they come as that
        one: ``w13``, made without a copy by ``interleave_``.  Experts that move are written into
        what is kept.  Collective: every rank loads or every rank raises.  Plain
        weights are ``w1`` (slots, inner, hidden), ``w3`` (if gated), ``w2`` (slots, hidden, inner),
        biases ``b1``, ``b3``, ``b2``, and ``shared_w1`` and so on without the slot axis.
        """
        config, group = self.config, self._runtime.group
        self._runtime.check()
        with group.guarded(f"load layer {self.layer} ({config.name})", config.open_s):
            declared, shared = format_of(config).tensors(config), shared_tensors(config)
            slots = config.slots_per_rank(group.size)
            self._placing.refuse_load()
            check_weights(declared, shared, tensors, slots, self._device)
            common = agreed_values(format_of(config).agreed(config), tensors)
        if common:  # a row is written on one rank and read on another: they need the same scale
            facts = {f"layer {self.layer} {name}": repr(value) for name, value in common.items()}
            agree(facts, group, what="scales", limit_s=config.open_s)
        names = {t.name for t in shared}
        routed = {n: t for n, t in tensors.items() if n not in names}
        phase = f"lay out layer {self.layer} ({config.name})"
        with self._current(), group.guarded(phase, config.open_s):
            self._weights.update(self._rounds[0].kept(routed))
            self._shared.update({n: t for n, t in tensors.items() if n in names})
            for rounds in self._rounds:
                rounds.adopt()
            self._placing.adopt()

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
        if torch.compiler.is_compiling():  # one operator in the graph; nothing below is traced
            return forward(self, x, ids, weights, context, lane)
        if self._device.type == "cpu":
            return self._run(x, ids, weights, context, lane)
        # What nsys shows above the kernels of this forward; 0.2 us with its end, measured.
        torch.cuda.nvtx.range_push(self._label)  # type: ignore[no-untyped-call]
        try:
            with self._current():
                return self._run(x, ids, weights, context, lane)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def _run(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        context: ForwardContext | None,
        lane: int,
    ) -> Tensor:
        """The call, from the lane's turn to the answer."""
        runtime = self._runtime
        self._placing.refuse_capture()
        wrong: ValueError | None = None
        if lane != 0 and len(runtime.lanes) == 1:  # then it is clear where an empty batch goes
            wrong = ValueError(f"rank {runtime.group.rank}: lane must be in 0..0, got {lane!r}")
            lane = 0
        with runtime.turn(lane) as turn:
            if not self._weights:
                raise EpmoeError(
                    f"rank {runtime.group.rank}: layer {self.layer} ({self.config.name}) has no "
                    "weights; call load first"
                )
            if self._device.type != "cpu":
                self._rounds[lane].check(wait=False)
            self._placing.switch()
            refused = wrong or self._refusal(x, ids, weights, context)
            if refused is not None:
                x, ids, weights = nothing(self.config, self._device)
                context = context if isinstance(context, ForwardContext) else None
            slots, chunks = self._rounds[lane].slots(ids), self._chunks(context, len(x))
            phase = PHASES.index(context.phase) if context is not None else 0
            before, count = (context.chunk, context.chunks) if context is not None else (0, 1)
            outs = []
            # Modes of the caller must not reach the arithmetic: parameters with grad, autocast.
            kind = self._device.type
            mixed = torch.is_autocast_enabled(kind)
            with torch.no_grad(), torch.autocast(kind, enabled=False) if mixed else nullcontext():
                for chunk in range(chunks.count):
                    span = (
                        chunks.span(chunk, runtime.group.rank) if refused is None else slice(0, 0)
                    )
                    head = (
                        self.layer,
                        VERBS.index("forward"),
                        chunks.capacity,
                        chunk + before,
                        max(chunks.count, count),
                        phase,
                        self.epoch,
                        lane,
                    )
                    freight = self._placing.migration if lane == 0 else None
                    outs.append(
                        self._rounds[lane].run(
                            turn, x[span], slots[span], weights[span], head, freight
                        )
                    )
            if self._device.type == "cpu":  # a GPU counts by itself and is asked by ``observe``
                self._observed.begin(lane)
        if refused is not None:
            raise refused
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def place(
        self, placement: Placement, *, budget: int | None = None, verify: bool = False
    ) -> None:
        """Move the experts to ``placement``; answers are the same before, during and after.

        Collective, between rounds.  Without a ``budget`` it returns when the new placement is in
        force.  With one it returns at once and the coming forwards carry at most that many bytes
        out of and into each rank.  When all has arrived, slots change at the start of the next
        forwards, the same ones on every rank, again at most that many bytes at a time (or one
        ring of experts that have no second slot): ``placement`` is legal, and true, all the time.
        ``verify`` sends a checksum with every slot.  A failure before that leaves the old
        placement, on every rank; addresses never change.
        """
        with self._current():
            self._placing.place(placement, budget, verify)

    @property
    def placement(self) -> Placement:
        """What the slots of all ranks hold now."""
        return self._placing.placement

    @property
    def epoch(self) -> int:
        """How often the placement has changed; equal on all ranks in every round."""
        return self._placing.epoch

    @property
    def moving(self) -> bool:
        """True from ``place`` with a budget until the new placement is in force."""
        return self._placing.migration is not None

    def loads(self) -> Tensor:
        """Rows every logical expert got lately, from all ranks: the same numbers on every rank.

        float64 of length experts, over the last forwards that had rows: 1,000, or what
        ``remember`` says (on a GPU, one forward is what came between two calls of ``observe``).
        Choices of -1 are not counted.  Readable at any time, by one rank alone; on a GPU this waits
        for the rounds that are queued.
        """
        return self._observed.loads()

    def observe(self) -> Tensor:
        """``loads``, and on a GPU the next forward of the window begins.

        Between the same forwards on every rank, or the ranks' loads differ: a balancer does it.
        """
        return self._observed.observe()

    def remember(self, *, window: int = 1000, decay: float = 1.0) -> None:
        """How many forwards ``loads`` sums, and how much less the older ones weigh; starts anew.

        The same on every rank, or the ranks' loads differ.
        """
        self._observed.remember(window, decay)

    def check(self) -> None:
        """Raise if this layer's heap is closed or unusable, or if a round on the GPU failed.

        A GPU's rounds are queued: what went wrong in one shows here (its output is NaN), or in the
        next forward.
        """
        self._runtime.check()
        with self._runtime.blamed(), self._current():
            for rounds in self._rounds:
                rounds.check(wait=True)

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
            self._runtime.poison(error, self._runtime.lanes[0].next_round())
        self.close()

    def _current(self) -> AbstractContextManager[object]:
        """The layer's GPU is the current one inside, as in torch's own operators."""
        if self._device.type == "cpu" or torch.cuda.current_device() == self._device.index:
            return nullcontext()
        return torch.cuda.device(self._device)

    def _refusal(
        self, x: Tensor, ids: Tensor, weights: Tensor, context: ForwardContext | None
    ) -> ValueError | TypeError | None:
        group = self._runtime.group
        try:
            check_batch(self.config, x, ids, weights, context, group.rank, group.size, self._device)
            check_epoch(context, self.epoch)
        except (ValueError, TypeError) as error:
            return type(error)(f"rank {group.rank}: {error}")
        return None

    def _chunks(self, context: ForwardContext | None, rows: int) -> Chunks:
        """From rank-identical numbers only; without a context every rank runs one full chunk."""
        size, max_rows = self._runtime.group.size, self.config.max_rows
        if context is not None and context.capacity is not None:
            return Chunks(((rows,) * size,), min(context.capacity, max_rows))  # cut already
        if context is not None and context.rows is not None and len(context.rows) == size:
            return plan_chunks(context.rows, max_rows)
        return Chunks(((rows,) * size,), max_rows)
