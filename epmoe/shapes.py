"""MoE layers of published models by name: their routed experts, as a config."""

from __future__ import annotations

from typing import Any

from epmoe.config import MoEConfig

SHAPES: dict[str, dict[str, Any]] = {
    "dsv3": {"hidden": 7168, "inner": 2048, "experts": 256, "choices": 8},
    "qwen3-235b": {"hidden": 4096, "inner": 1536, "experts": 128, "choices": 8},
    "qwen3-30b": {"hidden": 2048, "inner": 768, "experts": 128, "choices": 8},
    "mixtral": {"hidden": 4096, "inner": 14336, "experts": 8, "choices": 2},
    "gpt-oss": {"hidden": 2880, "inner": 2880, "experts": 128, "choices": 4}
    | {"activation": "gpt_oss", "bias": True, "clamp": 7.0},
    "kimi-k2": {"hidden": 7168, "inner": 2048, "experts": 384, "choices": 8},
}


def shape(name: str, **fields: Any) -> MoEConfig:
    """The layer called ``name``; ``fields`` (``max_rows`` at least) complete or replace.

    Without the shared expert that dsv3 and kimi-k2 have: published times leave it out.

    >>> shape("qwen3-30b", max_rows=64).inner
    768
    """
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    return MoEConfig(**{"name": name} | SHAPES[name] | fields)
