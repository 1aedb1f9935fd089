"""The experts that a transformers module holds, as the tensors of this rank's slots.

Nothing is copied: a slot is a view of the bytes that the module's parameters own.  ::

    stored                                       slots (w1 gate, w3 up, each (slots, inner, hidden))
    gate_up_proj (E, 2I, H)  one after the other  w1 = [:, :I]    w3 = [:, I:]
    gate_up_proj (E, 2I, H)  in turns             w1 = [:, ::2]   w3 = [:, 1::2]
    gate_up_proj (E, H, 2I)  transposed           turned to (E, 2I, H) slot by slot in its own bytes
    up_proj      (E, I, H)   no gate              w1 = all of it
    down_proj    (E, H, I), or (E, I, H) turned   w2 = all of it

On a GPU gate and up are one tensor, w13, in blocks of rows (``epmoe.interleave_``): they are moved
there within their own bytes, slot by slot.  Only biases, which are small, may be copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from epmoe import interleave_


class Stored(NamedTuple):
    """How a module writes its experts down; old versions lack some of these attributes."""

    gated: bool
    transposed: bool
    bias: bool


def stored_by(experts: nn.Module) -> Stored:
    """What the module says of itself; a ``ValueError`` for what epmoe has no arithmetic for."""
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"{type(experts).__name__} normalises after each expert; epmoe has no such step"
        )
    return Stored(
        gated=getattr(experts, "has_gate", True),
        transposed=getattr(experts, "is_transposed", False),
        bias=getattr(experts, "has_bias", False),
    )


class Shape(NamedTuple):
    """Slots of this rank, hidden and inner width, dtype, and where they are."""

    slots: int
    hidden: int
    inner: int
    dtype: torch.dtype
    device: torch.device


def shape_of(experts: nn.Module) -> Shape:
    """Read off ``down_proj``."""
    down = _local(experts, "down_proj")
    slots, a, b = down.shape
    hidden, inner = (b, a) if stored_by(experts).transposed else (a, b)
    return Shape(slots, hidden, inner, down.dtype, down.device)


def slots_of(
    experts: nn.Module, *, interleaved: bool, restride: bool, joined: bool = False
) -> dict[str, Tensor]:
    """``w1``, ``w3``, ``w2`` and the biases for ``MoE.load``.  Call it once for each module.

    Where the stored matrices are transposed they are turned in place, one slot at a time.  With
    ``restride`` the parameter then gets the strides under which it still reads as before; one that
    is spread over ranks must keep its strides, so it reads as nonsense from then on.

    ``joined`` (see ``laid_out``): gate and up come back as ``w13``, and ``gate_up_proj`` reads as
    nonsense, too.  With ``restride`` it gets a fourth dimension, so that no other implementation
    computes with it.
    """
    stored = stored_by(experts)
    up_name = "gate_up_proj" if stored.gated else "up_proj"
    with torch.no_grad():
        if isinstance(experts, FSDPModule):
            experts.reshard()  # inside a forward the parameters are FSDP's passing copies
        first, second = (
            _turned(experts, name, restride) if stored.transposed else _local(experts, name)
            for name in (up_name, "down_proj")
        )
        tensors = {"w2": second}
        if stored.bias:
            tensors["b2"] = _local(experts, "down_proj_bias").contiguous()
        both = {"w": first} | ({"b": _local(experts, up_name + "_bias")} if stored.bias else {})
        for letter, tensor in both.items():
            if joined:
                own = tensor if letter == "w" else tensor.clone()
                tensors[letter + "13"] = interleave_(own, in_turns=interleaved)
                continue
            halves = _halves(tensor, interleaved) if stored.gated else (tensor,)
            for name, half in zip("13", halves, strict=False):
                tensors[letter + name] = half if letter == "w" else half.contiguous()
        if joined and restride:
            parameter: Any = experts.gate_up_proj
            parameter.data = first.view(len(first), -1, 16, first.shape[2])
    return {name: tensor.detach() for name, tensor in tensors.items()}


def laid_out(experts: nn.Module) -> bool:
    """Whether loading moves gate and up to the places that a GPU's kernels read them from."""
    return stored_by(experts).gated and shape_of(experts).device.type == "cuda"


def _halves(both: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return both[:, ::2], both[:, 1::2]
    inner = both.shape[1] // 2
    return both[:, :inner], both[:, inner:]


def _turned(experts: nn.Module, name: str, restride: bool) -> Tensor:
    """(slots, a, b) as (slots, b, a), contiguous, in the same bytes."""
    stored = _local(experts, name)
    if not stored.is_contiguous():
        if stored.transpose(1, 2).is_contiguous():
            return stored.transpose(1, 2)  # turned before
        raise ValueError(f"{name} must be contiguous, got strides {stored.stride()}")
    slots, a, b = stored.shape
    turned = stored.view(slots, b, a)
    for slot in range(slots):
        turned[slot] = stored[slot].clone().T
    if restride:
        getattr(experts, name).data = turned.transpose(1, 2)
    return turned


def _local(experts: nn.Module, name: str) -> Tensor:
    """This rank's part of a parameter."""
    parameter = getattr(experts, name)
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    tensor: Tensor = parameter.data
    return tensor
