"""The experts of this rank's slots out of a checkpoint as it was published.

=====================  ========  ============================================================
family                 format    names below ``...layers.N....experts.``
=====================  ========  ============================================================
Qwen3-MoE, DeepSeek    plain     ``E.gate_proj.weight`` ``E.up_proj.weight`` ``E.down_proj.weight``
Mixtral                plain     ``E.w1.weight`` (gate) ``E.w3.weight`` (up) ``E.w2.weight``
Nemotron               plain     ``E.up_proj.weight`` ``E.down_proj.weight``, no gate
gpt-oss in bf16        plain     ``gate_up_proj`` (E, H, 2I), gate and up in turns; ``down_proj``
                                 (E, I, H); ``gate_up_proj_bias`` ``down_proj_bias``
fused, no biases       plain     the same two, either way round, the gate half first
DeepSeek-V3            fp8       as DeepSeek, and ``weight_scale_inv`` beside each ``weight``
gpt-oss                mxfp4     ``gate_up_proj_blocks`` (E, 2I, H/32, 16) ``gate_up_proj_scales``
                                 (E, 2I, H/32), gate and up in turns; ``down_proj_*``; biases
ModelOpt               nvfp4     as DeepSeek, and ``weight_scale`` ``weight_scale_2``
                                 ``input_scale`` beside each ``weight``
=====================  ========  ============================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.formats import format_of, nvfp4
from epmoe.formats.declare import check_weights
from epmoe.shards import Folder
from epmoe.stacked import expect, load_fused

PROJECTIONS = (
    {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    {"w1": "w1", "w3": "w3", "w2": "w2"},
    {"w1": "up_proj", "w2": "down_proj"},
    {"w1": "w1", "w2": "w2"},
)
LEAVES = {
    "plain": {"weight"},
    "fp8": {"weight", "weight_scale_inv"},
    "nvfp4": {"weight", "weight_scale", "weight_scale_2"},
}
UNEQUAL = ("refuse", "requantise")


@dataclass(frozen=True, slots=True)
class Family:
    """How the experts of one layer are written in one folder."""

    stem: str  # what stands before the number of an expert, or before a fused name
    format: str
    names: dict[str, str]  # w1, w3, w2 -> projection; empty if all experts lie in one tensor
    bias: bool


def family_of(source: Folder, layer: int, *, within: str = "") -> Family:
    """Recognise the family of a layer by its names alone; no shard is opened.

    ``within`` tells apart several stacks of layers in one folder: a part of the name, as "mtp.".
    """
    pattern = re.compile(rf"(?P<stem>(?:.*\.)?layers\.{layer}\.(?:\w+\.)?experts)\.(?P<rest>.+)")
    found: dict[str, set[str]] = {}
    for name in source.names():
        # The substring first: an index has 90,000 names and a model 60 layers.
        if f"layers.{layer}." in name and within in name and (match := pattern.fullmatch(name)):
            found.setdefault(match["stem"], set()).add(re.sub(r"^\d+\.", "#.", match["rest"]))
    if not found:
        raise ValueError(f"{source.folder} has no experts in layer {layer}")
    if len(found) > 1:
        raise ValueError(
            f"{source.folder} has several layers {layer} with experts: {sorted(found)}; "
            f"name one by within"
        )
    [(stem, rests)] = found.items()
    if "gate_up_proj_blocks" in rests:
        return Family(stem, "mxfp4", {}, "gate_up_proj_bias" in rests)
    if "gate_up_proj" in rests:
        return Family(stem, "plain", {}, "gate_up_proj_bias" in rests)
    leaves = {rest.rsplit(".", 1)[-1] for rest in rests}
    for names in PROJECTIONS:
        if {f"#.{name}.weight" for name in names.values()} <= rests:
            for form, wanted in LEAVES.items():
                if leaves - {"bias", "input_scale"} == wanted:
                    return Family(stem, form, names, "bias" in leaves)
    raise ValueError(
        f"{source.folder}: experts under {stem!r} are of no known family: {sorted(rests)}"
    )


def load_experts(
    folder: str | Path | Folder,
    layer: int,
    experts: Sequence[int],
    config: MoEConfig,
    *,
    unequal_scales: str = "refuse",
    within: str = "",
) -> dict[str, Tensor]:
    """The declared tensors of the config's format; slot i holds expert ``experts[i]``.

    Reads the bytes of these experts, the headers of the shards they lie in, and for NVFP4 rows the
    ``input_scale`` of every expert of the layer (4 bytes each): their largest is the one scale that
    all ranks must write rows with.  Host memory: the result and about a megabyte.

    ``unequal_scales``: what to do if an NVFP4 expert has another ``weight_scale_2`` for its gate
    than for its up half: "refuse", or "requantise" the one with the smaller scale (which rounds).
    """
    if unequal_scales not in UNEQUAL:
        raise ValueError(f"unequal_scales must be one of {UNEQUAL}, got {unequal_scales!r}")
    if wrong := [e for e in experts if not 0 <= e < config.experts]:
        raise ValueError(f"experts must be 0 to {config.experts - 1}, got {wrong}")
    source = folder if isinstance(folder, Folder) else Folder(folder)
    family = family_of(source, layer, within=within)
    _fits(source, family, layer, config)
    declared = format_of(config).tensors(config)
    weights = {
        t.name: torch.empty(len(experts), *t.shape, dtype=t.dtype, device="cpu") for t in declared
    }
    stems = [f"{family.stem}.{expert}" for expert in experts]
    if not family.names:
        load_fused(source, family.stem, experts, config, weights)
    for slot, stem in enumerate(stems):
        for name, projection in family.names.items():
            _single(source, f"{stem}.{projection}", name, slot, weights)
    if config.format == "nvfp4":
        everyone = [f"{family.stem}.{expert}" for expert in range(config.experts)]
        names = family.names
        weights = _alphas(source, stems, everyone, config, names, weights, unequal_scales)
    check_weights(declared, weights, len(experts))
    return weights


def _fits(source: Folder, family: Family, layer: int, config: MoEConfig) -> None:
    """What the folder has is what the config says; nothing is dropped, nothing is made up."""
    has = {"format": family.format, "bias": family.bias}
    has["gated"] = not family.names or "w3" in family.names
    for name, value in has.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"config.{name} is {getattr(config, name)!r}, {source.folder} has "
                f"{value!r} experts in layer {layer} ({family.stem})"
            )


def _single(source: Folder, stem: str, name: str, slot: int, weights: dict[str, Tensor]) -> None:
    """One projection of one expert: codes, block scales, bias."""
    _copy(source, stem + ".weight", weights[name][slot])
    if name + "_scale" in weights:
        fp8 = weights[name].dtype == torch.float8_e4m3fn
        leaf = ".weight_scale_inv" if fp8 else ".weight_scale"
        _copy(source, stem + leaf, weights[name + "_scale"][slot])
    if (bias := "b" + name[1:]) in weights:
        _copy(source, stem + ".bias", weights[bias][slot])


def _copy(source: Folder, name: str, out: Tensor) -> None:
    """A whole tensor, straight into place; only a float in another float dtype goes by pieces."""
    stored = source.find(name)
    expect(stored, tuple(out.shape), out.dtype)
    if stored.dtype == out.dtype:
        source.read(stored, out)
        return
    flat, done = out.view(-1, out.shape[-1]), 0
    for piece in source.pieces(stored, 0, *flat.shape):
        flat[done : done + len(piece)] = piece
        done += len(piece)


def _scalar(source: Folder, name: str) -> Tensor:
    """One fp32, published with shape () or (1,)."""
    stored = source.find(name)
    expect(stored, stored.shape if stored.shape == (1,) else (), torch.float32)
    value = torch.empty(1, dtype=torch.float32, device="cpu")
    source.read(stored, value)
    return value[0]


def _alphas(
    source: Folder,
    stems: Sequence[str],
    everyone: Sequence[str],
    config: MoEConfig,
    names: Mapping[str, str],
    weights: dict[str, Tensor],
    unequal_scales: str,
) -> dict[str, Tensor]:
    """NVFP4: ``weights`` with alphas and static scales; gate and up brought to one scale.

    ``stems`` are the prefixes of the experts of the slots, ``everyone`` those of all experts.
    """
    firsts = [projection for name, projection in names.items() if name != "w2"]
    first_scale = torch.empty(len(stems), dtype=torch.float32, device="cpu")
    second_scale = torch.empty(len(stems), dtype=torch.float32, device="cpu")
    for slot, stem in enumerate(stems):
        scales = [_scalar(source, f"{stem}.{name}.weight_scale_2") for name in firsts]
        first_scale[slot] = scales[0]
        if scales[0] != scales[-1]:
            if unequal_scales == "refuse":
                raise ValueError(
                    f"{source.folder}: weight_scale_2 of {stem}.{firsts[0]} is {scales[0].item()}, "
                    f"of {firsts[-1]} {scales[-1].item()}; they share one accumulator scale: "
                    f"unequal_scales='requantise' brings both to the larger one"
                )
            pair = [
                (weights[name][slot], weights[name + "_scale"][slot], scale)
                for name, scale in zip(("w1", "w3"), scales, strict=True)
            ]
            *written, first_scale[slot] = nvfp4.requantise_to_shared(pair[0], pair[1])
            for name, (packed, groups) in zip(("w1", "w3"), written, strict=True):
                weights[name][slot] = packed
                weights[name + "_scale"][slot] = groups
        second_scale[slot] = _scalar(source, f"{stem}.{names['w2']}.weight_scale_2")
    parts = {k: v for k, v in weights.items() if k not in nvfp4.SCALARS}
    if config.activations_in == "dtype":
        return nvfp4.assemble(config, parts, first_scale=first_scale, second_scale=second_scale)
    of_rows = [_scalar(source, f"{s}.{name}.input_scale") for s in everyone for name in firsts]
    of_mids = [_scalar(source, f"{stem}.{names['w2']}.input_scale") for stem in stems]
    return nvfp4.assemble(
        config,
        parts,
        first_scale=first_scale,
        second_scale=second_scale,
        input_scale=torch.stack(of_rows).max(),
        mid_scale=torch.tensor(of_mids, dtype=torch.float32, device="cpu"),
    )
