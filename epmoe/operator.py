"""A forward as one operator, which torch.compile keeps whole."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from epmoe.context import ForwardContext
from epmoe.errors import EpmoeError


class Layer(Protocol):
    """What can be called as the operator; ``number`` is what ``enrolled`` gave it."""

    number: int

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        context: ForwardContext | None = None,
        lane: int = 0,
    ) -> Tensor: ...


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enrolled(layer: Layer) -> int:
    """The number by which a compiled graph finds this layer, for as long as the layer lives."""
    number = next(_numbers)
    _LAYERS[number] = layer
    return number


def forward(
    layer: Layer,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    context: ForwardContext | None,
    lane: int,
) -> Tensor:
    """The call of ``layer`` as an operator; row counts that change do not compile anew.

    (A number is a constant of the graph until it has had a second value, then an input.)
    """
    known: tuple[object, ...] = ()
    if context is not None:
        rows = None if context.rows is None else list(context.rows)
        place = [context.epoch, context.chunk, context.chunks]
        known = (context.phase, rows, place, context.capacity)
    out: Tensor = _forward(x, ids, weights, layer.number, lane, *known)
    return out


@torch.library.custom_op("epmoe::forward", mutates_args=())
def _forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    number: int,
    lane: int,
    phase: str | None = None,
    rows: list[int] | None = None,
    place: list[int] | None = None,
    capacity: int | None = None,
) -> Tensor:
    layer = _LAYERS.get(number)
    if layer is None:
        raise EpmoeError(f"layer {number} of this compiled graph is gone")
    context = None
    if phase is not None:
        epoch, chunk, chunks = place or (0, 0, 1)
        context = ForwardContext(
            phase=phase,
            rows=None if rows is None else tuple(rows),
            epoch=epoch,
            chunk=chunk,
            chunks=chunks,
            capacity=capacity,
        )
    return layer(x.detach(), ids, weights.detach(), context=context, lane=lane)


@_forward.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(context: object, gradient: Tensor) -> None:
    raise EpmoeError("epmoe computes forward only: its experts have no gradient")


_forward.register_autograd(_backward)
# Peers count on every rank's round: one whose result nobody reads must not be left out of a graph.
torch.fx.node.has_side_effect(torch.ops.epmoe.forward.default)
