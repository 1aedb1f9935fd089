"""E4M3 (fn): one byte, up to 448, normal from 2**-6, steps of 2**-9 below, NaN but no infinity."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0


def encode(x: Tensor) -> Tensor:
    """fp32 -> float8_e4m3fn: nearest, ties to even, saturating at 448 also for inf; NaN stays NaN.

    torch 2.13 saturates by itself but does not promise it; the clamp does.

    >>> encode(torch.tensor([500.0, 17.0, 2.0**-10])).float().tolist()
    [448.0, 16.0, 0.0]
    """
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
