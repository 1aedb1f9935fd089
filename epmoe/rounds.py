"""The rounds of one layer on one lane, whatever carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.kernels.moving import Carrier
from epmoe.migration import Migration
from epmoe.runtime import Lane, Runtime
from epmoe.sched.placement import Placement

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
        """Rows of every expert, of all ranks, since the layer was opened: int64 on the host."""

    def carrier(self) -> Carrier:
        """What copies freight between the rounds' verbs."""

    def settled(self) -> None:
        """Returns when all queued rounds are over; raises what went wrong in them."""

    def check(self, *, wait: bool) -> None:
        """Raise what has gone wrong on the device; with ``wait``, in all rounds queued so far."""

    def close(self) -> None:
        """Drop every view of the heap."""


def linear(runtime: Runtime, config: MoEConfig) -> Placement:
    """What the slots hold when a layer opens."""
    return Placement.linear(config.experts, config.places, runtime.group.size)


def open_rounds(
    runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
) -> Rounds:
    """The rounds that fit the layer's heap; the mappings are filled by ``load``."""
    if runtime.configs[layer].heap == "host":
        from epmoe.host_rounds import HostRounds

        return HostRounds(runtime, layer, lane, weights, shared)
    from epmoe.cuda_rounds import CudaRounds

    return CudaRounds(runtime, layer, lane, weights, shared)
