"""UE8M0: one byte b that stands for 2**(b - 127); 255 is NaN.  It is the exponent of an fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.formats import e2m1

NAN = 255


def encode_e2m1(largest: Tensor) -> Tensor:
    """Bytes of the smallest scales that bring each ``largest`` >= 0 to 6 or below.

    2**ceil(log2(largest / 6)) from the bits of the float, so no logarithm is rounded.  Zero gets
    byte 0; inf and NaN get NaN, because E2M1 could not show them.

    >>> encode_e2m1(torch.tensor([6.0, 6.1, 0.75, 0.0])).tolist()
    [127, 128, 124, 0]
    """
    mantissa, exponent = torch.frexp(largest.float())  # largest = mantissa * 2**exponent, >= 1/2
    # 6 is 0.75 * 2**3
    power = exponent - 3 + (mantissa > e2m1.LARGEST / 8).int()
    byte = (power + 127).clamp(0, NAN - 1)
    byte = torch.where(largest == 0, 0, byte)
    return torch.where(torch.isfinite(largest), byte, NAN).to(torch.uint8)


def decode(scales: Tensor) -> Tensor:
    """Bytes -> fp32, exact; byte 0 is the subnormal 2**-127.

    >>> decode(torch.tensor([127, 128, 120], dtype=torch.uint8)).tolist()
    [1.0, 2.0, 0.0078125]
    """
    bits = scales.int() << 23
    bits = torch.where(scales == 0, 1 << 22, bits)
    bits = torch.where(scales == NAN, 0x7FC00000, bits)
    return bits.int().view(torch.float32)


def reciprocal(scales: Tensor) -> Tensor:
    """1 / decode(scales), exact: 2**(127 - b); NaN for 255."""
    bits = (254 - scales.int()) << 23
    bits = torch.where(scales == 254, 1 << 22, bits)
    bits = torch.where(scales == NAN, 0x7FC00000, bits)
    return bits.int().view(torch.float32)
