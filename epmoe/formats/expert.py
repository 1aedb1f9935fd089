"""One expert on rows of any format, with every rounding in its place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from epmoe.config import MoEConfig
from epmoe.formats import format_of
from epmoe.formats.declare import DTYPE

GPT_OSS_SLOPE = 1.702


def activate(config: MoEConfig, gate: Tensor, up: Tensor | None) -> Tensor:
    """Clamp and activation, all in fp32, on real values (after alpha).

    gate <= clamp, on one side only; -clamp <= up <= clamp, where there is an up half.
    """
    gate = gate.clamp(max=config.clamp)
    if up is not None:
        up = up.clamp(-config.clamp, config.clamp)
    match (config.activation, up):
        case ("swiglu", Tensor()):
            return functional.silu(gate) * up
        case ("geglu", Tensor()):
            return functional.gelu(gate) * up
        case ("gpt_oss", Tensor()):
            return gate * torch.sigmoid(gate * GPT_OSS_SLOPE) * (up + 1)
        case ("gelu", None):
            return functional.gelu(gate)
        case ("relu2", None):
            return gate.relu().square()
    has = "without" if up is None else "with"
    raise ValueError(f"activation {config.activation!r} cannot be used {has} an up half")


def expert(
    config: MoEConfig,
    weights: Mapping[str, Tensor],
    slot: int,
    rows: Mapping[str, Tensor],
    row_weights_T: Tensor,
) -> Tensor:
    """The result rows of one slot, (T, H) in config.dtype.  T may be 0.

    ``rows`` are parts on the wire.  ``row_weights_T`` are the router weights of the rows, used here
    if config.weight_in is "fc2", else left to the reduce and not read.
    """
    form = format_of(config)
    x_TH = form.open_rows(config, rows)
    w1_IH, w3_IH, w2_HI = form.operands(config, weights, slot)
    factors = form.alphas(config, weights, slot)

    gate_TI = x_TH @ w1_IH.T
    up_TI = None if w3_IH is None else x_TH @ w3_IH.T
    if factors is not None:
        gate_TI = gate_TI * factors[0]
        up_TI = None if up_TI is None else up_TI * factors[0]
    if config.bias:
        gate_TI = gate_TI + weights["b1"][slot].float()
        up_TI = None if up_TI is None else up_TI + weights["b3"][slot].float()

    mid_TI = activate(config, gate_TI, up_TI)
    early = row_weights_T.float().unsqueeze(-1) if config.weight_in == "fc2" else None
    if early is not None:
        mid_TI = mid_TI * early
    mid_TI = form.quantise_mid(config, weights, slot, mid_TI)

    y_TH = mid_TI @ w2_HI.T
    if factors is not None:
        y_TH = y_TH * factors[1]
    if config.bias:
        b2_H = weights["b2"][slot].float()
        y_TH = y_TH + (b2_H if early is None else b2_H * early)
    return y_TH.to(DTYPE[config.dtype])
