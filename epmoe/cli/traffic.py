"""What the demo sends: layers, weights and skewed batches that every rank derives from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.context import ForwardContext
from epmoe.formats import DTYPE, SlotTensor, format_of
from epmoe.reference import reference_moe
from epmoe.sched.chunks import Chunks, plan_chunks
from epmoe.shared import shared_tensors

ZIPF = 1.1  # the r-th most wanted expert is wanted r ** -1.1 times as often as the first
UNUSED = 0.1  # choices that are -1
KINDS: tuple[dict[str, Any], ...] = (  # what tells the layers apart, in turn
    {},
    {"activation": "gpt_oss", "bias": True, "clamp": 7.0},
    {"dtype": "fp32", "activation": "geglu", "weight_in": "fc2"},
    {"activation": "relu2", "shared_inner": 64},
)


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward of all ranks.  With a context it may need several chunks, hence rounds."""

    layer: int
    x_R: tuple[Tensor, ...]
    ids_R: tuple[Tensor, ...]
    weights_R: tuple[Tensor, ...]
    context: ForwardContext | None

    def chunks(self, max_rows: int) -> Chunks:
        """The rounds of this forward; without a context it is one, whatever its rows."""
        rows_R = tuple(len(x) for x in self.x_R)
        return plan_chunks(rows_R, max_rows) if self.context else Chunks((rows_R,), max_rows)


def configs(layers: int, ranks: int) -> list[MoEConfig]:
    """Small layers of different kinds for one heap."""
    return [_config(layer, ranks, **KINDS[layer % len(KINDS)]) for layer in range(layers)]


def _config(layer: int, ranks: int, **kind: Any) -> MoEConfig:
    return MoEConfig(
        experts=4 * ranks,
        choices=4,
        hidden=256,
        inner=128,
        max_rows=48,
        open_s=60.0,
        name=f"demo {layer}",
        **kind,
    )


def weights_of(config: MoEConfig, seed: int) -> dict[str, Tensor]:
    """Plain weights of all experts, alike on every rank."""
    g = torch.Generator().manual_seed(seed)

    def draw(tensor: SlotTensor, *first: int) -> Tensor:
        scale = tensor.shape[-1] ** -0.5 if len(tensor.shape) > 1 else 1.0
        drawn = torch.randn(*first, *tensor.shape, generator=g)
        return (drawn * scale).to(tensor.dtype)

    routed = {t.name: draw(t, config.experts) for t in format_of(config).tensors(config)}
    return routed | {t.name: draw(t) for t in shared_tensors(config)}


def slots_of(weights: dict[str, Tensor], config: MoEConfig, rank: int, ranks: int) -> Any:
    """The part of ``weights`` that ``rank`` loads: its own slots, and all of the shared expert."""
    each = config.slots_per_rank(ranks)
    mine = slice(rank * each, (rank + 1) * each)
    return {n: w if n.startswith("shared_") else w[mine] for n, w in weights.items()}


def batch(configs: Sequence[MoEConfig], ranks: int, seed: int, number: int) -> Batch:
    """Forward ``number`` of this seed.

    One rank in eight comes with no row at all; one forward in four may bring more rows than a round
    holds; experts are chosen by Zipf's law, each layer with favourites of its own.
    """
    g = torch.Generator().manual_seed(1_000_003 * seed + number)
    layer = number % len(configs)
    config = configs[layer]
    chunked = float(torch.rand((), generator=g)) < 0.25
    most = 5 * config.max_rows // 2 if chunked else config.max_rows
    rows_R = torch.randint(0, most + 1, (ranks,), generator=g)
    rows_R[torch.rand(ranks, generator=g) < 0.125] = 0
    rows = rows_R.tolist()
    return Batch(
        layer,
        tuple(torch.randn(n, config.hidden, generator=g).to(DTYPE[config.dtype]) for n in rows),
        tuple(_ids(config, layer, n, g) for n in rows),
        tuple(torch.rand(n, config.choices, generator=g) for n in rows),
        ForwardContext(rows=tuple(rows)) if chunked else None,
    )


def _ids(config: MoEConfig, layer: int, rows: int, g: torch.Generator) -> Tensor:
    """Distinct experts per row, then a tenth of the choices left unused."""
    rank_E = torch.randperm(config.experts, generator=torch.Generator().manual_seed(layer)) + 1
    chance = torch.rand(rows, config.experts, generator=g).clamp(1e-9, 1 - 1e-7)
    gumbel = -torch.log(-torch.log(chance))  # the largest of log p + gumbel are a draw by p
    ids = (gumbel - ZIPF * torch.log(rank_E)).topk(config.choices).indices
    return ids.masked_fill(torch.rand(ids.shape, generator=g) < UNUSED, -1)


def expected(sent: Batch, config: MoEConfig, weights: dict[str, Tensor], rank: int) -> Tensor:
    """What ``rank`` must get back: the oracle, round by round."""
    chunks, ranks, outs = sent.chunks(config.max_rows), len(sent.x_R), []
    for chunk in range(chunks.count):
        spans = [chunks.span(chunk, r) for r in range(ranks)]
        x, ids, w = (
            [tensor[span] for tensor, span in zip(tensors, spans, strict=True)]
            for tensors in (sent.x_R, sent.ids_R, sent.weights_R)
        )
        outs.append(reference_moe(x, ids, w, weights, config)[rank])
    return torch.cat(outs)
