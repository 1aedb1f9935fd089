"""Projections around the experts, so that only the latent row travels."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from epmoe.config import MoEConfig
from epmoe.context import ForwardContext


class Layer(Protocol):
    """What is wrapped: a MoE whose config.hidden is the latent width."""

    @property
    def config(self) -> MoEConfig: ...

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        context: ForwardContext | None = None,
        lane: int = 0,
    ) -> Tensor: ...


class Shared(Protocol):
    """The shared expert: full-width rows in, full-width rows out."""

    def __call__(self, x: Tensor, *, context: ForwardContext | None) -> Tensor: ...


class Latent:
    """``y = up(sum over k of weight_k * expert_k(down(x))) + shared(x)``.

    The router has read ``x`` in full width before: ``ids`` and ``weights`` come from there.  The
    shared expert reads ``x`` in full width too, so one inside the layer is refused: it would be fed
    the latent row.  Every rank holds both projections whole; splitting them is not supported.
    Projecting after the sum is exact, because the sum is linear, and sends ``latent`` values per
    choice instead of ``hidden``: 1,024 instead of 4,096 for Nemotron-3 Super.  For the same reason
    ``up_bias`` is added once per row, never per choice.
    """

    def __init__(
        self,
        moe: Layer,
        *,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        shared: Shared | None = None,
    ) -> None:
        latent = moe.config.hidden
        if down.dim() != 2 or down.shape[0] != latent:
            raise ValueError(
                f"down must have shape (config.hidden = {latent}, full width), "
                f"got {tuple(down.shape)}"
            )
        self.hidden = down.shape[1]
        for name, value, shape in (
            ("up", up, (self.hidden, latent)),
            ("down_bias", down_bias, (latent,)),
            ("up_bias", up_bias, (self.hidden,)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if moe.config.shared_inner:
            raise ValueError(
                f"shared_inner must be 0 inside Latent, got {moe.config.shared_inner}: a shared "
                f"expert reads the full width; hand it over as shared"
            )
        self.moe = moe
        self.down, self.up, self.down_bias, self.up_bias = down, up, down_bias, up_bias
        self.shared = shared

    @property
    def config(self) -> MoEConfig:
        """The config of the layer inside: its hidden is the latent width."""
        return self.moe.config

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        context: ForwardContext | None = None,
        lane: int = 0,
    ) -> Tensor:
        """One forward of full-width rows; every rank calls it, also with none."""
        refused = self._refusal(x)
        z: Any = None if refused else functional.linear(x, self.down, self.down_bias)
        try:  # without rows the layer takes part empty, and refuses afterwards
            routed = self.moe(z, ids, weights, context=context, lane=lane)
        except Exception as error:
            if refused is None:
                raise
            raise refused from error
        y = functional.linear(routed, self.up, self.up_bias)
        if self.shared is None:
            return y
        full = self.shared(x, context=context)
        if full.shape != y.shape:
            raise ValueError(f"shared must return shape {tuple(y.shape)}, got {tuple(full.shape)}")
        return torch.add(y, full)

    def _refusal(self, x: Tensor) -> ValueError | TypeError | None:
        if not isinstance(x, Tensor):
            return TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.device != self.down.device:
            return ValueError(f"x must be on {self.down.device} like down, got {x.device}")
        if x.dtype != self.down.dtype and not torch.is_autocast_enabled(x.device.type):
            return TypeError(f"x must be {self.down.dtype} like down, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] != self.hidden:
            return ValueError(f"x must have shape (rows, {self.hidden}), got {tuple(x.shape)}")
        return None
