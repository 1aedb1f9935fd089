"""Experts that a checkpoint keeps together in one tensor, each gate in one with its up half."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.shards import Folder, Stored

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def expect(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shape and dtype as wanted; a float may come in another float dtype."""
    same = stored.dtype == dtype or (stored.dtype in FLOATS and dtype in FLOATS)
    if stored.shape != shape or not same:
        raise ValueError(
            f"{stored.name!r} in {stored.file} must be {dtype} of shape {shape}, "
            f"it is {stored.dtype} of shape {stored.shape}"
        )


def load_fused(
    source: Folder,
    stem: str,
    experts: Sequence[int],
    config: MoEConfig,
    weights: dict[str, Tensor],
) -> None:
    """Fill ``weights`` from ``stem``.gate_up_proj* and ``stem``.down_proj*.

    gpt-oss puts gate and up in turns (gate row 0, up row 0, gate row 1, ...) and alone has biases;
    every other family has the gate half first.  Plain weights may lie either way round, (out, in)
    or (in, out): the two shapes together leave no doubt, even where one of them is square.
    """
    e, h, i = config.experts, config.hidden, config.inner
    in_turns = config.bias
    turned = False
    layouts: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]
    if config.format == "mxfp4":
        layouts = [
            ("_blocks", "", (h // 32, 16), (i // 32, 16)),
            ("_scales", "_scale", (h // 32,), (i // 32,)),
        ]
    else:
        shapes = [source.find(f"{stem}.{name}").shape for name in ("gate_up_proj", "down_proj")]
        turned = shapes == [(e, h, 2 * i), (e, i, h)]
        layouts = [("", "", (h,), (i,))]
    for leaf, mine, first, second in layouts:
        up, down = source.find(f"{stem}.gate_up_proj{leaf}"), source.find(f"{stem}.down_proj{leaf}")
        w1, w3, w2 = (weights[name + mine] for name in ("w1", "w3", "w2"))
        expect(up, (e, h, 2 * i) if turned else (e, 2 * i, *first), w1.dtype)
        expect(down, (e, i, h) if turned else (e, h, *second), w2.dtype)
        for slot, expert in enumerate(experts):
            _part(source, up, expert, (w1[slot], w3[slot]), in_turns=in_turns, turned=turned)
            _part(source, down, expert, (w2[slot],), in_turns=False, turned=turned)
    if config.bias:
        up, down = source.find(f"{stem}.gate_up_proj_bias"), source.find(f"{stem}.down_proj_bias")
        b1, b3, b2 = (weights[name].unsqueeze(-1) for name in ("b1", "b3", "b2"))
        expect(up, (e, 2 * i), b1.dtype)
        expect(down, (e, h), b2.dtype)
        for slot, expert in enumerate(experts):
            _part(source, up, expert, (b1[slot], b3[slot]), in_turns=in_turns, turned=False)
            _part(source, down, expert, (b2[slot],), in_turns=False, turned=False)


def _part(
    source: Folder,
    stored: Stored,
    expert: int,
    outs: tuple[Tensor, ...],
    *,
    in_turns: bool,
    turned: bool,
) -> None:
    """One expert of ``stored`` into one matrix, or into gate and up, (out, in) each.

    Gate and up of height 2 lie as g0 u0 g1 u1 if ``in_turns``, else as g0 g1 u0 u1.
    """
    many, (height, width) = len(outs), outs[0].shape
    start = expert * many * height * width
    rows, across = (width, many * height) if turned else (many * height, width)
    done = 0
    for piece in source.pieces(stored, start, rows, across):
        # `line` runs along gate and up: columns of the piece if turned, else its rows.
        line = piece.T if turned else piece
        for k, out in enumerate(outs):
            if turned:
                half = line[k::many] if in_turns else line[k * height : (k + 1) * height]
                out[:, done : done + len(piece)] = half
            elif in_turns:
                out[done // many : (done + len(piece)) // many] = line[k::many]
            else:
                low, high = max(done, k * height), min(done + len(piece), (k + 1) * height)
                if low < high:
                    out[low - k * height : high - k * height] = line[low - done : high - done]
        done += len(piece)
