"""What a seed means: shapes, routing, chunks, two layers, a fault or none; and the verdict."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from sim.baton import Baton, layers

from epmoe.config import ACTIVATIONS, MoEConfig
from epmoe.context import ForwardContext
from epmoe.errors import PeerLost
from epmoe.reference import reference_moe
from epmoe.sched.chunks import plan_chunks


class Struck(Exception):
    """The planted fault."""


@dataclass
class Step:
    """One forward of all ranks."""

    layer: int
    x_R: list
    ids_R: list
    weights_R: list
    context: ForwardContext | None


def weights_of(config, g):
    E, H, inner = config.experts, config.hidden, config.inner
    dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    w = {"w1": draw(E, inner, H), "w2": draw(E, H, inner)}
    if config.gated:
        w["w3"] = draw(E, inner, H)
    if config.bias:
        w |= {"b1": draw(E, inner), "b2": draw(E, H)}
        if config.gated:
            w["b3"] = draw(E, inner)
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


def draw_config(rng, ranks, max_rows, name):
    per_rank, choices = rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
    return MoEConfig(
        experts=ranks * per_rank,
        choices=min(choices, ranks * per_rank),
        hidden=rng.choice([16, 40]),
        inner=rng.choice([8, 24]),
        max_rows=max_rows,
        dtype=rng.choice(["fp32", "bf16"]),
        activation=rng.choice(ACTIVATIONS),
        bias=rng.random() < 0.3,
        clamp=rng.choice([math.inf, math.inf, 1.0]),
        weight_in=rng.choice(["reduce", "reduce", "fc2"]),
        shared_inner=rng.choice([0, 0, 8]),
        name=name,
    )


def draw_ids(rng, g, rows, config, per_rank):
    ids = torch.randint(0, config.experts, (rows, config.choices), generator=g)
    match rng.choice(["uniform", "one expert", "masked", "duplicates", "one rank", "none"]):
        case "one expert":
            ids[:] = rng.randrange(config.experts)
        case "masked":
            ids[torch.rand(ids.shape, generator=g) < 0.5] = -1
        case "duplicates":
            ids[:] = ids[:, :1]
        case "one rank":
            ids %= per_rank
        case "none":
            ids[:] = -1
    return ids.to(rng.choice([torch.int32, torch.int64]))


def draw_step(rng, g, configs, ranks):
    layer = rng.randrange(len(configs))
    config = configs[layer]
    chunked = rng.random() < 0.25
    most = 2 * config.max_rows + 1 if chunked else config.max_rows
    rows_R = [rng.choice([0, 1, most // 2, most]) for _ in range(ranks)]
    dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    return Step(
        layer,
        [torch.randn(n, config.hidden, generator=g).to(dtype) for n in rows_R],
        [draw_ids(rng, g, n, config, config.slots_per_rank(ranks)) for n in rows_R],
        [torch.rand(n, config.choices, generator=g) for n in rows_R],
        ForwardContext(rows=tuple(rows_R)) if chunked else None,
    )


def expected(step, config, weights):
    """What every rank gets from this step: the oracle, chunk by chunk."""
    rows_R = [len(x) for x in step.x_R]
    if step.context is None:
        return reference_moe(step.x_R, step.ids_R, step.weights_R, weights, config)
    chunks = plan_chunks(rows_R, config.max_rows)
    parts = []
    for chunk in range(chunks.count):
        spans = [chunks.span(chunk, rank) for rank in range(len(rows_R))]
        cut = [
            [t[s] for t, s in zip(ts, spans, strict=True)]
            for ts in (step.x_R, step.ids_R, step.weights_R)
        ]
        parts.append(reference_moe(*cut, weights, config))
    return [torch.cat(of_rank) for of_rank in zip(*parts, strict=True)]


def without(step, rank, config):
    """The step as peers see it if ``rank`` was refused: an empty batch."""
    return Step(
        step.layer,
        [x[:0] if r == rank else x for r, x in enumerate(step.x_R)],
        [i[:0] if r == rank else i for r, i in enumerate(step.ids_R)],
        [w[:0] if r == rank else w for r, w in enumerate(step.weights_R)],
        None,
    )


def case(seed, steps=3):
    """Run one seed; (None or what was wrong, steps taken by the baton)."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks = rng.choice([2, 3, 4])
    configs = [draw_config(rng, ranks, 5, f"layer {i}") for i in range(rng.choice([1, 1, 2]))]
    weights = [weights_of(config, g) for config in configs]
    program = [draw_step(rng, g, configs, ranks) for _ in range(steps)]
    fault = rng.choice([None, None, "refuse", "raise", "close"])
    who, when = rng.randrange(ranks), rng.randrange(steps)
    verb = rng.choice(["stage", "wait_plan", "pull", "ffn", "push", "reduce"])
    if fault == "refuse":
        bad = rng.choice([configs[program[when].layer].experts, -2, 1 << 40])
        step = program[when]
        step.context = None
        for r in range(ranks):
            n = min(len(step.x_R[r]), 5)
            step.x_R[r], step.ids_R[r] = step.x_R[r][:n], step.ids_R[r][:n]
            step.weights_R[r] = step.weights_R[r][:n]
        config = configs[step.layer]
        step.x_R[who] = torch.zeros(3, config.hidden, dtype=step.x_R[who].dtype)
        step.ids_R[who] = torch.full((3, config.choices), bad)
        step.weights_R[who] = torch.rand(3, config.choices)
    moes = layers(configs, ranks)
    for rank in range(ranks):
        for moe, w in zip(moes[rank], weights, strict=True):
            load_alone(moe, slots_of(w, rank, moe.config.slots_per_rank(ranks)))
    baton, got = Baton(ranks, seed), {}

    def body(me):
        for number, step in enumerate(program):
            moe = moes[me][step.layer]
            if (fault, who, when) == ("raise", me, number):
                plant(moe, verb)
            if (fault, who, when) == ("close", me, number):
                moe.close()
                return
            try:
                got[number, me] = moe(
                    step.x_R[me], step.ids_R[me], step.weights_R[me], context=step.context
                )
            except ValueError as error:
                got[number, me] = error
            except BaseException as error:
                if not moe._runtime.closed:
                    moe._runtime.poison(error, moe._runtime.lanes[0].round)
                raise

    errors = baton.run(body)
    return verdict(seed, program, configs, weights, fault, who, when, got, errors), baton.steps


def verdict(seed, program, configs, weights, fault, who, when, got, errors):
    ranks = len(program[0].x_R)
    where = f"seed {seed} fault {fault} of rank {who} in step {when}"
    if fault in (None, "refuse") and errors:
        return f"{where}: {errors}"
    if fault in ("raise", "close"):
        if fault == "raise" and not isinstance(errors.get(who), Struck):
            return f"{where}: rank {who} raised {errors.get(who)!r}, not its own error"
        for rank, error in errors.items():
            if rank == who:
                continue
            if not isinstance(error, PeerLost) or error.ranks != (who,):
                return f"{where}: rank {rank} raised {error!r}"
            if error.how != {"raise": "raised", "close": "closed"}[fault]:
                return f"{where}: rank {rank} says {error.how}"
        if when < len(program) - 1 and len(errors) < ranks - (fault == "close"):
            return f"{where}: only {sorted(errors)} noticed"
    for number, step in enumerate(program):
        refused = fault == "refuse" and number == when
        config = configs[step.layer]
        wanted = expected(
            without(step, who, config) if refused else step, config, weights[step.layer]
        )
        for rank, want in enumerate(wanted):
            have = got.get((number, rank))
            if refused and rank == who:
                if not isinstance(have, ValueError) or "ids" not in str(have):
                    return f"{where}: a bad id was taken: {have!r}"
            elif have is None:
                if fault not in ("raise", "close") or number < when:
                    return f"{where}: rank {rank} threw step {number} away"
            elif isinstance(have, Exception):
                return f"{where}: rank {rank} step {number} raised {have!r}"
            elif not torch.equal(have.nan_to_num(7e7), want.nan_to_num(7e7)):
                return f"{where}: rank {rank} step {number} differs"
    return None


def load_alone(moe, tensors):
    """What ``load`` does after its collective check, for one rank of a simulation."""
    for name, tensor in tensors.items():
        (moe._shared if name.startswith("shared_") else moe._weights)[name] = tensor


def plant(moe, verb):
    """Let ``verb`` of lane 0 raise when it is called next."""

    def struck(*args, **kwargs):
        raise Struck("out of memory")

    setattr(moe._ops[0], verb, struck)


__all__ = ["case", "draw_step", "expected", "slots_of", "weights_of"]
