"""What a seed means: shapes, weights, routing, contexts.  Also the traffic of the real ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from epmoe.config import ACTIVATIONS, MoEConfig
from epmoe.context import PHASES, ForwardContext
from epmoe.formats import DTYPE, format_of
from epmoe.sched.placement import Placement

STALL_S = 30.0


@dataclass
class Step:
    """One forward of all ranks."""

    layer: int
    x_R: list
    ids_R: list
    weights_R: list
    context: ForwardContext | None
    odd: dict = field(default_factory=dict)  # rank → the context it holds instead

    def context_of(self, rank):
        return self.odd.get(rank, self.context)


def draw_config(rng, ranks, max_rows, name="moe", lanes=1):
    """A layer; three in ten are quantised, one in four has a slot or two more than experts."""
    places = ranks * rng.choice([1, 2, 4])
    spare = rng.choice([0, 0, 0, 1, 2]) if places > 3 else 0
    form = rng.choice(["plain"] * 7 + ["fp8", "mxfp4", "nvfp4"])
    wide = form != "plain"
    return MoEConfig(
        experts=places - spare,
        slots=places if spare else 0,
        choices=min(rng.choice([1, 2, 4]), places - spare),
        hidden=rng.choice([32, 160] if wide else [16, 40]),
        inner=rng.choice([32, 64] if wide else [8, 24]),
        max_rows=max_rows,
        dtype=rng.choice(["fp32", "bf16"]),
        format=form,
        activations_in=rng.choice(["dtype", "format"]) if wide else "dtype",
        activation=rng.choice(ACTIVATIONS),
        bias=rng.random() < 0.3,
        clamp=rng.choice([math.inf, math.inf, 1.0]),
        weight_in=rng.choice(["reduce", "reduce", "fc2"]),
        shared_inner=rng.choice([0, 0, 8]),
        lanes=lanes,
        stall_s=STALL_S,
        open_s=STALL_S,
        name=name,
    )


def weights_of(config, g, ranks=1):
    """The tensors of all slots, in slot order, in the config's format, and the shared expert's."""
    E, H, inner = config.experts, config.hidden, config.inner
    dtype = DTYPE[config.dtype]

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    w = {"w1": draw(E, inner, H), "w2": draw(E, H, inner)}
    if config.gated:
        w["w3"] = draw(E, inner, H)
    if config.bias:
        w |= {"b1": draw(E, inner), "b2": draw(E, H)}
        if config.gated:
            w["b3"] = draw(E, inner)
    if config.places != config.experts:
        held = list(Placement.linear(E, config.places, ranks).expert_of_S)
        w = {name: tensor[held] for name, tensor in w.items()}
    if config.format != "plain":
        static = config.format == "nvfp4" and config.activations_in == "format"
        scales = {
            "input_scale": torch.tensor(0.01),
            "mid_scale": torch.full((config.places,), 0.01),
        }
        w = format_of(config).from_plain(config, w, **(scales if static else {}))
    if config.shared_inner:
        S = config.shared_inner
        w |= {"shared_w1": draw(S, H), "shared_w2": draw(H, S)}
        if config.gated:
            w["shared_w3"] = draw(S, H)
    return w


def slots_of(weights, rank, per_rank):
    """Views, not copies: a GEMM may depend on the address of its operand."""
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    return {n: w if n.startswith("shared_") else w[mine] for n, w in weights.items()}


def draw_ids(rng, g, rows, config, per_rank):
    """Routing with a character: even, all to one expert or rank, repeated, partly or all unused."""
    ids = torch.randint(0, config.experts, (rows, config.choices), generator=g)
    match rng.choice(["uniform", "one expert", "masked", "duplicates", "one rank", "none"]):
        case "one expert":
            ids[:] = rng.randrange(config.experts)
        case "masked":
            ids[torch.rand(ids.shape, generator=g) < 0.5] = -1
        case "duplicates":
            ids[:] = ids[:, :1]
        case "one rank":
            ids %= min(per_rank, config.experts)
        case "none":
            ids[:] = -1
    return ids.to(rng.choice([torch.int32, torch.int64]))


def draw_step(rng, g, configs, ranks, layer=None):
    """A forward of one of the layers: big, small and empty batches, chunked in one of four."""
    layer = rng.randrange(len(configs)) if layer is None else layer
    config = configs[layer]
    chunked = rng.random() < 0.25
    most = 2 * config.max_rows + 1 if chunked else config.max_rows
    rows_R = [rng.choice([0, 1, most // 2, most]) for _ in range(ranks)]
    x_R = [torch.randn(n, config.hidden, generator=g).to(DTYPE[config.dtype]) for n in rows_R]
    weights_R = [torch.rand(n, config.choices, generator=g) for n in rows_R]
    if rng.random() < 0.15:  # what is no number stays in its own row
        for tensors in (x_R, weights_R):
            for tensor in tensors:
                spoiled = torch.rand(tensor.shape, generator=g) < 0.05
                tensor[spoiled] = rng.choice([math.nan, math.inf, -math.inf])
    context = None
    if chunked:
        context = ForwardContext(phase=rng.choice(PHASES), rows=tuple(rows_R))
    elif rng.random() < 0.2:
        context = ForwardContext(phase=rng.choice(PHASES), epoch=0)
    per_rank = config.slots_per_rank(ranks)
    ids_R = [draw_ids(rng, g, n, config, per_rank) for n in rows_R]
    return Step(layer, x_R, ids_R, weights_R, context)


def spoil(rng, step, who, config):
    """Make the batch of rank ``who`` one that must be refused; the argument its error must name."""
    kinds = ["id", "dtype", "shape", "context", "epoch"]
    chunked = step.context is not None and step.context.rows is not None
    if not chunked:
        kinds.append("rows")
    x, weights = step.x_R[who], step.weights_R[who]
    match rng.choice(kinds):
        case "id":
            if not len(x):
                return spoil(rng, step, who, config)
            ids = step.ids_R[who].to(torch.int64)
            ids[rng.randrange(len(x)), 0] = rng.choice([config.experts, -2, 1 << 40, -(1 << 31)])
            step.ids_R[who] = ids
            return "ids"
        case "dtype":
            step.x_R[who] = x.to(torch.float64)
            return "x"
        case "shape":
            step.weights_R[who] = torch.cat([weights, weights[:, :1]], 1)
            return "weights"
        case "rows":
            more = config.max_rows + 1
            step.x_R[who] = torch.zeros(more, config.hidden, dtype=x.dtype)
            step.ids_R[who] = torch.zeros(more, config.choices, dtype=torch.int64)
            step.weights_R[who] = torch.zeros(more, config.choices)
            return "max_rows"
        case "epoch":
            step.odd[who] = replace(step.context or ForwardContext(), epoch=3)
            return "epoch"
        case "context":
            if not chunked:
                return spoil(rng, step, who, config)
            step.x_R[who] = torch.cat([x, torch.zeros(1, config.hidden, dtype=x.dtype)])
            step.ids_R[who] = torch.zeros(len(x) + 1, config.choices, dtype=torch.int64)
            step.weights_R[who] = torch.zeros(len(x) + 1, config.choices)
            return "context.rows"
    raise AssertionError


def disagree(rng, step, who):
    """Give rank ``who`` a context that is legal by itself, and not the one its peers hold."""
    context = step.context or ForwardContext()
    kinds = [replace(context, phase=PHASES[1 - PHASES.index(context.phase)])]
    if context.rows is not None:
        more = tuple(n + 100 * (r != who) for r, n in enumerate(context.rows))
        kinds.append(replace(context, rows=more))
    step.odd[who] = rng.choice(kinds)
