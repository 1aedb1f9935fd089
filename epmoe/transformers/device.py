"""Where a model's experts are, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from epmoe.transformers.weights import Shape

DTYPES = {
    "cpu": {torch.float32: "fp32", torch.bfloat16: "bf16"},
    "cuda": {torch.bfloat16: "bf16"},
}
# Unless register was told.  4096 rows fill a GPU and hold any decode in one round; the row pools of
# a Qwen3-30B, which all its layers share, then take 0.5 GB on one rank.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"heap": "host", "max_rows": 1024},
    "cuda": {"heap": "cuda", "max_rows": 4096},
}
GRAIN = 64  # widths that a GPU's matrix kernels take are multiples of it


def device_of(shapes: Iterable[Shape]) -> torch.device:
    """The one device that all experts of a heap are on."""
    found = {shape.device for shape in shapes}
    if len(found) > 1 or next(iter(found)).type not in DTYPES:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"experts must be on one CPU or CUDA device, got {names}")
    return found.pop()


def fields_for(shape: Shape, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``MoEConfig`` that the device decides, and what ``register`` was told."""
    kind = shape.device.type
    if shape.dtype not in DTYPES[kind]:
        known = " or ".join(map(str, DTYPES[kind]))
        raise ValueError(f"experts on a {kind} device must be in {known}, got {shape.dtype}")
    if kind == "cuda" and (shape.hidden % GRAIN or shape.inner % GRAIN):
        raise ValueError(
            f"experts on a cuda device must have hidden and inner sizes that are multiples of "
            f"{GRAIN}, got {shape.hidden} and {shape.inner}"
        )
    fields = DEFAULTS[kind] | dict(options)
    if (fields["heap"] == "host") != (kind == "cpu"):
        raise ValueError(f"heap must fit experts on a {kind} device, got {fields['heap']!r}")
    return fields | {"dtype": DTYPES[kind][shape.dtype]}


def current(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, whatever tensors they are given."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing() -> bool:
    """Whether the current stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
