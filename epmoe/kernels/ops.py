"""The verbs of a round, whoever carries them out."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

HEAD_FIELDS = ("layer", "verb", "capacity", "chunk", "chunks", "phase", "epoch", "lane")
VERBS = ("forward", "place")


def forward_head(capacity: int) -> tuple[int, ...]:
    """The head of a forward in one chunk, of the heap's first layer on its first lane.

    >>> forward_head(64)
    (0, 0, 64, 0, 1, 0, 0, 0)
    """
    return (0, VERBS.index("forward"), capacity, 0, 1, 0, 0, 0)


class Ops(Protocol):
    """One layer's verbs on one lane of a heap.  Every verb belongs to the round it is given.

    ``reduce`` is the only one whose result the caller keeps.  What a verb returns to the next one
    (the asked rows, the plan) is private to the implementation.
    """

    def stage(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, head: tuple[int, ...], round: int
    ) -> None:
        """My rows into my slab, my counts and lists to every peer, then C to every peer."""

    def wait_plan(self, round: int, limit_s: float) -> Any:
        """All C of this round are in; counts and lists copied, checked, turned into offsets."""

    def pull(self, plan: Any) -> Any:
        """The rows that the plan names, read from the slabs of their owners."""

    def ffn(self, rows: Any, plan: Any) -> Tensor:
        """Both GEMMs and the activation of my slots on those rows, in the plan's order."""

    def push(self, y_NH: Tensor, plan: Any, round: int) -> None:
        """Each result into cell (token, choice) of its source, then Y to every peer."""

    def reduce(
        self,
        slots_TK: Tensor,
        weights_TK: Tensor,
        shared_TH: Tensor | None,
        round: int,
        limit_s: float,
    ) -> Tensor:
        """All Y of this round are in; the sum over choices, ascending, in fp32, cast once."""

    def close(self) -> None:
        """Drop every view of the heap."""
