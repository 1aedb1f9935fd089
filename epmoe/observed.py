"""The loads of a layer: what its rounds have counted, forward by forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epmoe.rounds import Rounds
from epmoe.sched.loads import Loads


class Observed:
    """One window for every lane; equal on all ranks that begin its forwards at the same places."""

    def __init__(self, experts: int, rounds: Sequence[Rounds], *, queued: bool) -> None:
        """``queued``: rounds run later, on a GPU, and are asked for what they have counted."""
        self._rounds, self._queued = rounds, queued
        self._seen = [Loads(experts=experts) for _ in rounds]
        self._before = [torch.zeros(experts, dtype=torch.int64, device="cpu") for _ in rounds]

    def begin(self, lane: int) -> None:
        """What this lane has counted since the last time is one forward of the window."""
        total_E = self._rounds[lane].counted()
        self._seen[lane] = self._seen[lane].observe(total_E - self._before[lane])
        self._before[lane] = total_E

    def observe(self) -> Tensor:
        """The window after the same for all lanes; a host's rounds have done it by themselves."""
        if self._queued:
            for lane in range(len(self._rounds)):
                self.begin(lane)
        return _summed(self._seen)

    def loads(self) -> Tensor:
        """The window, and with it what was counted since; changes nothing, so one rank may ask."""
        seen = self._seen
        if self._queued:
            since = zip(seen, self._rounds, self._before, strict=True)
            seen = [one.observe(rounds.counted() - before) for one, rounds, before in since]
        return _summed(seen)

    def remember(self, window: int, decay: float) -> None:
        """Another window, and nothing in it."""
        new = Loads(experts=self._seen[0].experts, window=window, decay=decay)
        self.observe()
        self._seen = [new for _ in self._seen]


def _summed(lanes: Sequence[Loads]) -> Tensor:
    return torch.stack([one.loads_E for one in lanes]).sum(0)
