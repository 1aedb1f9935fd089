"""What every rank must get from one forward: the reference, chunk by chunk, slot by slot."""

from __future__ import annotations

from dataclasses import replace

import torch

from epmoe.formats import format_of
from epmoe.formats.expert import expert
from epmoe.reference import reference_moe
from epmoe.sched.chunks import Chunks, plan_chunks
from epmoe.sched.placement import Placement, choose_slots


def expected(step, config, weights, *, without=None):
    """One result per rank; ``without`` is a rank that was refused: its batch counts as empty.

    ``weights`` are those of all slots.  A GEMM row may depend on its batch, so replicas are experts
    of their own here: the rows of a slot are one batch.
    """
    ranks = len(step.x_R)
    where = Placement.linear(config.experts, config.places, ranks)
    of_slots = replace(config, experts=config.places, slots=0)
    slots_R = [choose_slots(ids, where, rank=rank) for rank, ids in enumerate(step.ids_R)]
    if step.context is None or step.context.rows is None:
        chunks = Chunks((tuple(map(len, step.x_R)),), config.max_rows)
    else:
        chunks = plan_chunks(step.context.rows, config.max_rows)
    parts = []
    for chunk in range(chunks.count):
        spans = [chunks.span(chunk, r) if r != without else slice(0, 0) for r in range(ranks)]
        batch = [
            [tensor[span] for tensor, span in zip(tensors, spans, strict=True)]
            for tensors in (step.x_R, slots_R, step.weights_R)
        ]
        compute = reference_moe if config.format == "plain" else by_format
        parts.append(compute(*batch, weights, of_slots))
    return [torch.cat(of_rank) for of_rank in zip(*parts, strict=True)]


def by_format(x_RTH, ids_RTK, weights_RTK, weights, config):
    """``reference_moe`` for quantised experts.

    The arithmetic is that of ``epmoe.formats``, which has oracles of its own; what is tested here
    is that its bytes travel: staging, records, grouping, cells and sums.
    """
    x_NH = torch.cat([x.repeat_interleave(config.choices, 0) for x in x_RTH])
    ids_N = torch.cat([ids.reshape(-1) for ids in ids_RTK])
    weights_N = torch.cat([weights.reshape(-1) for weights in weights_RTK])
    terms_NH = torch.zeros(len(x_NH), config.hidden)
    for e in range(config.experts):
        rows = torch.nonzero(ids_N == e).flatten()
        if len(rows):
            staged = format_of(config).stage_rows(config, weights, x_NH[rows])
            terms_NH[rows] = expert(config, weights, e, staged, weights_N[rows]).float()
    outs, at = [], 0
    for x_TH, ids_TK, weights_TK in zip(x_RTH, ids_RTK, weights_RTK, strict=True):
        terms = terms_NH[at : at + ids_TK.numel()].view(*ids_TK.shape, config.hidden)
        if config.weight_in == "reduce":
            terms = weights_TK[:, :, None] * terms
        terms = terms.masked_fill(ids_TK[:, :, None] < 0, 0.0)
        out = torch.zeros(len(x_TH), config.hidden)
        for k in range(config.choices):
            out = out + terms[:, k]
        if config.shared_inner:
            out = out + shared_alone(x_TH, weights, config)
        outs.append(out.to(x_TH.dtype))
        at += ids_TK.numel()
    return outs


def shared_alone(x_TH, weights, config):
    """The shared expert's rows, from the reference with every choice unused."""
    plain = replace(config, format="plain", choices=1, bias=False)
    unused = torch.full((len(x_TH), 1), -1)
    held = {name: w for name, w in weights.items() if name.startswith("shared_")}
    return reference_moe([x_TH], [unused], [torch.zeros(len(x_TH), 1)], held, plain)[0].float()


def same(have, want):
    """Equal bits, except that a NaN is a NaN whatever its payload."""
    lost = want.isnan()
    return torch.equal(have.isnan(), lost) and torch.equal(
        have.masked_fill(lost, 0), want.masked_fill(lost, 0)
    )
