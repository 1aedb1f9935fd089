"""The rounds of one layer on one lane: by verbs on the host, by launches on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from epmoe.comm.device import DeviceSlabs
from epmoe.comm.words import Words
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.choose import Chooser
from epmoe.kernels.host import HostOps
from epmoe.kernels.moving import Carrier, CudaCarrier, HostCarrier
from epmoe.kernels.ops import HEAD_FIELDS, VERBS
from epmoe.migration import Migration
from epmoe.runtime import Lane, Runtime
from epmoe.sched.placement import Placement, choose_slots
from epmoe.shared import shared_rows

if TYPE_CHECKING:
    from epmoe.kernels.cuda import CudaOps
    from epmoe.kernels.fused import FusedOps

VERB = HEAD_FIELDS.index("verb")
Head = tuple[int, ...]
Tensors = Mapping[str, Tensor]
Freight = Migration | None


class Rounds(Protocol):
    """What a layer asks of its lane, whatever carries the round out."""

    def kept(self, tensors: Tensors) -> Tensors:
        """The tensors that slots consist of here, made of those that the format declares.

        They are what a round reads and what travels when experts move.
        """

    def adopt(self) -> None:
        """What slots consist of has been put into the mapping that this was made with."""

    def place(self, placement: Placement) -> None:
        """From the next round on the slots hold this."""

    def slots(self, ids: Tensor) -> Tensor:
        """One slot for every choice of my rows; -1 stays."""

    def run(
        self, turn: Lane, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Freight
    ) -> Tensor:
        """One round; my rows' results."""

    def counted(self) -> Tensor:
        """Rows of every expert, of all ranks, since this was last asked: int64 on the host."""

    def carrier(self) -> Carrier:
        """What copies freight between the rounds' verbs."""

    def settled(self) -> None:
        """Returns when all queued rounds are over; raises what went wrong in them."""

    def check(self, *, wait: bool) -> None:
        """Raise what has gone wrong on the device; with ``wait``, in all rounds queued so far."""

    def close(self) -> None:
        """Drop every view of the heap."""


class HostRounds:
    """Rounds by the verbs of ``HostOps``."""

    def __init__(
        self, runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
    ) -> None:
        self._runtime, self._config = runtime, runtime.configs[layer]
        self.ops = HostOps(
            self._config,
            runtime.heap,
            runtime.placed,
            layer=layer,
            lane=lane,
            words=runtime.host_words(lane),
            weights=weights,
            describe=runtime.describe,
        )
        self._shared = shared
        self._rows_E = torch.zeros(self._config.experts, dtype=torch.int64)
        self.place(linear(runtime, self._config))

    def kept(self, tensors: Tensors) -> Tensors:
        """See ``Rounds``; the verbs read the slots where the caller keeps them."""
        return tensors

    def adopt(self) -> None:
        """See ``Rounds``."""

    def place(self, placement: Placement) -> None:
        """See ``Rounds``."""
        self._placement = placement
        self._expert_of_S = torch.tensor(placement.expert_of_S)
        self._identity = placement.expert_of_S == tuple(range(placement.experts))

    def slots(self, ids: Tensor) -> Tensor:
        """See ``Rounds``."""
        if self._identity:
            return ids
        return choose_slots(ids, self._placement, rank=self._runtime.group.rank)

    def run(
        self, turn: Lane, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Freight
    ) -> Tensor:
        """Stage, C, plan, pull, experts, push, Y, reduce: see docs/design.md."""
        ops, round, limit_s = self.ops, turn.round, self._runtime.limit_s(turn)
        if freight is not None:
            freight.load()
        ops.stage(x, slots, weights, head, round)
        shared = shared_rows(self._config, self._shared, x)  # while the peers' words travel
        plan = ops.wait_plan(round, limit_s)
        if freight is not None:
            freight.unload()
        rows = ops.pull(plan)
        y = ops.ffn(rows, plan)
        if freight is not None:
            freight.landed()
        ops.push(y, plan, round)
        out = ops.reduce(slots, weights, shared, round, limit_s)
        turn.round += 1
        self._rows_E.scatter_add_(0, self._expert_of_S, plan.rows_S)
        return out

    def counted(self) -> Tensor:
        """See ``Rounds``."""
        rows_E, self._rows_E = self._rows_E, torch.zeros_like(self._rows_E)
        return rows_E

    def carrier(self) -> Carrier:
        """See ``Rounds``."""
        return HostCarrier(self._runtime.heap, self._runtime.placed.rank["freight"])

    def settled(self) -> None:
        """See ``Rounds``; on the host a fault is raised where it happens."""

    def check(self, *, wait: bool) -> None:
        """See ``Rounds``; on the host a fault is raised where it happens."""

    def close(self) -> None:
        """See ``Rounds``."""
        self.ops.close()


class CudaRounds:
    """A round is one launch on the caller's stream; nothing here waits for the GPU.

    What a forward carries is laid out before its launch and fetched after it, before anything else:
    the next round's Y says that it has been read, one round before its half is filled again.  A
    round without rows is made of the split verbs, whose fetches run beside the words.
    """

    def __init__(
        self, runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
    ) -> None:
        from epmoe.kernels.fused import FusedOps

        words = runtime.lanes[lane].words
        if isinstance(words, Words):
            raise EpmoeError("rounds on a GPU need a device heap")
        self._runtime, self._config, self._words = runtime, runtime.configs[layer], words
        self._layer, self._lane = layer, lane
        pools = runtime.lanes[lane].pools
        self.ops: FusedOps = FusedOps(
            self._config, runtime.placed, layer=layer, lane=lane, words=words, pools=pools
        )
        self._verbs: CudaOps | None = None  # made when experts move for the first time
        self._weights, self._shared = weights, shared
        placement = linear(runtime, self._config)
        self._chooser = Chooser(self._config, placement, runtime.group.rank)
        self._table = self._chooser.table
        self._expert_of_S = torch.tensor(placement.expert_of_S)
        # Counts up to a change of placement, and what the slots held until then.
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._counted = torch.zeros(self._config.places, dtype=torch.int64)

    def kept(self, tensors: Tensors) -> Tensors:
        """See ``Rounds``; the kernels' layout is made here, never in a forward."""
        from epmoe.kernels.cuda import laid_out

        return laid_out(self._config, tensors)

    def adopt(self) -> None:
        """See ``Rounds``."""
        self.ops.adopt(self._weights)

    def place(self, placement: Placement) -> None:
        """See ``Rounds``.  Captured graphs choose by it too: the tables stay where they are."""
        self._unread.append((self.ops.loads.clone(), self._expert_of_S))
        self._expert_of_S = torch.tensor(placement.expert_of_S)
        self._chooser.place(placement)

    def slots(self, ids: Tensor) -> Tensor:
        """See ``Rounds``.  Where every expert has one slot, the round itself looks it up."""
        return self._chooser.slots(ids) if self._table is None else ids

    def run(
        self, turn: Lane, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Freight
    ) -> Tensor:
        """See ``Rounds``.  The round number that counts is the GPU's: graphs replay."""
        out = torch.empty_like(x)
        if freight is not None and VERBS[head[VERB]] == "place":
            self._carry(x, slots, weights, head, freight)
        else:
            if freight is not None:
                freight.load()
            shared = shared_rows(self._config, self._shared, x)
            self.ops.round(x, slots, weights, head, out, shared, self._table)
            if freight is not None:
                freight.unload()
                freight.landed(now=True)
        if turn.round == 1:
            self._words.limit(self._config.stall_s)
        turn.round += 1
        return out

    def _carry(
        self, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Migration
    ) -> None:
        """A round without rows, for its freight alone."""
        from epmoe.kernels.cuda import CudaOps

        if self._verbs is None:
            self._verbs = CudaOps(
                self._config,
                self._runtime.placed,
                layer=self._layer,
                lane=self._lane,
                words=self._words,
                rows=0,
            )
        verbs = self._verbs
        freight.load()
        verbs.stage(x, slots, weights, head)
        verbs.pull()
        freight.unload()
        freight.landed()
        verbs.push()
        verbs.reduce(slots, weights, None, x)

    def counted(self) -> Tensor:
        """See ``Rounds``; waits for the GPU."""
        rows_E = torch.zeros(self._config.experts, dtype=torch.int64)
        for loads, expert_of_S in (*self._unread, (self.ops.loads, self._expert_of_S)):
            total = loads.cpu()
            rows_E.scatter_add_(0, expert_of_S, total - self._counted)
            self._counted = total
        self._unread.clear()
        return rows_E

    def carrier(self) -> Carrier:
        """See ``Rounds``."""
        heap = self._runtime.heap
        if not isinstance(heap, DeviceSlabs):
            raise EpmoeError(f"freight on a GPU needs a device heap, got {type(heap).__name__}")
        return CudaCarrier(heap, self._runtime.placed.rank["freight"])

    def settled(self) -> None:
        """See ``Rounds``."""
        torch.cuda.synchronize()
        self._words.check()

    def check(self, *, wait: bool) -> None:
        """See ``Rounds``.  Without ``wait`` it reads page-locked memory only: fit for a capture."""
        if wait:
            torch.cuda.synchronize()
        self._words.check()
        if not wait:
            return
        if bad := self.ops.bad():
            raise ValueError(
                f"ids: {bad} choices so far were outside -1..{self._config.experts - 1}; they "
                "counted as -1"
            )

    def close(self) -> None:
        """See ``Rounds``."""


def linear(runtime: Runtime, config: MoEConfig) -> Placement:
    """What the slots hold when a layer opens."""
    return Placement.linear(config.experts, config.places, runtime.group.size)


def open_rounds(
    runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
) -> Rounds:
    """The rounds that fit the layer's heap; the mappings are filled by ``load``."""
    if runtime.configs[layer].heap == "host":
        return HostRounds(runtime, layer, lane, weights, shared)
    return CudaRounds(runtime, layer, lane, weights, shared)
