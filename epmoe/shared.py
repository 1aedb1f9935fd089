"""The shared expert: a dense one that every rank holds and every token visits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from epmoe.config import MoEConfig
from epmoe.formats import DTYPE, SlotTensor
from epmoe.formats.expert import activate, expert


def shared_tensors(config: MoEConfig) -> tuple[SlotTensor, ...]:
    """What ``load`` wants beside the slots' tensors: in the dtype of the rows, whatever the format.

    Names are those of a plain expert with ``shared_`` in front; no slot axis.
    """
    if not config.shared_inner:
        return ()
    dtype, inner, hidden = DTYPE[config.dtype], config.shared_inner, config.hidden
    up = (SlotTensor("shared_w3", (inner, hidden), dtype),) if config.gated else ()
    return (
        SlotTensor("shared_w1", (inner, hidden), dtype),
        *up,
        SlotTensor("shared_w2", (hidden, inner), dtype),
    )


def shared_rows(config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor) -> Tensor | None:
    """The shared expert's part of every row in fp32; None if the layer has none.

    Rounded to the dtype of the rows once, like a routed result, and added unweighted.
    """
    if not config.shared_inner:
        return None
    if x_TH.is_cuda:
        return _bf16_rows(config, weights, x_TH)
    dense = replace(
        config, format="plain", bias=False, inner=config.shared_inner, weight_in="reduce"
    )
    slot = {name.removeprefix("shared_"): w[None] for name, w in weights.items()}
    return expert(dense, slot, 0, {"rows": x_TH}, x_TH.new_empty(0)).float()


def _bf16_rows(config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor) -> Tensor:
    """On a GPU: gate and up are rounded to bf16 by the library's GEMM, the rest as on the host."""
    gate = functional.linear(x_TH, weights["shared_w1"]).float()
    up = functional.linear(x_TH, weights["shared_w3"]).float() if config.gated else None
    mid = activate(config, gate, up).to(x_TH.dtype)
    return functional.linear(mid, weights["shared_w2"]).float()
