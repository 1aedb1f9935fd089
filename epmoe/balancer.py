"""Ties loads, planning and migration together: off unless a caller makes one and steps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.moe import MoE
from epmoe.sched.balance import max_over_mean, rebalance


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceRule:
    """When experts move.  Equal on all ranks: every rank decides by itself, and all alike."""

    interval: int = 100  # steps between two looks at the loads
    threshold: float = 1.1  # max/mean rank load that is good enough to leave things as they are
    gain: float = 0.05  # a plan must lower max/mean by this much to be worth moving for
    budget: int = 1 << 20  # bytes out of and into a rank per forward while experts move

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if self.threshold < 1:
            raise ValueError(
                f"threshold must be at least 1 (perfect balance), got {self.threshold}"
            )
        if self.gain < 0:
            raise ValueError(f"gain must be at least 0, got {self.gain}")


class Balancer:
    """Watches the layers of one model and lets them move their experts.

    Decisions come from ``MoE.loads``, which are the same numbers on every rank, so no rank ever
    acts alone; ``MoE.place`` checks that all the same.  A layer that is still moving is left alone:
    its loads belong to a placement that is about to go.
    """

    def __init__(self, layers: Sequence[MoE], rule: BalanceRule) -> None:
        self.layers, self.rule = tuple(layers), rule
        self.steps = 0
        self.moved = 0  # placements asked for so far

    def step(self) -> None:
        """After the forwards of one step, on every rank.  Collective in the steps that move."""
        self.steps += 1
        if self.steps % self.rule.interval:
            return
        for moe in self.layers:
            self._look(moe)

    def _look(self, moe: MoE) -> None:
        loads_E, current = moe.loads(), moe.placement
        if moe.moving or not bool(loads_E.any()):
            return
        now = max_over_mean(loads_E, [current])[0]
        if now <= self.rule.threshold:
            return
        better = rebalance(loads_E, moe.config, current.ranks, current=current)
        if now - max_over_mean(loads_E, [better])[0] < self.rule.gain:
            return
        moe.place(better, budget=self.rule.budget)
        self.moved += 1
