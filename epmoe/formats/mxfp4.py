"""MXFP4: E2M1 in groups of 32 along the input, one power of two (UE8M0) per group.

Bytes are as published by gpt-oss, (out, in / 2) with the even column in the low half.
Weight-only: rows and inner values stay in config.dtype.  Weight-and-activation: both are MXFP4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.formats import e2m1, plain, ue8m0
from epmoe.formats.declare import (
    RowTensor,
    SlotTensor,
    biases,
    matrices,
    plain_parts,
    refuse_scales,
)

GROUP = 32


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (..., K) -> packed (..., K / 2) and scale bytes (..., K / 32).

    scale = 2**ceil(log2(largest / 6)), so nothing saturates; code = e2m1(x / scale), the division
    being exact.  NaN and inf make their group NaN.

    >>> packed, scales = quantise(torch.full((1, 32), 12.0))
    >>> scales.tolist(), packed[0, 0].item()
    ([[128]], 119)
    """
    if x.shape[-1] % GROUP:
        raise ValueError(f"last axis must be a multiple of {GROUP}, got {tuple(x.shape)}")
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    scales = ue8m0.encode_e2m1(groups.abs().amax(-1))
    codes = e2m1.encode(groups * ue8m0.reciprocal(scales).unsqueeze(-1))
    return e2m1.pack(codes.flatten(-2)), scales


def dequantise(packed: Tensor, scales: Tensor) -> Tensor:
    """fp32 (..., K), exact."""
    values = e2m1.decode(e2m1.unpack(packed))
    return values * ue8m0.decode(scales).repeat_interleave(GROUP, -1)


def tensors(config: MoEConfig) -> tuple[SlotTensor, ...]:
    """Packed codes and scale bytes of each matrix, then the biases."""
    found: list[SlotTensor] = []
    for name, out, width in matrices(config):
        found.append(SlotTensor(name, (out, width // 2), torch.uint8))
        found.append(SlotTensor(name + "_scale", (out, width // GROUP), torch.uint8))
    return (*found, *biases(config))


agreed = plain.agreed


def wire(config: MoEConfig) -> tuple[RowTensor, ...]:
    """Weight-only: the row in config.dtype.  Else H / 2 bytes and H / 32 scale bytes."""
    if config.activations_in == "dtype":
        return plain.wire(config)
    return (
        RowTensor("rows", (config.hidden // 2,), torch.uint8),
        RowTensor("row_scales", (config.hidden // GROUP,), torch.uint8),
    )


def from_plain(
    config: MoEConfig,
    source: Mapping[str, Tensor],
    *,
    input_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantise every matrix along its input.  Groups have dynamic scales: no static ones."""
    refuse_scales(config, input_scale=input_scale, mid_scale=mid_scale)
    floats, kept = plain_parts(config, source)
    weights: dict[str, Tensor] = {}
    for name, value in floats.items():
        weights[name], weights[name + "_scale"] = quantise(value)
    return weights | kept


def stage_rows(config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor) -> dict[str, Tensor]:
    """Weight-only: the rows.  Else packed codes and scale bytes."""
    if config.activations_in == "dtype":
        return plain.stage_rows(config, weights, x_TH)
    packed, scales = quantise(x_TH.float())
    return {"rows": packed, "row_scales": scales}


def open_rows(config: MoEConfig, rows: Mapping[str, Tensor]) -> Tensor:
    """fp32 (T, H), exact."""
    if config.activations_in == "dtype":
        return plain.open_rows(config, rows)
    return dequantise(rows["rows"], rows["row_scales"])


def operands(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The matrices of one slot in fp32, exact (two bits and a power of two: exact in bf16 too)."""
    found = {
        name: dequantise(weights[name][slot], weights[name + "_scale"][slot])
        for name, _, _ in matrices(config)
    }
    return found["w1"], found.get("w3"), found["w2"]


alphas = plain.alphas


def quantise_mid(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int, mid_TI: Tensor
) -> Tensor:
    """Weight-only: to config.dtype.  Else to MXFP4 and back."""
    if config.activations_in == "dtype":
        return plain.quantise_mid(config, weights, slot, mid_TI)
    return dequantise(*quantise(mid_TI))


dense = operands
