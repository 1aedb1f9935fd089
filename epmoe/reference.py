"""The same answer by a loop over experts: the oracle of every test.

Shares no code with the ops.  A GEMM row may depend on how many rows were in its batch, so an
expert gets the rows the ops give it: those of one round, in the order (rank, token, choice).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from epmoe.config import MoEConfig


def reference_moe(
    x_RTH: Sequence[Tensor],
    ids_RTK: Sequence[Tensor],
    weights_RTK: Sequence[Tensor],
    experts: Mapping[str, Tensor],
    config: MoEConfig,
) -> list[Tensor]:
    """What each rank gets back from one round; one entry per rank, row counts may differ.

    ``experts`` are plain weights of all logical experts: ``w1``, ``w3`` (E, I, H), ``w2`` (E, H,
    I), ``b1``, ``b3``, ``b2``, and ``shared_w1``, ``shared_w3``, ``shared_w2`` without the E axis.

    >>> one = MoEConfig(experts=1, choices=1, hidden=1, inner=1, max_rows=1, activation="relu2",
    ...                 dtype="fp32")
    >>> w = {"w1": torch.full((1, 1, 1), 3.0), "w2": torch.full((1, 1, 1), 2.0)}
    >>> reference_moe([torch.ones(1, 1)], [torch.zeros(1, 1).int()], [torch.ones(1, 1)], w, one)
    [tensor([[18.]])]
    """
    if config.format != "plain":
        raise ValueError(f"reference_moe computes plain weights, got format {config.format!r}")
    dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    x_NH = torch.cat([x.repeat_interleave(config.choices, 0) for x in x_RTH])
    ids_N = torch.cat([ids.reshape(-1) for ids in ids_RTK])
    weights_N = torch.cat([weights.reshape(-1) for weights in weights_RTK])

    terms_NH = x_NH.new_zeros(len(x_NH), config.hidden, dtype=torch.float32)
    for e in range(config.experts):
        of_N = torch.nonzero(ids_N == e).flatten()
        if len(of_N):
            of_e = {name: w[e] for name, w in experts.items() if not name.startswith("shared_")}
            early = weights_N[of_N] if config.weight_in == "fc2" else None
            terms_NH[of_N] = _expert(x_NH[of_N], of_e, config, dtype, early)

    outs, at = [], 0
    for x_TH, ids_TK, weights_TK in zip(x_RTH, ids_RTK, weights_RTK, strict=True):
        rows, choices = ids_TK.shape
        out_TH = x_TH.new_zeros(rows, config.hidden, dtype=torch.float32)
        for k in range(choices):
            term_TH = terms_NH[at : at + rows * choices][k::choices]
            if config.weight_in == "reduce":
                term_TH = weights_TK[:, k].unsqueeze(1) * term_TH
            out_TH = out_TH + term_TH.masked_fill((ids_TK[:, k] < 0).unsqueeze(1), 0.0)
        if config.shared_inner:
            shared = {n[7:]: w for n, w in experts.items() if n.startswith("shared_")}
            out_TH = out_TH + _expert(x_TH, shared, config, dtype, None)
        outs.append(out_TH.to(dtype))
        at += rows * choices
    return outs


def _expert(
    x_MH: Tensor,
    w: Mapping[str, Tensor],
    config: MoEConfig,
    dtype: torch.dtype,
    early: Tensor | None,
) -> Tensor:
    """fp32 throughout, rounded to ``dtype`` between the GEMMs and at the end."""
    gate = torch.mm(x_MH.float(), w["w1"].float().t())
    if "b1" in w:
        gate = gate + w["b1"].float()
    gate = torch.where(gate > config.clamp, gate.new_tensor(config.clamp), gate)
    if "w3" in w:
        up = torch.mm(x_MH.float(), w["w3"].float().t())
        if "b3" in w:
            up = up + w["b3"].float()
        if math.isfinite(config.clamp):
            limit = up.new_tensor(config.clamp)
            up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    if config.activation == "swiglu":
        mid = torch.nn.functional.silu(gate) * up
    elif config.activation == "geglu":
        mid = torch.nn.functional.gelu(gate) * up
    elif config.activation == "gpt_oss":
        mid = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    elif config.activation == "gelu":
        mid = torch.nn.functional.gelu(gate)
    else:
        mid = torch.relu(gate) ** 2
    if early is not None:
        mid = mid * early.unsqueeze(1)
    y = torch.mm(mid.to(dtype).float(), w["w2"].float().t())
    if "b2" in w:
        b2 = w["b2"].float()
        y = y + (b2 if early is None else b2 * early.unsqueeze(1))
    return y.to(dtype).float()
