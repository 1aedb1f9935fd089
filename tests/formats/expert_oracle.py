"""An expert in every format once more, from plain weights and rows; shares no number code.

It uses torch for the two matrix products and the activation: those are the same in every format,
and an fp32 sum has no exact definition but its order.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from number_oracle import F32, fp8_matrix, fp8_row, mxfp4_row, nvfp4_row

from epmoe.config import MoEConfig
from epmoe.formats import format_of
from epmoe.formats.declare import matrices

SLOTS, ROWS = 3, 6
MODES = ("dtype", "format")


def config(format_name, mode, **more):
    settings = {"hidden": 160, "inner": 96, "experts": 3, "choices": 2, "max_rows": 8} | more
    return MoEConfig(format=format_name, activations_in=mode, **settings)


def inputs(c, seed=0):
    """Plain weights of unequal size per slot, rows, router weights, static scales.

    The NVFP4 alphas that come of it are around 1e-7 and differ by factors of 3 and 9.
    """
    torch.manual_seed(seed)
    sizes = {"w1": [1.0, 3.0, 9.0], "w3": [1.0, 1.5, 2.0], "w2": [9.0, 3.0, 1.0]}
    plain = {n: torch.randn(SLOTS, out, width) / width**0.5 for n, out, width in matrices(c)}
    plain = {n: w * torch.tensor(sizes[n]).view(-1, 1, 1) for n, w in plain.items()}
    if c.bias:
        plain |= {"b" + n[1:]: torch.randn(SLOTS, out) for n, out, _ in matrices(c)}
    x = torch.randn(ROWS, c.hidden)
    x = x.bfloat16() if c.dtype == "bf16" else x
    scales = {}
    if format_of(c).agreed(c):
        scales["input_scale"] = torch.tensor(4.0 / 2688)
        scales["mid_scale"] = torch.tensor([20.0, 60.0, 30.0]) / 2688
    return plain, x, torch.rand(ROWS) + 0.1, scales


def rounded(array, c):
    if c.dtype == "fp32":
        return array.astype(F32)
    return array.astype(ml_dtypes.bfloat16).astype(F32)


def as_rows(function, matrix):
    return np.stack([function(row)[-1] for row in matrix]) if len(matrix) else matrix


def activations(c, array, scale):
    """fp32 rows -> what a GEMM multiplies."""
    if c.activations_in == "dtype" or c.format == "plain":
        return rounded(array, c)
    if c.format == "fp8":
        return as_rows(fp8_row, array)
    if c.format == "mxfp4":
        return as_rows(mxfp4_row, array)
    return as_rows(lambda row: nvfp4_row(row, scale), array)


def operands(c, matrix, scale):
    match c.format:
        case "plain":
            return rounded(matrix, c)
        case "fp8":
            return fp8_matrix(matrix)[-1]
        case "mxfp4":
            return as_rows(mxfp4_row, matrix)
    return as_rows(lambda row: nvfp4_row(row, scale), matrix)


def product(a, b):
    return (torch.from_numpy(a).clone() @ torch.from_numpy(b).clone().T).numpy()


def emulated(c, plain, slot, x, row_weights, scales):
    w = {name: value[slot].float().numpy() for name, value in plain.items()}
    largest = max(np.abs(w[n]).max() for n in ("w1", "w3") if n in w)
    first, second = F32(largest / F32(2688)), F32(np.abs(w["w2"]).max() / F32(2688))
    input_scale = scales["input_scale"].numpy() if scales else F32(1)
    mid_scale = scales["mid_scale"].numpy()[slot] if scales else F32(1)

    rows = activations(c, x.float().numpy(), input_scale)
    halves = []
    for name in ("w1", "w3") if "w3" in w else ("w1",):
        half = product(rows, operands(c, w[name], first))
        if c.format == "nvfp4":
            half = half * (F32(input_scale * first) if scales else first)
        if c.bias:
            half = half + rounded(w["b" + name[1:]], c)
        halves.append(torch.from_numpy(half))
    gate = halves[0].clamp(max=c.clamp)
    up = halves[1].clamp(-c.clamp, c.clamp) if len(halves) > 1 else None
    match c.activation:
        case "swiglu":
            mid = torch.nn.functional.silu(gate) * up
        case "geglu":
            mid = torch.nn.functional.gelu(gate) * up
        case "gpt_oss":
            mid = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        case "gelu":
            mid = torch.nn.functional.gelu(gate)
        case "relu2":
            mid = torch.relu(gate) ** 2
    mid = mid.numpy()
    early = row_weights.numpy()[:, None]
    if c.weight_in == "fc2":
        mid = mid * early
    y = product(activations(c, mid, mid_scale), operands(c, w["w2"], second))
    if c.format == "nvfp4":
        y = y * (F32(mid_scale * second) if scales else second)
    if c.bias:
        bias = rounded(w["b2"], c)
        y = y + (bias * early if c.weight_in == "fc2" else bias)
    return torch.from_numpy(rounded(y, c))
