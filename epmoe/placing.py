"""What the slots of a layer hold, and their way to holding something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from epmoe.accept import check_placement
from epmoe.config import MoEConfig
from epmoe.errors import ConfigMismatch, EpmoeError
from epmoe.formats import DTYPE
from epmoe.kernels.moving import Carrier, SlotBytes
from epmoe.kernels.ops import VERBS
from epmoe.migration import Migration
from epmoe.rounds import Rounds
from epmoe.runtime import Runtime
from epmoe.sched.placement import Placement


class Placing:
    """The placement in force on one layer, on every rank the same in every round."""

    def __init__(
        self, runtime: Runtime, layer: int, weights: Mapping[str, Tensor], rounds: Sequence[Rounds]
    ) -> None:
        """``weights`` are what slots consist of; ``rounds`` those of the layer's lanes."""
        self._config: MoEConfig = runtime.configs[layer]
        self._runtime, self._layer = runtime, layer
        self._weights, self._rounds = weights, rounds
        experts, places = self._config.experts, self._config.places
        self.placement = Placement.linear(experts, places, runtime.group.size)
        self.epoch = 0  # how often the placement has changed
        self.migration: Migration | None = None
        self._slots: SlotBytes | None = None  # made when experts move for the first time

    def adopt(self) -> None:
        """The weights are other tensors now."""
        self._slots = None

    def place(self, placement: Placement, budget: int | None, verify: bool) -> None:
        """See ``MoE.place``."""
        config, group = self._config, self._runtime.group
        self._runtime.check()
        if self._runtime.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
            raise EpmoeError(f"rank {group.rank}: place may not be captured: it waits for the GPU")
        phase = f"place layer {self._layer} ({config.name})"
        with group.guarded(phase, config.stall_s) as said:
            check_placement(config, placement, budget, group.size)
            if self.migration is not None:
                raise ValueError("placement: the layer is on its way to another one already")
            with torch.inference_mode(False):  # or the shadows could be written in that mode only
                migration = self._towards(placement, budget, verify)
                # No rank leaves the phase, so no round waits, while another makes its shadows.
                migration.begin(at_once=budget is None)
            said.mine = repr((budget, verify, placement.expert_of_S)).encode()
        for rank, answer in enumerate(said.by_rank):
            if answer != said.by_rank[0]:
                raise ConfigMismatch(
                    f"placement differs between {group.peers[0]} and {group.peers[rank]}"
                )
        self.migration = migration
        if budget is None:
            self.move_all()

    def move_all(self) -> None:
        """Rounds without rows until everything has arrived; then the switch."""
        x, slots, weights = self._nothing
        rows = self._config.max_rows
        with self._runtime.turn(0) as turn:
            while self.migration is not None and not self.migration.arrived:
                head = (self._layer, VERBS.index("place"), rows, 0, 1, 0, self.epoch, 0)
                self._rounds[0].run(turn, x, slots, weights, head, self.migration)
            self.switch()

    def switch(self) -> None:
        """Between forwards: the next step to the new placement, if all of it has arrived."""
        if self.migration is None or not self.migration.arrived:
            return
        self._all_streams()
        self.placement = self.migration.switch()
        for rounds in self._rounds:
            rounds.place(self.placement)
        self._all_streams()
        self.epoch += 1
        if self.migration.done:
            self.migration = None

    def refuse_load(self) -> None:
        """``EpmoeError`` while experts move: what arrives would be slots of the older weights."""
        if self.migration is not None:
            raise EpmoeError(
                f"rank {self._runtime.group.rank}: layer {self._layer} ({self._config.name}) is "
                "moving experts: load again when `moving` is False"
            )

    def refuse_capture(self) -> None:
        """``EpmoeError`` while experts move and a graph is being captured."""
        on_gpu = self._runtime.device.type != "cpu" and self.migration is not None
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise EpmoeError(
                f"rank {self._runtime.group.rank}: layer {self._layer} ({self._config.name}) is "
                "moving experts: a capture would repeat the copies of one round for ever"
            )

    @cached_property
    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        x, ids, weights = nothing(self._config, self._runtime.device)
        return x, ids.int(), weights

    def _towards(self, placement: Placement, budget: int | None, verify: bool) -> Migration:
        if self._slots is None:
            self._slots = SlotBytes(self._weights)
        return Migration(
            self.placement,
            placement,
            self._slots,
            self._carrier(),
            rank=self._runtime.group.rank,
            most=self._config.freight // 2,
            budget=budget,
            verify=verify,
            settled=self._rounds[0].settled,
        )

    def _carrier(self) -> Carrier:
        """The heap's: layers that move at the same time take turns in one freight region."""
        runtime = self._runtime
        if runtime.carrier is None:
            runtime.carrier = self._rounds[0].carrier()
        return runtime.carrier

    def _all_streams(self) -> None:
        """Forwards may be on any stream; a switch comes after all or before all."""
        if self._runtime.device.type != "cpu":
            torch.cuda.synchronize()


def nothing(config: MoEConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch without rows."""
    return (
        torch.empty(0, config.hidden, dtype=DTYPE[config.dtype], device=device),
        torch.empty(0, config.choices, dtype=torch.int64, device=device),
        torch.empty(0, config.choices, dtype=torch.float32, device=device),
    )
