"""The formats once more, by loops over groups in numpy and ml_dtypes; shares no code with epmoe."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import torch

F32 = np.float32


def e4m3(value):
    """Saturating, NaN stays."""
    return np.clip(F32(value), F32(-448), F32(448)).astype(ml_dtypes.float8_e4m3fn)


def e2m1_code(values):
    """Codes 0 to 15; ml_dtypes stores one per byte."""
    kept = np.clip(np.asarray(values, F32), F32(-6), F32(6))
    return kept.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def packed(codes):
    out = np.zeros(len(codes) // 2, np.uint8)
    for i, code in enumerate(codes):
        out[i // 2] += int(code) << (4 * (i % 2))
    return out


def nvfp4_row(row, scale):
    """(packed, group scales, code * group scale) of one fp32 row; scale = largest / 2688."""
    n = F32(1) / F32(scale)
    codes, groups, values = [], [], []
    for at in range(0, len(row), 16):
        part = row[at : at + 16]
        group = e4m3(F32(F32(np.max(np.abs(part)) / F32(6)) * n))
        wide = F32(group)
        factor = F32(0) if wide == 0 else F32(n / wide)
        code = e2m1_code(part * factor)
        codes.append(code)
        groups.append(group)
        values.append(code.view(ml_dtypes.float4_e2m1fn).astype(F32) * wide)
    return packed(np.concatenate(codes)), np.array(groups), np.concatenate(values)


def mxfp4_row(row):
    """(packed, scale bytes, values) of one fp32 row."""
    codes, scales, values = [], [], []
    for at in range(0, len(row), 32):
        part = row[at : at + 32]
        largest = float(np.max(np.abs(part)))
        power = -127
        if largest > 0:
            power = max(-127, math.floor(math.log2(largest)) - 4)
            while 6.0 * 2.0**power < largest:
                power += 1
        code = e2m1_code((part.astype(np.float64) / 2.0**power).astype(F32))
        scale = np.array(2.0**power, F32).astype(ml_dtypes.float8_e8m0fnu)
        codes.append(code)
        scales.append(scale.view(np.uint8))
        values.append(code.view(ml_dtypes.float4_e2m1fn).astype(F32) * F32(2.0**power))
    return packed(np.concatenate(codes)), np.array(scales, np.uint8), np.concatenate(values)


def fp8_block(block):
    """(codes, scale) of the values that share one scale."""
    scale = F32(max(F32(np.max(np.abs(block))), F32(1e-4)) / F32(448))
    codes = np.clip(block / scale, F32(-448), F32(448)).astype(ml_dtypes.float8_e4m3fn)
    return codes, scale


def fp8_row(row):
    """(codes, scales, values) of one fp32 row, 128 values to a scale."""
    parts = [fp8_block(row[at : at + 128]) for at in range(0, len(row), 128)]
    values = [codes.astype(F32) * scale for codes, scale in parts]
    return (
        np.concatenate([c for c, _ in parts]),
        np.array([s for _, s in parts]),
        np.concatenate(values),
    )


def fp8_matrix(matrix):
    """(codes, scales, values) of a matrix, 128 x 128 values to a scale."""
    n, k = matrix.shape
    codes = np.zeros(matrix.shape, ml_dtypes.float8_e4m3fn)
    values = np.zeros(matrix.shape, F32)
    scales = np.zeros((math.ceil(n / 128), math.ceil(k / 128)), F32)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            at = np.s_[r * 128 : r * 128 + 128, c * 128 : c * 128 + 128]
            codes[at], scales[r, c] = fp8_block(matrix[at])
            values[at] = codes[at].astype(F32) * scales[r, c]
    return codes, scales, values


def wild_rows(rows, width, seed, low=-30, high=20):
    """fp32 rows over many powers of two, with zeros, exact ties and rows of zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)).astype(F32)
    x *= np.exp2(rng.integers(low, high, (rows, 1))).astype(F32)
    ties = rng.integers(-14, 15, (rows, width)).astype(F32) / 4  # halfway between codes at scale 1
    x = np.where(rng.random((rows, 1)) < 0.2, ties, x)
    x[rng.random((rows, width)) < 0.05] = 0
    x[rng.random(rows) < 0.02] = 0
    return x.astype(F32)


def same_bytes(tensor, array):
    """Equal as bytes: also the sign of zero and the kind of NaN."""
    return torch.equal(
        tensor.contiguous().view(torch.uint8).flatten(),
        torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()),
    )
