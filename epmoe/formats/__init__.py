"""How a weight or a row is written down.

A format is a module of pure functions (:class:`Format` lists them).  The rounds of an expert, and
every place where a number is rounded, in order (``expert.py`` runs exactly this)::

    stage_rows    x in config.dtype -> wire; weight-only: no rounding
                                             weight-and-activation: to the format
    open_rows     wire -> fp32, exact (fp8: code * scale, one product)
    FC1           fp32 products and sums with operands(); operands are exact (fp8: one product)
    alpha, bias   acc * alpha1, then + b1 / b3, each one fp32 operation; plain, fp8, mxfp4: no alpha
    activation    clamp and activation in fp32
    router weight if weight_in == "fc2": one fp32 multiplication
    quantise_mid  weight-only: to config.dtype; weight-and-activation: to the format
    FC2           as FC1
    alpha, bias   acc * alpha2, then + b2 (times the router weight if weight_in == "fc2"), fp32
    result        one cast to config.dtype

Slot tensors keep torch's [out, in] orientation.  ``w1`` is the gate, or the only first matrix;
``w3`` is the up half and exists if the activation is gated; ``w2`` goes back to the hidden width.
"""

from __future__ import annotations

from epmoe.config import MoEConfig
from epmoe.formats import fp8, mxfp4, nvfp4, plain
from epmoe.formats.declare import DTYPE, Format, RowTensor, SlotTensor

__all__ = ["DTYPE", "Format", "RowTensor", "SlotTensor", "format_of"]


def format_of(config: MoEConfig) -> Format:
    """The module that knows the weights and rows of this config."""
    match config.format:
        case "plain":
            return plain
        case "fp8":
            return fp8
        case "mxfp4":
            return mxfp4
        case "nvfp4":
            return nvfp4
    raise ValueError(f"format {config.format!r} has no module in epmoe.formats")
