"""What a number format declares about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epmoe.config import MoEConfig

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """One tensor that every slot has; the loaded tensor has the slot axis in front of ``shape``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one slot.

        >>> SlotTensor("w1", (64, 16), torch.uint8).nbytes
        1024
        """
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowTensor:
    """One part of a row on the wire; the staged tensor has the row axis in front of ``shape``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one row: what the layout must reserve before it aligns."""
        return math.prod(self.shape) * self.dtype.itemsize


class Format(Protocol):
    """What each format module offers: pure functions, any number of slots and rows, also none.

    ``weights`` is what :func:`tensors` declares, each with the slot axis in front; ``rows`` is what
    :func:`wire` declares, each with the row axis in front.
    """

    def tensors(self, config: MoEConfig) -> tuple[SlotTensor, ...]:
        """Every per-slot tensor of a layer: what is loaded, and all that migration must move."""

    def agreed(self, config: MoEConfig) -> tuple[str, ...]:
        """Names of per-slot tensors that must be equal in all slots of all ranks."""

    def wire(self, config: MoEConfig) -> tuple[RowTensor, ...]:
        """The parts of a row as it travels."""

    def from_plain(
        self,
        config: MoEConfig,
        source: Mapping[str, Tensor],
        *,
        input_scale: Tensor | None = None,
        mid_scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Quantise plain (w1, w3, w2, biases).  Static scales are required or refused."""

    def stage_rows(
        self, config: MoEConfig, weights: Mapping[str, Tensor], x_TH: Tensor
    ) -> dict[str, Tensor]:
        """Rows in the dtype of the config -> their parts on the wire."""

    def open_rows(self, config: MoEConfig, rows: Mapping[str, Tensor]) -> Tensor:
        """Parts on the wire -> fp32 values as the first GEMM multiplies them."""

    def operands(
        self, config: MoEConfig, weights: Mapping[str, Tensor], slot: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(w1_IH, w3_IH or None, w2_HI) in fp32 as the GEMMs multiply them: before any alpha."""

    def alphas(
        self, config: MoEConfig, weights: Mapping[str, Tensor], slot: int
    ) -> tuple[Tensor, Tensor] | None:
        """fp32 factors of the two accumulators; None only for a format that has none."""

    def quantise_mid(
        self, config: MoEConfig, weights: Mapping[str, Tensor], slot: int, mid_TI: Tensor
    ) -> Tensor:
        """fp32 inner values -> the fp32 values that the second GEMM multiplies."""

    def dense(
        self, config: MoEConfig, weights: Mapping[str, Tensor], slot: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(w1_IH, w3_IH or None, w2_HI) in fp32 as real numbers: what the checkpoint means."""


def matrices(config: MoEConfig) -> tuple[tuple[str, int, int], ...]:
    """(name, out, in) of the matrices of one expert, in the order of use."""
    w1 = ("w1", config.inner, config.hidden)
    w3 = ("w3", config.inner, config.hidden)
    w2 = ("w2", config.hidden, config.inner)
    return (w1, w3, w2) if config.gated else (w1, w2)


def biases(config: MoEConfig) -> tuple[SlotTensor, ...]:
    """b1, b3, b2 in the dtype of the config, if it has biases."""
    if not config.bias:
        return ()
    return tuple(
        SlotTensor("b" + name[1:], (out,), DTYPE[config.dtype]) for name, out, _ in matrices(config)
    )


def check_weights(
    declared: tuple[SlotTensor, ...], weights: Mapping[str, Tensor], slots: int
) -> None:
    """``weights`` holds exactly the declared tensors, with ``slots`` in front of each shape."""
    names = {t.name for t in declared}
    if missing := sorted(names - weights.keys()):
        raise ValueError(f"weights lack {missing}; declared are {sorted(names)}")
    if unknown := sorted(weights.keys() - names):
        raise ValueError(f"weights have unknown {unknown}; declared are {sorted(names)}")
    for tensor in declared:
        got = weights[tensor.name]
        want = (slots, *tensor.shape)
        if tuple(got.shape) != want or got.dtype != tensor.dtype:
            raise ValueError(
                f"{tensor.name} must be {tensor.dtype} of shape {want}, "
                f"got {got.dtype} of shape {tuple(got.shape)}"
            )


def agreed_values(names: tuple[str, ...], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The one value that each named tensor has in all slots of this rank; ranks compare them."""
    found: dict[str, float] = {}
    for name in names:
        values = sorted(set(weights[name].tolist()))
        if len(values) != 1:
            raise ValueError(f"{name} must be equal in all slots, got {values}")
        found[name] = values[0]
    return found


def plain_parts(
    config: MoEConfig, source: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(matrices in fp32, biases in config.dtype) of plain weights, their names and shapes checked.

    The dtype of what comes in is free: a bf16 checkpoint and fp32 test data are equally plain.
    """
    wanted: dict[str, tuple[int, ...]] = {
        name: (out, inner) for name, out, inner in matrices(config)
    }
    wanted |= {t.name: t.shape for t in biases(config)}
    slots = len(source["w1"]) if "w1" in source else 0
    check_weights(
        tuple(SlotTensor(n, s, torch.float32) for n, s in wanted.items()),
        {name: value.float() for name, value in source.items()},
        slots,
    )
    floats = {name: source[name].float() for name, _, _ in matrices(config)}
    kept = {t.name: source[t.name].to(t.dtype).clone() for t in biases(config)}
    return floats, kept


def refuse_scales(config: MoEConfig, **scales: Tensor | None) -> None:
    """A static scale handed to a format that has none is an error, not a hint."""
    for name, scale in scales.items():
        if scale is not None:
            raise ValueError(
                f"{name} has no meaning for format {config.format!r} with "
                f"activations_in={config.activations_in!r}"
            )
