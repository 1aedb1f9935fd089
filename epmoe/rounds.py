"""The rounds of one layer on one lane: by verbs on the host, by launches on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from epmoe.comm.words import Words
from epmoe.errors import EpmoeError
from epmoe.kernels.host import HostOps
from epmoe.migration import Migration
from epmoe.runtime import Lane, Runtime
from epmoe.shared import shared_rows

if TYPE_CHECKING:
    from epmoe.kernels.cuda import CudaOps

Head = tuple[int, ...]
Tensors = Mapping[str, Tensor]
Freight = Migration | None


class Rounds(Protocol):
    """What a layer asks of its lane, whatever carries the round out."""

    def adopt(self) -> None:
        """The tensors of this rank's slots have been loaded into the mappings it was made with."""

    def run(
        self, turn: Lane, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Freight
    ) -> Tensor:
        """One round; my rows' results."""

    def counted(self) -> Tensor:
        """Rows of every slot of all ranks since this was last asked: int64 on the host."""

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
        self._rows_S = torch.zeros(self._config.places, dtype=torch.int64)

    def adopt(self) -> None:
        """See ``Rounds``; the verbs read the slots where the caller keeps them."""

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
        ops.push(y, plan, round)
        out = ops.reduce(slots, weights, shared, round, limit_s)
        turn.round += 1
        self._rows_S += plan.rows_S
        return out

    def counted(self) -> Tensor:
        """See ``Rounds``."""
        rows_S, self._rows_S = self._rows_S, torch.zeros_like(self._rows_S)
        return rows_S

    def check(self, *, wait: bool) -> None:
        """See ``Rounds``; on the host a fault is raised where it happens."""

    def close(self) -> None:
        """See ``Rounds``."""
        self.ops.close()


class CudaRounds:
    """Rounds by launches on the caller's stream; nothing here waits for the GPU."""

    def __init__(
        self, runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
    ) -> None:
        from epmoe.kernels.cuda import CudaOps

        words = runtime.lanes[lane].words
        if isinstance(words, Words):
            raise EpmoeError("rounds on a GPU need a device heap")
        self._runtime, self._config, self._words = runtime, runtime.configs[layer], words
        self.ops: CudaOps = CudaOps(
            self._config, runtime.placed, layer=layer, lane=lane, words=words
        )
        self._weights, self._shared = weights, shared
        self._counted = torch.zeros(self._config.places, dtype=torch.int64)

    def adopt(self) -> None:
        """See ``Rounds``; the kernels' layout is made here, never in a forward."""
        self.ops.adopt(self._weights)

    def run(
        self, turn: Lane, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Freight
    ) -> Tensor:
        """See ``Rounds``.  The round number that counts is the GPU's: graphs replay."""
        if freight is not None:
            raise EpmoeError("experts cannot move on a device heap yet: place needs a host heap")
        shared = shared_rows(self._config, self._shared, x)
        out = torch.empty_like(x)
        self.ops.round(x, slots.to(torch.int32), weights, head, out, shared)
        if turn.round == 1:
            self._words.limit(self._config.stall_s)
        turn.round += 1
        return out

    def counted(self) -> Tensor:
        """See ``Rounds``; waits for the GPU."""
        total = self.ops.loads.cpu()
        rows_S, self._counted = total - self._counted, total
        return rows_S

    def check(self, *, wait: bool) -> None:
        """See ``Rounds``.  Without ``wait`` it reads page-locked memory only: fit for a capture."""
        if wait:
            torch.cuda.synchronize()
        self._words.check()
        if not wait:
            return
        if bad := int(self.ops.tallies[3]):
            raise ValueError(
                f"ids: {bad} choices so far were outside -1..{self._config.experts - 1}; they "
                "counted as -1"
            )

    def close(self) -> None:
        """See ``Rounds``."""


def open_rounds(
    runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
) -> Rounds:
    """The rounds that fit the layer's heap; the mappings are filled by ``load``."""
    if runtime.configs[layer].heap == "host":
        return HostRounds(runtime, layer, lane, weights, shared)
    return CudaRounds(runtime, layer, lane, weights, shared)
