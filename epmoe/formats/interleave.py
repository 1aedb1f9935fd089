"""Gate and up rows in one matrix, a group of each in turn.

``group`` 1 is gpt-oss, 8 and 16 are kernels that want a gate value and its up value in one tile,
``group`` = I is the gate half before the up half.  Weights, their scales and biases have to be put
in the same order; only then is one byte-equal to the other after a round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interleave(gate: Tensor, up: Tensor, group: int, axis: int = -2) -> Tensor:
    """I gate rows and I up rows along ``axis`` -> 2 I rows: gate group, up group, gate group, ...

    >>> interleave(torch.arange(4), torch.arange(10, 14), 2, axis=0).tolist()
    [0, 1, 10, 11, 2, 3, 12, 13]
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike, got {gate.dtype} {tuple(gate.shape)} "
            f"and {up.dtype} {tuple(up.shape)}"
        )
    inner = _groups(gate.shape[axis], group)
    rest = gate.movedim(axis, 0).shape[1:]
    halves = [half.movedim(axis, 0).reshape(inner, group, *rest) for half in (gate, up)]
    both = torch.stack(halves, 1).reshape(2 * inner * group, *rest)
    return both.movedim(0, axis).contiguous()


def split(both: Tensor, group: int, axis: int = -2) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`interleave`: (gate, up)."""
    if both.shape[axis] % 2:
        raise ValueError(f"both must have an even axis {axis}, got {tuple(both.shape)}")
    inner = _groups(both.shape[axis] // 2, group)
    rows = both.movedim(axis, 0)
    pairs = rows.reshape(inner, 2, group, *rows.shape[1:])
    gate, up = (pairs[:, k].reshape(inner * group, *rows.shape[1:]) for k in (0, 1))
    return gate.movedim(0, axis).contiguous(), up.movedim(0, axis).contiguous()


def _groups(inner: int, group: int) -> int:
    if group < 1 or inner % group:
        raise ValueError(f"group must divide the {inner} gate rows, got {group}")
    return inner // group
