"""The fused round against the split verbs on several GPUs, bit for bit, and where its time goes:

python tests/gpu/fused_ranks.py --ranks 2 [--trace dsv3:128,qwen3-30b:2048]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from fused_round import weights_of

from epmoe import MoE, MoEConfig
from epmoe.cli.contest import gpus
from epmoe.cli.ranks import on_ranks
from epmoe.comm.layout import layout
from epmoe.kernels import sizes
from epmoe.kernels.cuda import CudaOps
from epmoe.kernels.cuda import compiled as split_kernels
from epmoe.kernels.fused import FusedOps, compiled
from epmoe.kernels.ops import forward_head
from epmoe.kernels.trace import spans
from epmoe.shapes import shape

SMALL = MoEConfig(
    experts=16, choices=4, hidden=512, inner=256, max_rows=600, heap="cuda", stall_s=5.0
)
CASES = {
    "swiglu": {},
    "gpt_oss": {"hidden": 2880, "inner": 2880, "activation": "gpt_oss", "bias": True, "clamp": 7.0},
    "fc2": {"hidden": 1024, "inner": 512, "weight_in": "fc2", "max_rows": 1500},
    "relu2": {"hidden": 192, "inner": 320, "activation": "relu2", "bias": True, "choices": 1},
    "many": {"experts": 256, "choices": 8, "max_rows": 96},
    "ring": {"inner": 1024, "max_rows": 8000},  # more blocks may come than have memory
    "one step": {"inner": 128, "max_rows": 8000},  # the same, and products of FC2 are over at once
}


def say(group, *words):
    if group.rank == 0:
        sys.stdout.write(" ".join(map(str, words)) + "\n")
        sys.stdout.flush()


def batch(config, rows, kind, g):
    x = torch.randn(rows, config.hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(rows, config.experts, device="cuda").argsort(1)[:, : config.choices].int()
    if kind == "one":
        ids[:] = config.experts - 1
    elif kind == "none":
        ids[:] = -1
    elif kind == "masked":
        ids[torch.rand(ids.shape, device="cuda") < 0.4] = -1
    return x, ids.contiguous(), torch.rand(rows, config.choices, device="cuda")


def check(group, name, config, rounds, **how):
    """Rounds of both ways in turn on one lane, ranks late at random; how many differed."""
    torch.manual_seed(group.rank)
    rng, common, wrong = random.Random(group.rank), random.Random(7), []
    with MoE.open(config, group) as moe:
        weights = weights_of(replace(config, experts=config.slots_per_rank(group.size), choices=1))
        moe.load(**weights)
        words = moe._runtime.lanes[0].words
        split = CudaOps(config, moe._runtime.placed, layer=0, lane=0, words=words)
        split.adopt(weights)
        ours = FusedOps(config, moe._runtime.placed, layer=0, lane=0, words=words, **how)
        ours.adopt(weights)
        for i in range(rounds):
            kind = common.choice(["any", "any", "any", "one", "masked", "none"])
            rows = rng.choice([0, 1, config.max_rows // 3, config.max_rows, config.max_rows])
            x, ids, w = batch(config, rows, kind, rng)
            want, have = torch.empty_like(x), torch.full_like(x, float("nan"))
            if rng.random() < 0.5:
                torch.cuda._sleep(rng.randrange(2_000_000))
            split.round(x, ids, w, forward_head(config.max_rows), want)
            if rng.random() < 0.5:
                torch.cuda._sleep(rng.randrange(2_000_000))
            ours.round(x, ids, w, forward_head(config.max_rows), have)
            begun = time.monotonic()
            torch.cuda.synchronize()
            words.check()
            if not torch.equal(want, have):
                off = (want != have).any(1)
                wrong.append((i, rows, kind, int(off.sum()), f"{time.monotonic() - begun:.1f} s"))
        group.allgather(b"", what="end", limit_s=60)
    said = group.allgather(repr(wrong[:2]).encode(), what="wrong", limit_s=60)
    say(group, "right" if all(s == b"[]" for s in said) else "WRONG", name, how, rounds, *said)
    return not wrong


def tighten():
    """No more ring than must be, in this process."""
    sizes.SPARE = 0
    sizes.even_blocks = lambda config, ranks: 0


def build(config, ranks, how, tight):
    """Fill the file cache with what a check needs."""
    if tight:
        tighten()
    placed = layout([config], ranks)
    compiled(config, ranks, placed, 0, 0, among=(how["cut"],), **how)
    split_kernels(config, ranks, placed, 0, 0)


def summary(found):
    """For each role its spans, by first begin: how often, microseconds in all, from and to."""
    begun = min(span.begin for span in found)
    for role in dict.fromkeys(span.role for span in found):
        mine = [span for span in found if span.role == role]
        ctas, parts = len({span.cta for span in mine}), []
        for name in dict.fromkeys(span.name for span in sorted(mine, key=lambda s: s.begin)):
            these = [span for span in mine if span.name == name]
            first = min(s.begin for s in these) - begun
            last = max(s.end for s in these) - begun
            total = sum(s.end - s.begin for s in these) / ctas
            parts.append(
                f"{name} x{len(these) / ctas:.1f} {total / 1e3:.1f} us"
                f" ({first / 1e3:.1f} to {last / 1e3:.1f})"
            )
        yield f"{role} of {ctas}: " + ", ".join(parts)


def traced(group, name, rows, **how):
    """What rank 0 did when, in a cold round, with as many slots of a rank as 8 ranks would have."""
    config = shape(name, max_rows=rows, heap="cuda", stall_s=5.0)
    experts = max(config.choices, config.experts * group.size // 8)
    config = replace(config, experts=experts)
    with MoE.open(config, group) as moe:
        weights = weights_of(replace(config, experts=config.slots_per_rank(group.size), choices=1))
        words = moe._runtime.lanes[0].words
        ours = FusedOps(
            config, moe._runtime.placed, layer=0, lane=0, words=words, trace=True, **how
        )
        ours.adopt(weights)
        x, ids, w = batch(config, rows, "any", None)
        out, cold = torch.empty_like(x), torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
        for _ in range(4):
            group.allgather(b"", what="start", limit_s=60)
            cold.max()
            ours.notes.zero_()
            torch.cuda._sleep(2_000_000)
            ours.round(x, ids, w, forward_head(config.max_rows), out)
            torch.cuda.synchronize()
        words.check()
        for line in summary(list(spans(ours.notes, ours.grid))):
            say(group, name, rows, line)
        group.allgather(b"", what="end", limit_s=60)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--trace", default="")
    parser.add_argument("--tight", action="store_true", help="no more ring than must be")
    asked = parser.parse_args()
    ranks = asked.ranks or gpus()
    if asked.tight:
        tighten()
    all_cuts = (sizes.FEW, sizes.SOME, sizes.MANY)
    ways = [{"cut": cut, "counted": counted} for cut in all_cuts for counted in (False, True)]
    todo = {n: replace(SMALL, **CASES[n]) for n in asked.cases.split(",") if n}
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        given = [(c, ranks, how, asked.tight) for c in todo.values() for how in ways]
        jobs = [pool.submit(build, *one) for one in given]
        for job in jobs:
            job.result()

    def body(group):
        torch.cuda.set_device(group.local_rank)
        good = True
        for name, config in todo.items():
            for how in ways:
                good = check(group, name, config, asked.rounds, **how) and good
        for one in filter(None, asked.trace.split(",")):
            name, rows = one.split(":")
            traced(group, name, int(rows))
        return 0 if good else 1

    sys.exit(on_ranks(asked.ranks, ranks, body))


if __name__ == "__main__":
    main()
