"""The fused round against the split verbs, bit for bit, its two ends alone, and times, on one GPU:

python tests/gpu/fused_round.py [--time | --quick | --tiny]

``--tiny`` is for compute-sanitizer, under which everything takes a hundred times as long.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import struct
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from there_and_back import there_and_back

from epmoe import EpmoeError, MoEConfig
from epmoe.comm.layout import layout
from epmoe.kernels.cuda import CudaOps, laid_out
from epmoe.kernels.cuda import compiled as split_kernels
from epmoe.kernels.fused import FusedOps, compiled
from epmoe.kernels.sizes import FEW, MANY, SOME, cut_of, parts
from epmoe.kernels.transport import Transport

HEAD = (0, 0, 0, 0, 1, 0, 0, 0)


class Alone:
    """The words of a lane in this process: a slab, a round number, a limit; its only rank's."""

    ranks = 1
    rank = 0

    def __init__(self, nbytes, limit_s=4.0):
        self.slab = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        self.slabs = [self.slab]  # of all ranks
        self.numbers = torch.tensor([1, 0, int(limit_s * 1e9)], device="cuda")
        self.report = torch.zeros(32, dtype=torch.uint8).pin_memory()
        self.gone = torch.zeros(8, dtype=torch.int32).pin_memory()

    def world(self):
        at = self.numbers.data_ptr()
        slabs = [slab.data_ptr() for slab in self.slabs] + [0] * (8 - self.ranks)
        pointers = (at, at + 8, self.report.data_ptr(), self.gone.data_ptr(), at + 16)
        return struct.pack("<8Q5QII", *slabs, *pointers, self.rank, 0)

    def said(self):
        return struct.unpack("<IIIIQQ", self.report.numpy().tobytes())


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def weights_of(config, scale=0.03):
    E, H, inner = config.experts, config.hidden, config.inner
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    w = {
        "w1": torch.randn(E, inner, H, **bf16) * scale,
        "w2": torch.randn(E, H, inner, **bf16) * scale,
    }
    if config.gated:
        w["w3"] = torch.randn(E, inner, H, **bf16) * scale
    if config.bias:
        w |= {"b1": torch.randn(E, inner, **bf16), "b2": torch.randn(E, H, **bf16)}
        if config.gated:
            w["b3"] = torch.randn(E, inner, **bf16)
    return w


def batch(config, rows, kind):
    x = torch.randn(rows, config.hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(rows, config.experts, device="cuda").argsort(1)[:, : config.choices].int()
    if kind == "one":
        ids[:] = config.experts // 2
    if kind == "masked":
        ids[torch.rand(ids.shape, device="cuda") < 0.4] = -1
    return x, ids.contiguous(), torch.rand(rows, config.choices, device="cuda")


def opened(config, limit_s=4.0, **how):
    placed = layout([config], 1)
    words = Alone(placed.total, limit_s)
    # The split verbs count blocks by round, so each way gets its own rounds.
    split = CudaOps(config, placed, layer=0, lane=0, words=Alone(placed.total, limit_s))
    fused = FusedOps(config, placed, layer=0, lane=0, words=words, **how)
    weights = laid_out(config, weights_of(config))
    split.adopt(weights)
    fused.adopt(weights)
    return words, split, fused, weights


@contextmanager
def processors(grid):
    """A part of a GPU, if ``grid`` is not 0: a launch has so many CTAs."""
    with ExitStack() as parts_of:
        for room in ("fused", "transport") if grid else ():
            name = f"epmoe.kernels.{room}.processors_of"
            parts_of.enter_context(mock.patch(name, return_value=grid))
        yield


def grown(ops, launches):
    """Counters as after that many launches: a layer that serves for weeks counts past 2**32."""
    tellers = parts(ops.grid, 1)
    for which, each in ((0, 1), (1, tellers), (2, ops.grid)):  # cu/exchange.cuh Counter
        value = launches * each % 2**32
        ops._numbers[which] = value - 2**32 if value >= 2**31 else value


def check(config, rounds, *, launches=0, grid=0, **how):
    torch.manual_seed(1)
    with processors(grid):
        words, split, fused, _ = opened(config, **how)
    grown(fused, launches)
    rng, wrong = random.Random(1), []
    for i in range(rounds):
        rows = [0, config.max_rows, rng.randrange(1, config.max_rows), 1][i % 4]
        kind = "one" if i == 1 else rng.choice(["any", "any", "one", "masked"])
        x, ids, w = batch(config, rows, kind)
        want, have = torch.empty_like(x), torch.full_like(x, float("nan"))
        split.round(x, ids, w, HEAD, want)
        fused.round(x, ids, w, HEAD, have)
        begun = time.monotonic()
        torch.cuda.synchronize()
        if not torch.equal(want, have) or not torch.isfinite(have).all():
            off = (want != have).any(1).sum().item()
            wrong.append((i, rows, kind, off, words.said(), f"{time.monotonic() - begun:.1f} s"))
            if words.said()[0]:
                break
    torch.cuda.synchronize()
    if any(fused._numbers[which] for which in (3, 5)):  # these begin anew in every launch
        wrong.append(("counters", fused._numbers.tolist()))
    how |= {"grid": grid} if grid else {}
    what = (
        f"{config.activation} E{config.experts} K{config.choices} H{config.hidden} I{config.inner}"
    )
    say("wrong" if wrong else "right", what, how, f"{rounds} rounds", launches, wrong[:3])
    return not wrong


def check_alone(config, rounds, launches=0):
    """Dispatch and combine, a launch each."""
    words = Alone(layout([config], 1).total, 300.0)
    alone = Transport(config, layout([config], 1), layer=0, lane=0, words=words)
    grown(alone, launches)
    rng, right = random.Random(2), 0
    for i in range(rounds):
        rows = [config.max_rows, 0, 1, rng.randrange(1, config.max_rows)][i % 4]
        x, ids, w = batch(config, rows, rng.choice(["any", "one", "masked"]))
        right += there_and_back(alone, x, ids, w, ids, 0)
    good = right == rounds and not any(words.said())
    try:
        alone.combine(ids, w, x)
        good = False
    except EpmoeError:
        pass  # a dispatch comes next
    how = f"K{config.choices} H{config.hidden} {config.weight_in}"
    say("right" if good else "wrong", "alone", how, f"{right} of {rounds} rounds", launches)
    return good


def timed(variants, rounds=11):
    flush = torch.empty(200 << 20, dtype=torch.uint8, device="cuda")
    taken = {name: [] for name in variants}
    for turn in range(rounds + 3):
        for name, run in variants.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(600_000)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 3:
                taken[name].append(begin.elapsed_time(end) * 1e3)
    return {name: round(statistics.median(t), 1) for name, t in taken.items()}


def times(name, hidden, inner, experts, choices, rows):
    config = MoEConfig(
        experts=experts, choices=choices, hidden=hidden, inner=inner, max_rows=rows, heap="cuda"
    )
    words, split, fused, laid = opened(config)
    placed, others = (
        layout([config], 1),
        {"other order": {"counted": cut_of(config, 1, rows) == FEW}, "16": {"pullers": 16}},
    )
    if rows * choices <= 64 * experts:
        others["many"] = {"cut": MANY}
    made = {
        name: FusedOps(config, placed, layer=0, lane=0, words=words, **how)
        for name, how in others.items()
    }
    for ops in made.values():
        ops.adopt(laid)
    x, ids, w = batch(config, rows, "any")
    out = torch.empty_like(x)
    variants = {"split": lambda: split.round(x, ids, w, HEAD, out), "gemms": split.ffn}
    for key, ops in (("fused", fused), *made.items()):
        variants[key] = lambda ops=ops: ops.round(x, ids, w, HEAD, out)
    found = timed(variants)
    say(f"{name} {rows} rows", found, "us; fault", words.said()[0])
    return {"shape": name, "rows": rows, "us": found}


def build(config, how):
    """Fill the file cache with what a check needs."""
    known = {n: how[n] for n in ("counted", "pullers", "grid") if n in how}
    placed = layout([config], 1)
    compiled(config, 1, placed, 0, 0, cut=how["cut"], among=(how["cut"],), **known)
    split_kernels(config, 1, placed, 0, 0)


def checks(quick, tiny):
    """What to check, one after the other: a layer, how many rounds, how."""
    small = MoEConfig(experts=8, choices=2, hidden=512, inner=256, max_rows=700, heap="cuda")
    if tiny:
        few = MoEConfig(experts=4, choices=2, hidden=128, inner=64, max_rows=150, heap="cuda")
        for cut in (FEW, MANY):
            yield few, 2, {"cut": cut, "limit_s": 300.0}
        return
    wide = replace(small, experts=64, choices=6, hidden=2880, inner=704, max_rows=1500)
    for cut in (FEW, SOME, MANY):
        yield small, 8, {"cut": cut, "counted": False}
        yield small, 8, {"cut": cut}
        # All CTAs together, a rank's telling CTAs and its words have counted past 2**32 by then.
        yield small, 8, {"cut": cut, "launches": 2**32 // 132 - 3}
        yield small, 8, {"cut": cut, "launches": 2**31 - 3}
        if quick:
            continue
        for hidden, inner in ((1024, 128), (128, 1024)):  # a product of one step, many tiles
            slots = replace(small, experts=256, choices=8, max_rows=256)
            yield replace(slots, hidden=hidden, inner=inner), 4, {"cut": cut}
        for act in ("gelu", "gpt_oss"):
            yield replace(small, activation=act, bias=True, weight_in="fc2"), 4, {"cut": cut}
        yield wide, 4, {"cut": cut, "pullers": 16}
        yield wide, 4, {"cut": cut, "pullers": 2, "counted": False}
        for grid in (32, 6):
            yield small, 4, {"cut": cut, "grid": grid}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    todo = list(checks(asked.quick, asked.tiny))
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        for job in [pool.submit(build, config, how) for config, _, how in todo]:
            job.result()
    found: list[dict] = []
    good = all(check(config, rounds, **how) for config, rounds, how in todo)
    wide = MoEConfig(experts=8, choices=3, hidden=7168, inner=64, max_rows=40, heap="cuda")
    good &= check_alone(wide, 2)
    if not asked.tiny:
        good &= check_alone(wide, 8, launches=2**32 // 132 - 3)
        narrow = replace(wide, hidden=320, max_rows=900, choices=8, experts=16)
        good &= check_alone(replace(narrow, weight_in="fc2"), 8, launches=2**31 - 3)
    if asked.time and good:
        for rows in (16, 128, 512, 2048):
            found.append(times("dsv3", 7168, 2048, 32, 8, rows))
            torch.cuda.empty_cache()
        for rows in (64, 1024):
            found.append(times("qwen3-30b", 2048, 768, 16, 8, rows))
        found.append(times("qwen3-235b", 4096, 1536, 16, 8, 1024))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    main()
