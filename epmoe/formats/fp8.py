"""E4M3 with one fp32 scale per 128 x 128 weights and per 1 x 128 values of a row (DeepSeek-V3).

``w1_scale`` is the published ``weight_scale_inv``: value = code * scale.  Sizes that are no
multiple of 128 have a narrower last block.  Weight-only: rows and inner values stay in
config.dtype.  Weight-and-activation: both are E4M3 with a scale per 1 x 128.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.formats import e4m3, plain
from epmoe.formats.declare import (
    RowTensor,
    SlotTensor,
    biases,
    matrices,
    plain_parts,
    refuse_scales,
)

BLOCK = 128
FLOOR = 1e-4  # the largest size in a block is taken as at least this: no division by zero


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (..., K) -> codes (..., K) and fp32 scales (..., ceil(K / 128)).

    scale = max(FLOOR, largest) / 448; code = e4m3(x / scale).  NaN and inf make their block NaN.

    >>> codes, scales = quantise_rows(torch.tensor([[896.0, 1.0]]))
    >>> codes.float().tolist(), scales.tolist()
    ([[448.0, 0.5]], [[2.0]])
    """
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -size % BLOCK))
    padded = padded.reshape(*x.shape[:-1], blocks(size), BLOCK)
    scales = padded.abs().amax(-1).clamp_min(FLOOR) / e4m3.LARGEST
    codes = e4m3.encode(padded / scales.unsqueeze(-1))
    return codes.flatten(-2)[..., :size].contiguous(), scales


def dequantise_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of :func:`quantise_rows` up to its rounding: one fp32 multiplication."""
    return codes.float() * scales.repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]


def quantise_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (..., N, K) -> codes (..., N, K) and fp32 scales (..., ceil(N/128), ceil(K/128))."""
    n, k = w.shape[-2:]
    padded = torch.nn.functional.pad(w, (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = padded.reshape(*w.shape[:-2], blocks(n), BLOCK, blocks(k), BLOCK)
    scales = tiles.abs().amax((-3, -1)).clamp_min(FLOOR) / e4m3.LARGEST
    codes = e4m3.encode(tiles / scales[..., :, None, :, None])
    return codes.flatten(-2).flatten(-3, -2)[..., :n, :k].contiguous(), scales


def dequantise_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of :func:`quantise_blocks` up to its rounding: one fp32 multiplication."""
    n, k = codes.shape[-2:]
    wide = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return codes.float() * wide[..., :n, :k]


def blocks(size: int) -> int:
    """Scales along an axis.

    >>> blocks(1568)
    13
    """
    return -(-size // BLOCK)


def tensors(config: MoEConfig) -> tuple[SlotTensor, ...]:
    """Codes and scales of each matrix, then the biases."""
    found: list[SlotTensor] = []
    for name, out, width in matrices(config):
        found.append(SlotTensor(name, (out, width), torch.float8_e4m3fn))
        found.append(SlotTensor(name + "_scale", (blocks(out), blocks(width)), torch.float32))
    return (*found, *biases(config))


agreed = plain.agreed


def wire(config: MoEConfig) -> tuple[RowTensor, ...]:
    """Weight-only: the row in config.dtype.  Else H bytes and ceil(H / 128) fp32 scales."""
    if config.activations_in == "dtype":
        return plain.wire(config)
    return (
        RowTensor("rows", (config.hidden,), torch.float8_e4m3fn),
        RowTensor("row_scales", (blocks(config.hidden),), torch.float32),
    )


def from_plain(
    config: MoEConfig,
    source: Mapping[str, Tensor],
    *,
    input_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantise every matrix in 128 x 128 blocks.  Rows have dynamic scales: no static ones."""
    refuse_scales(config, input_scale=input_scale, mid_scale=mid_scale)
    floats, kept = plain_parts(config, source)
    weights: dict[str, Tensor] = {}
    for name, value in floats.items():
        weights[name], weights[name + "_scale"] = quantise_blocks(value)
    return weights | kept


def stage_rows(config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor) -> dict[str, Tensor]:
    """Weight-only: the rows.  Else codes and scales of 1 x 128."""
    if config.activations_in == "dtype":
        return plain.stage_rows(config, weights, x_TH)
    codes, scales = quantise_rows(x_TH.float())
    return {"rows": codes, "row_scales": scales}


def open_rows(config: MoEConfig, rows: Mapping[str, Tensor]) -> Tensor:
    """fp32 (T, H): code * scale."""
    if config.activations_in == "dtype":
        return plain.open_rows(config, rows)
    return dequantise_rows(rows["rows"], rows["row_scales"])


def operands(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The matrices of one slot in fp32: code * scale."""
    found = {
        name: dequantise_blocks(weights[name][slot], weights[name + "_scale"][slot])
        for name, _, _ in matrices(config)
    }
    return found["w1"], found.get("w3"), found["w2"]


alphas = plain.alphas


def quantise_mid(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int, mid_TI: Tensor
) -> Tensor:
    """Weight-only: to config.dtype.  Else to E4M3 with a scale per 1 x 128, and back."""
    if config.activations_in == "dtype":
        return plain.quantise_mid(config, weights, slot, mid_TI)
    return dequantise_rows(*quantise_rows(mid_TI))


dense = operands
