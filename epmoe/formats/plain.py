"""Weights and rows in the dtype of the config: fp32 or bf16, no scales."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.formats.declare import (
    DTYPE,
    RowTensor,
    SlotTensor,
    biases,
    matrices,
    plain_parts,
    refuse_scales,
)


def tensors(config: MoEConfig) -> tuple[SlotTensor, ...]:
    """w1 (I, H), w3 (I, H) if gated, w2 (H, I), then the biases."""
    found = tuple(SlotTensor(n, (o, i), DTYPE[config.dtype]) for n, o, i in matrices(config))
    return found + biases(config)


def agreed(config: MoEConfig) -> tuple[str, ...]:
    """Nothing is shared between slots."""
    return ()


def wire(config: MoEConfig) -> tuple[RowTensor, ...]:
    """A row travels as it is."""
    return (RowTensor("rows", (config.hidden,), DTYPE[config.dtype]),)


def from_plain(
    config: MoEConfig,
    source: Mapping[str, Tensor],
    *,
    input_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """One cast to the dtype of the config."""
    refuse_scales(config, input_scale=input_scale, mid_scale=mid_scale)
    floats, kept = plain_parts(config, source)
    return {name: value.to(DTYPE[config.dtype]) for name, value in floats.items()} | kept


def stage_rows(config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor) -> dict[str, Tensor]:
    """The rows themselves; a caller's fp32 rows are cast to the dtype of the config."""
    return {"rows": x_TH.to(DTYPE[config.dtype])}


def open_rows(config: MoEConfig, rows: Mapping[str, Tensor]) -> Tensor:
    """The rows in fp32, exact."""
    return rows["rows"].float()


def operands(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The matrices of one slot in fp32, exact."""
    w3 = weights["w3"][slot].float() if config.gated else None
    return weights["w1"][slot].float(), w3, weights["w2"][slot].float()


def alphas(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor] | None:
    """This format has none."""
    return None


def quantise_mid(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int, mid_TI: Tensor
) -> Tensor:
    """One rounding to the dtype of the config, as the kernel stores it between its two GEMMs."""
    return mid_TI.to(DTYPE[config.dtype]).float()


dense = operands
