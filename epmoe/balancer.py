"""Ties loads, planning and migration together: off unless a caller makes one and steps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epmoe.accept import check_budget
from epmoe.config import check_count
from epmoe.moe import MoE
from epmoe.sched.balance import max_over_mean, rebalance


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceRule:
    """When experts move.  Equal on all ranks: every rank decides by itself, and all alike."""

    interval: int = 100  # steps between two looks at the loads
    window: int = 1000  # forwards that a look takes into account
    decay: float = 1.0  # weight of a forward relative to the next newer one
    threshold: float = 1.1  # max/mean rank load that is good enough to leave things as they are
    enough: float | None = 1.02  # max/mean at which a plan stops moving slots; see ``rebalance``
    gain: float = 0.05  # a plan must lower max/mean by this much to be worth moving for
    # Bytes out of and into a rank per forward while experts move; None: half of the freight.
    budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "window"):
            check_count(name, getattr(self, name), 1)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        for name in ("threshold", "enough"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1 (perfect balance), got {value}")
        if not self.gain >= 0:
            raise ValueError(f"gain must be at least 0, got {self.gain}")


class Balancer:
    """Watches the layers of one model and lets them move their experts.

    Decisions come from ``MoE.loads``, which are the same numbers on every rank, so no rank ever
    acts alone; ``MoE.place`` checks that all the same.  A layer that is still moving is left alone.
    """

    def __init__(self, layers: Sequence[MoE], rule: BalanceRule) -> None:
        self.layers, self.rule = tuple(layers), rule
        for moe in self.layers:
            check_budget(moe.config, self._budget(moe))  # now, not when experts must move
        for moe in self.layers:
            moe.remember(window=rule.window, decay=rule.decay)
        self.steps = 0
        self.moved = 0  # placements asked for so far

    def step(self) -> None:
        """After the forwards of one step, on every rank.  Collective in the steps that move."""
        self.steps += 1
        if self.steps % self.rule.interval:
            return
        for moe in self.layers:
            self._look(moe)

    def _budget(self, moe: MoE) -> int:
        return moe.config.freight // 2 if self.rule.budget is None else self.rule.budget

    def _look(self, moe: MoE) -> None:
        loads_E, current = moe.observe(), moe.placement
        if moe.moving or not bool(loads_E.any()):
            return
        now = max_over_mean(loads_E, [current])[0]
        if now <= self.rule.threshold:
            return
        better = rebalance(
            loads_E, moe.config, current.ranks, current=current, enough=self.rule.enough
        )
        if now - max_over_mean(loads_E, [better])[0] < self.rule.gain:
            return
        moe.place(better, budget=self._budget(moe))
        self.moved += 1


def describe_loads(layers: Sequence[MoE]) -> dict[str, Any]:
    """What a running job knows, as ``epmoe balance`` reads it: write it with ``json.dump``.

    The layers' loads and placements, a line each, and the ranks; the same on every rank.  Layers
    must have equally many experts and slots: describe others by themselves.
    """
    shapes = {(moe.config.experts, moe.config.places) for moe in layers}
    if len(shapes) != 1:
        raise ValueError(
            f"layers must be at least one, all of as many (experts, slots), got {sorted(shapes)}"
        )
    return {
        "loads": [moe.loads().tolist() for moe in layers],
        "ranks": layers[0].placement.ranks,
        "placement": [list(moe.placement.expert_of_S) for moe in layers],
    }
