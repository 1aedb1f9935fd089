"""Scores of experts in fp32, the same bits on every machine.

A router compares scores, so their last bit decides which expert a row goes to.  Libraries do not
agree on it: torch's CPU sigmoid gives other bits in its vector body than in its scalar tail, and
others again on a GPU.  Here every step is one IEEE operation in a written order; the kernel does
the same steps with intrinsics that forbid fusing and takes its constants from this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 32  # of a warp: fixes the order of the softmax sum

# exp(z) = 2**n * (1 + r + r*r*q(r)), n = round(z / ln 2), |r| <= ln2 / 2.  EXP_Q is a minimax fit
# (relative error 3e-9 before rounding); LN2_HIGH has 9 bits, so that n * LN2_HIGH is exact.
EXP_LIMIT = 87.0  # flat beyond: 2**n stays a normal number
EXP_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, ties to even
LOG2_E = float.fromhex("0x1.715476p+0")
LN2_HIGH = float.fromhex("0x1.63p-1")
LN2_LOW = float.fromhex("-0x1.bd0106p-13")
EXP_Q = tuple(
    map(
        float.fromhex,
        ("0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558f2p-5", "0x1.1239e2p-7", "0x1.6a2434p-10"),
    )
)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), within 2.5 units in the last place; NaN stays NaN."""
    return (exp(-x) + 1.0).reciprocal()


def exp(z: Tensor) -> Tensor:
    """e**z in fp32, within 1.1 units in the last place, the same bits everywhere.

    Below -87 and above 87 it stays at the value there.  Every line is one rounding: nothing may be
    fused (the kernel uses the intrinsics that forbid it), or scores of host and GPU part.
    """
    z = z.clamp(-EXP_LIMIT, EXP_LIMIT)
    n = (z * LOG2_E + EXP_ROUND) - EXP_ROUND
    r = (z - n * LN2_HIGH) - n * LN2_LOW
    q = torch.full_like(r, EXP_Q[-1])
    for c in reversed(EXP_Q[:-1]):
        q = q * r + c
    power = ((n.nan_to_num().int() + 127) << 23).view(torch.float32)
    return (r * r * q + r + 1.0) * power


def softmax(x_TE: Tensor, finite_TE: Tensor) -> Tensor:
    """Over the finite logits.  The sum: each lane its own run of experts, then lanes by halves."""
    T, E = x_TE.shape
    most_T1 = x_TE.masked_fill(~finite_TE, -torch.inf).amax(1, keepdim=True)
    e_TE = exp(x_TE - most_T1).masked_fill(~finite_TE, 0.0)
    run = -(-E // LANES)
    lanes = torch.nn.functional.pad(e_TE, (0, run * LANES - E)).view(T, LANES, run)
    sums = lanes[:, :, 0]
    for v in range(1, run):
        sums = sums + lanes[:, :, v]
    return e_TE / halved(sums)


def halved(x: Tensor) -> Tensor:
    """Sums of the rows, [T, 1], by adding the right half to the left: what shuffles in a warp do.

    >>> halved(torch.tensor([[1.0, 2.0, 4.0]]))     # (1 + 4) + (2 + 0)
    tensor([[7.]])
    """
    x = torch.nn.functional.pad(x, (0, LANES - x.shape[1]))
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def order(score: Tensor) -> Tensor:
    """Integers in the order of the floats; -0 equals +0.  Meaningless for NaN."""
    bits = score.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
