"""NVFP4: E2M1 in groups of 16 along the input, an E4M3 scale per group, one fp32 scale per tensor.

One convention for every fp32 scale, ModelOpt's: scale = largest / 2688, a value is
code * group scale * scale.  ``input_scale`` is that of the rows: one per layer, equal on all ranks,
because a row is quantised before it is known which expert reads it.  ``mid_scale`` is that of the
inner values, per slot.  The GEMMs multiply code * group scale; what is left is a factor of the
accumulator, stored per slot so that what migrates is what is multiplied::

                             alpha1                          alpha2
    weight-only              scale of w1 and w3              scale of w2
    weight-and-activation    input_scale * scale of w1, w3   mid_scale * scale of w2
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.formats import e2m1, e4m3, plain
from epmoe.formats.declare import (
    RowTensor,
    SlotTensor,
    biases,
    matrices,
    plain_parts,
    refuse_scales,
)

GROUP = 16
SPAN = e2m1.LARGEST * e4m3.LARGEST  # 2688: the largest value at scale 1
SCALARS = ("alpha1", "alpha2", "input_scale", "mid_scale")
SMALLEST = 2.0**-100  # a scale below this has no fp32 reciprocal to work with


def quantise(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (..., K) and an fp32 scale -> packed (..., K / 2) and E4M3 group scales (..., K / 16).

    In fp32, each a single rounding: n = 1 / scale; group = e4m3((largest / 6) * n);
    code = e2m1(x * (n / group)), all 0 where group is 0.  Values above 2688 * scale saturate, also
    inf; NaN makes its group NaN.

    >>> packed, groups = quantise(torch.tensor([[0.5, -1.25] * 8]), torch.tensor(1.0))
    >>> groups.float().tolist(), e2m1.decode(e2m1.unpack(packed))[0, :2].tolist()
    ([[0.203125]], [2.0, -6.0])
    """
    if x.shape[-1] % GROUP:
        raise ValueError(f"last axis must be a multiple of {GROUP}, got {tuple(x.shape)}")
    n = scale.float().reciprocal()
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    groups = e4m3.encode(parts.abs().amax(-1) / e2m1.LARGEST * n)
    wide = groups.float()
    factor = torch.where(wide == 0, 0.0, n / wide)
    codes = e2m1.encode(parts * factor.unsqueeze(-1))
    return e2m1.pack(codes.flatten(-2)), groups


def dequantise(packed: Tensor, groups: Tensor) -> Tensor:
    """code * group scale in fp32, exact (6 bits: exact in bf16 too); without the tensor's scale."""
    values = e2m1.decode(e2m1.unpack(packed))
    return values * groups.float().repeat_interleave(GROUP, -1)


def scale_of(largest: Tensor) -> Tensor:
    """The fp32 scale that a tensor with this largest size is best written with; never 0.

    >>> scale_of(torch.tensor(2688.0)).item()
    1.0
    """
    return (largest.float() / SPAN).clamp_min(SMALLEST)


def require_scale(name: str, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A scale that exists, has this shape, and is finite and large enough to divide by."""
    if scale is None:
        raise ValueError(f"{name} is required: there is no value it could default to")
    if tuple(scale.shape) != shape or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} must be fp32 of shape {shape}, got {scale.dtype} {tuple(scale.shape)}"
        )
    if not bool(((scale >= SMALLEST) & torch.isfinite(scale)).all()):
        raise ValueError(f"{name} must be finite and at least 2**-100, got {scale.tolist()}")
    return scale


def requantise_to_shared(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Two matrices (packed, groups, scale) of unequal scales -> both at the larger one.

    The one with the smaller scale is written anew and loses a little; the other keeps its bytes.
    """
    shared = torch.maximum(first[2], second[2])

    def at_shared(packed: Tensor, groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if bool(scale == shared):
            return packed, groups
        return quantise(dequantise(packed, groups) * scale, shared)

    return at_shared(*first), at_shared(*second), shared


def tensors(config: MoEConfig) -> tuple[SlotTensor, ...]:
    """Packed codes and group scales of each matrix, alphas, static scales, then the biases."""
    found: list[SlotTensor] = []
    for name, out, width in matrices(config):
        found.append(SlotTensor(name, (out, width // 2), torch.uint8))
        found.append(SlotTensor(name + "_scale", (out, width // GROUP), torch.float8_e4m3fn))
    scalars = SCALARS if config.activations_in == "format" else SCALARS[:2]
    found += [SlotTensor(name, (), torch.float32) for name in scalars]
    return (*found, *biases(config))


def agreed(config: MoEConfig) -> tuple[str, ...]:
    """The scale that rows are written with on one rank and read with on another."""
    return ("input_scale",) if config.activations_in == "format" else ()


def wire(config: MoEConfig) -> tuple[RowTensor, ...]:
    """Weight-only: the row in config.dtype.  Else H / 2 bytes and H / 16 E4M3 group scales.

    >>> c = MoEConfig(experts=2, choices=1, hidden=1568, inner=32, max_rows=1, format="nvfp4",
    ...               activations_in="format")
    >>> [part.nbytes for part in wire(c)]
    [784, 98]
    """
    if config.activations_in == "dtype":
        return plain.wire(config)
    return (
        RowTensor("rows", (config.hidden // 2,), torch.uint8),
        RowTensor("row_scales", (config.hidden // GROUP,), torch.float8_e4m3fn),
    )


def assemble(
    config: MoEConfig,
    parts: Mapping[str, Tensor],
    *,
    first_scale: Tensor,
    second_scale: Tensor,
    input_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Codes and group scales plus the fp32 scales (one per slot each) -> weights with alphas.

    ``first_scale`` is that of w1 and w3, ``second_scale`` that of w2; ``input_scale`` (one value)
    and ``mid_scale`` (one per slot) are required for weight-and-activation, refused otherwise.
    """
    slots = len(parts["w1"])
    alpha1 = require_scale("first_scale", first_scale, (slots,))
    alpha2 = require_scale("second_scale", second_scale, (slots,))
    if config.activations_in == "dtype":
        refuse_scales(config, input_scale=input_scale, mid_scale=mid_scale)
        return {**parts, "alpha1": alpha1, "alpha2": alpha2}
    rows = require_scale("input_scale", input_scale, ())
    mids = require_scale("mid_scale", mid_scale, (slots,))
    return {
        **parts,
        "alpha1": rows * alpha1,
        "alpha2": mids * alpha2,
        "input_scale": rows.expand(slots).contiguous(),
        "mid_scale": mids,
    }


def from_plain(
    config: MoEConfig,
    source: Mapping[str, Tensor],
    *,
    input_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantise with the best scale per slot, one for w1 and w3 together and one for w2."""
    floats, kept = plain_parts(config, source)
    slots = len(floats["w1"])
    first = floats["w1"].new_zeros(slots)
    for name in ("w1", "w3") if config.gated else ("w1",):
        first = torch.maximum(first, floats[name].abs().amax((1, 2)))
    scales = {"w1": scale_of(first), "w2": scale_of(floats["w2"].abs().amax((1, 2)))}
    scales["w3"] = scales["w1"]
    parts: dict[str, Tensor] = {}
    for name, value in floats.items():
        parts[name], parts[name + "_scale"] = quantise(value, scales[name].view(-1, 1, 1))
    return assemble(
        config,
        parts | kept,
        first_scale=scales["w1"],
        second_scale=scales["w2"],
        input_scale=input_scale,
        mid_scale=mid_scale,
    )


def stage_rows(config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor) -> dict[str, Tensor]:
    """Weight-only: the rows.  Else packed codes and group scales, written at ``input_scale``."""
    if config.activations_in == "dtype":
        return plain.stage_rows(config, weights, x_TH)
    packed, groups = quantise(x_TH.float(), weights["input_scale"][0])
    return {"rows": packed, "row_scales": groups}


def open_rows(config: MoEConfig, rows: Mapping[str, Tensor]) -> Tensor:
    """fp32 (T, H): code * group scale; ``input_scale`` is part of alpha1."""
    if config.activations_in == "dtype":
        return plain.open_rows(config, rows)
    return dequantise(rows["rows"], rows["row_scales"])


def operands(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The matrices of one slot in fp32: code * group scale, exact; the rest is in the alphas."""
    found = {
        name: dequantise(weights[name][slot], weights[name + "_scale"][slot])
        for name, _, _ in matrices(config)
    }
    return found["w1"], found.get("w3"), found["w2"]


def alphas(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor] | None:
    """fp32 factors of the two accumulators; a KeyError if they were not loaded."""
    return weights["alpha1"][slot], weights["alpha2"][slot]


def quantise_mid(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int, mid_TI: Tensor
) -> Tensor:
    """Weight-only: to config.dtype.  Else to NVFP4 at the slot's ``mid_scale``, which alpha2 has.

    What comes back is then inner value / mid_scale.
    """
    if config.activations_in == "dtype":
        return plain.quantise_mid(config, weights, slot, mid_TI)
    return dequantise(*quantise(mid_TI, weights["mid_scale"][slot]))


def dense(
    config: MoEConfig, weights: Mapping[str, Tensor], slot: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The matrices as real numbers: operands times the scale of their tensor."""
    w1, w3, w2 = operands(config, weights, slot)
    first, second = weights["alpha1"][slot], weights["alpha2"][slot]
    if config.activations_in == "format":
        first = first / weights["input_scale"][slot]
        second = second / weights["mid_scale"][slot]
    return w1 * first, None if w3 is None else w3 * first, w2 * second
