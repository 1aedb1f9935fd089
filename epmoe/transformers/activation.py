"""Which activation a module of experts computes, found by asking it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

ALMOST_INFINITE = 1e6
UNCLAMPED = 1e4  # a clamp beyond this is none
CLOSE = 1e-9  # all is computed in float64; two activations that differ, differ by far more


class Act(NamedTuple):
    """What ``MoEConfig`` calls it, and how the stored columns of gate and up are ordered."""

    name: str
    clamp: float
    interleaved: bool


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate) * up


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# name → (the function, what its up half adds to the clamp it shows)
GATED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "swiglu": (_swiglu, 0.0),
    "geglu": (_geglu, 0.0),
    "gpt_oss": (_gpt_oss, 1.0),
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: x.relu().square(),
    "gelu": functional.gelu,
}


def activation_of(experts: nn.Module, *, gated: bool) -> Act:
    """The activation of ``experts``; a ``ValueError`` if it is none that epmoe computes.

    Names and attributes differ from model to model and from version to version, the numbers do not:
    the module's own function runs on a few chosen values, once, when the layer opens.
    """
    own: Any = getattr(experts, "_apply_gate" if gated else "act_fn", None)
    if own is None and gated:  # the first versions of the hook had no method for it
        inner: Any = experts.act_fn

        def own(both: Tensor) -> Tensor:
            gate, up = both.chunk(2, dim=-1)
            product: Tensor = inner(gate) * up
            return product

    if own is None:
        raise ValueError(f"experts must have act_fn, {type(experts).__name__} has none")
    with torch.no_grad():
        found = _gated(own) if gated else _ungated(own)
    if found is None:
        known = ", ".join(GATED if gated else UNGATED)
        raise ValueError(
            f"{type(experts).__name__} computes an activation that epmoe does not have; "
            f"it has {known}, each with a clamp or without"
        )
    return found


def _ungated(own: Callable[[Tensor], Tensor]) -> Act | None:
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for name, function in UNGATED.items():
        if _same(own(x), function(x)):
            return Act(name, math.inf, interleaved=False)
    return None


def _gated(own: Callable[[Tensor], Tensor]) -> Act | None:
    one, far = torch.ones(1, dtype=torch.float64), torch.full((1,), ALMOST_INFINITE).double()
    for name, (function, extra) in GATED.items():
        for interleaved in (False, True):
            # At gate 1 the result is linear in up until up is clamped: it shows where.
            shown = own(_pack(one, far, interleaved)) / function(one, one - extra)
            clamp = round(float(shown) - extra, 9)
            clamp = clamp if 0 < clamp < UNCLAMPED else math.inf
            reach = 20.0 if clamp == math.inf else 2 * clamp
            gate, up = torch.meshgrid(
                torch.linspace(-reach, reach, 41, dtype=torch.float64),
                torch.linspace(-reach, reach, 37, dtype=torch.float64),
                indexing="ij",
            )
            gate, up = gate.reshape(-1), up.reshape(-1)
            wanted = function(gate.clamp(max=clamp), up.clamp(-clamp, clamp))
            if _same(own(_pack(gate, up, interleaved)), wanted):
                return Act(name, clamp, interleaved)
    return None


def _pack(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """One row with the gate and up values in the stored order."""
    both = torch.stack((gate, up), 1) if interleaved else torch.stack((gate, up))
    return both.reshape(1, -1)


def _same(got: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(got.reshape(-1), wanted, rtol=CLOSE, atol=CLOSE))
