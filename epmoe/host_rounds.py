"""Rounds on the host: by the verbs, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.kernels.host import HostOps
from epmoe.kernels.moving import Carrier, HostCarrier
from epmoe.rounds import Freight, Head, Tensors, linear
from epmoe.runtime import Lane, Runtime
from epmoe.sched.placement import Placement, choose_slots
from epmoe.shared import shared_rows


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
        self._rows_E = torch.zeros(self._config.experts, dtype=torch.int64, device="cpu")
        self.place(linear(runtime, self._config))

    def kept(self, tensors: Tensors) -> Tensors:
        """See ``Rounds``; the verbs read the slots where the caller keeps them."""
        return tensors

    def adopt(self) -> None:
        """See ``Rounds``."""

    def place(self, placement: Placement) -> None:
        """See ``Rounds``."""
        self._placement = placement
        self._expert_of_S = torch.tensor(placement.expert_of_S, device="cpu")
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
        # A new one: a tensor made in inference mode could not be written outside of it.
        self._rows_E = self._rows_E.scatter_add(0, self._expert_of_S, plan.rows_S)
        return out

    def counted(self) -> Tensor:
        """See ``Rounds``."""
        return self._rows_E

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
