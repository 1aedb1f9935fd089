"""E2M1: four bits, the values 0 0.5 1 1.5 2 3 4 6 and their negatives, two to a byte.

The code of a value is its place in that list, plus 8 if negative.  There is no NaN and no infinity;
whoever uses E2M1 carries NaN in the scale of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(x: Tensor) -> Tensor:
    """fp32 -> codes (uint8, one each): nearest, ties to the even code, saturating at 6.

    The sign of zero is kept, as the GPU's conversion does.

    >>> encode(torch.tensor([2.5, -5.0, 7.0, -0.0])).tolist()
    [4, 14, 7, 8]
    """
    size = x.abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    # A tie goes down where the lower code is even: to 0, 1, 2, 4; and up to 1, 2, 4 elsewhere.
    for border in (0.25, 1.25, 2.5, 5.0):
        code += size > border
    for border in (0.75, 1.75, 3.5):
        code += size >= border
    return code


def decode(codes: Tensor) -> Tensor:
    """Codes -> fp32, exact."""
    table = torch.tensor(
        VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=codes.device
    )
    return table[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """(..., K) codes -> (..., K / 2) bytes, the even column in the low half.

    >>> pack(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)).tolist()
    [[33, 243]]
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"codes must have an even last axis, got {tuple(codes.shape)}")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
