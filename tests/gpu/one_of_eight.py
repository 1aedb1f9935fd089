"""What a round costs one rank of eight whose peers never keep it waiting, on two GPUs:

python tests/gpu/one_of_eight.py qwen3-30b:128 dsv3:512:16,SOME@32 [--ranks 8] [--trace] [--alone 9]

Each GPU has one rank that works on all of its processors; the memory of its seven peers lies on the
other GPU.  All eight ran once, for real, and left their rows, lists and counts; in the timed rounds
a peer is its words, written before.  So 7/8 of what is sent and fetched crosses NVLink in both
directions, as with eight GPUs, and nobody waits for a slower peer or shares its link: what eight
GPUs would take if nobody waited, within 4 % where that could be checked (docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import neighbours as n
import torch
from fused_ranks import summary
from fused_round import processors, say, weights_of

from epmoe import MoEConfig
from epmoe.cli.race import COLD, SLEEP, WARM, described
from epmoe.comm.layout import layout
from epmoe.kernels import sizes
from epmoe.kernels.cuda import laid_out
from epmoe.kernels.fused import FusedOps
from epmoe.kernels.fused import compiled as fused_kernel
from epmoe.kernels.ops import forward_head
from epmoe.kernels.sizes import cuts
from epmoe.kernels.trace import spans
from epmoe.kernels.transport import Transport
from epmoe.kernels.transport import compiled as transport_kernels
from epmoe.shapes import shape


def word_of(round_, value):
    w = round_ << 32 | value
    return w | (w.bit_count() & 1) << 31


class Side:
    """Rank 0 on ``home``, its peers' memory on ``away``."""

    def __init__(self, config, size, home, rows):
        self.config, self.size, self.home = config, size, home
        self.placed = layout([config], size)
        self.ranks = n.neighbours(size, self.placed.total, lambda r: home if r == 0 else 1 - home)
        self.me, self.batches = self.ranks[0], []
        torch.manual_seed(home)
        for one in self.ranks:
            with torch.cuda.device(one.device):
                x, ids, weights = n.batch(config, rows, "any", None)
                self.batches.append((x, ids, weights / weights.sum(1, keepdim=True)))
        self.out = [torch.empty_like(x) for x, _, _ in self.batches]
        words = self.placed.lanes[0][0]["words"]
        mine = self.me.words.slab[words.at : words.at + words.bytes]
        self.words = mine.view(torch.int64).view(3, size)
        with torch.cuda.device(home):
            self.cold = torch.zeros(COLD // 4, dtype=torch.int32, device="cuda")

    def processors(self, rank):
        return processors(n.processors_here() if rank == 0 else n.share(self.size - 1, 1))

    def call(self, ops, verb, rank):
        x, ids, weights = self.batches[rank]
        if verb == "combine":
            return partial(ops.combine, ids, weights, self.out[rank])
        if verb == "experts":  # rows may lie in another order in every round
            return partial(ops.results.copy_, ops.rows)
        given = (x, ids, weights, forward_head(self.config.max_rows))
        return (
            partial(ops.round, *given, self.out[rank])
            if verb == "round"
            else partial(ops.dispatch, *given)
        )

    def once(self, made, verbs):
        """All ranks, for real; what peers asked of rank 0 then stays in its mailbox."""
        for verb in verbs:
            for one, ops in zip(self.ranks, made, strict=True):
                with one.at_work():
                    self.call(ops, verb, one.rank)()
            n.finish()
        if n.faults(self.ranks):
            sys.exit(f"the round of all ranks failed: {n.faults(self.ranks)}")
        self.asked = [w & 0x7FFFFFFF for w in self.words[0].tolist()]

    def forget(self):
        """Keep and clear what this rank's slots sent when all ran: timed rounds must send it."""
        local, region = self.config.slots_per_rank(self.size), self.placed.lanes[0][0]["results"]
        self.sent = []
        for one, (_, ids, _) in zip(self.ranks, self.batches, strict=True):
            cells = one.words.slab[region.at : region.at + region.bytes].view(torch.bfloat16)
            cells = cells.view(region.shape)
            mine = torch.zeros(len(cells), dtype=torch.bool, device=cells.device)
            mine[: ids.numel()] = ((ids >= 0) & (ids < local)).flatten()
            self.sent.append((cells, mine, cells[mine]))
            cells[mine] = float("nan")
        self.summed = self.out[0].clone()

    def again(self):
        """True if the last timed round sent and summed the same bits as when all ran."""
        same = torch.equal(self.out[0], self.summed) and bool(torch.isfinite(self.summed).all())
        return same and all(torch.equal(cells[mine], was) for cells, mine, was in self.sent)

    def preset(self):
        """The peers' words of the round that comes."""
        now = int(self.me.words.numbers[0])
        both = [[word_of(now, a) for a in self.asked[1:]], [word_of(now, 0)] * (self.size - 1)]
        signed = [[w - (w >> 63 << 64) for w in row] for row in both]
        self.words[:2, 1:] = torch.tensor(signed)


def timed(sides, calls_of, rounds):
    """Microseconds of both sides' ranks, started together; the slower one of each round.

    ``calls_of`` a variant: for each side its calls, timed one by one.
    """
    taken = {name: [] for name in calls_of}
    for turn in range(WARM + rounds):
        for name, calls in calls_of.items():
            marks = [
                [torch.cuda.Event(enable_timing=True) for _ in range(len(calls[0]) + 1)]
                for _ in sides
            ]
            here = [torch.cuda.Event() for _ in sides]
            for side in sides:
                side.preset()
            n.finish()
            for side, ready in zip(sides, here, strict=True):
                with side.me.at_work():
                    side.cold.max()
                    torch.cuda._sleep(SLEEP)
                    ready.record()
            for side, mark, todo in zip(sides, marks, calls, strict=True):
                with side.me.at_work():
                    for ready in here:
                        side.me.stream.wait_event(ready)
                    mark[0].record()
                    for call, done in zip(todo, mark[1:], strict=True):
                        call()
                        done.record()
            n.finish()
            us = [
                [1e3 * a.elapsed_time(b) for a, b in zip(mark, mark[1:], strict=False)]
                for mark in marks
            ]
            if turn >= WARM:
                taken[name].append([max(both) for both in zip(*us, strict=True)])
    return {
        name: [described(list(part)) for part in zip(*t, strict=True)] for name, t in taken.items()
    }


def how_of(variant):
    """What ``FusedOps`` is asked for: "auto", CTAs that pull, a cut's name, or both: "SOME@32"."""
    cut, _, pullers = variant.rpartition("@")
    if pullers in ("auto", "FEW", "SOME", "MANY"):
        cut, pullers = pullers, ""
    how = {} if cut in ("", "auto") else {"cut": getattr(sizes, cut)}
    return how | ({"pullers": int(pullers)} if pullers else {})


def rounds_of(name, rows, size, variants, asked):
    """The fused round in each variant."""
    config = config_of(name, rows, size)
    sides, calls = [], {variant: [] for variant in variants}
    for home in (0, 1):
        side = Side(config, size, home, rows)
        laid = []
        for device in (0, 1):
            with torch.cuda.device(device):
                few = replace(config, experts=config.slots_per_rank(size), choices=1)
                laid.append(laid_out(config, weights_of(few)))
        made, pools = [], [{}, {}]
        for one in side.ranks:
            with one.at_work(), side.processors(one.rank):
                ops = FusedOps(
                    config, side.placed, layer=0, lane=0, words=one.words, pools=pools[one.device]
                )
                ops.adopt(laid[one.device])
                made.append(ops)
        n.finish()
        side.once(made, ["round"])
        side.forget()
        for variant in variants:
            how = how_of(variant)
            with side.me.at_work():
                ops = FusedOps(config, side.placed, layer=0, lane=0, words=side.me.words, **how)
                ops.adopt(laid[home])
                calls[variant].append([side.call(ops, "round", 0)])
        sides.append(side)
    found = {v: us[0] for v, us in timed(sides, calls, asked.rounds).items()}
    medians = {v: us["median"] for v, us in found.items()}
    bad = any(n.faults([side.me]) for side in sides)
    same = all(side.again() for side in sides)
    say(name, rows, f"1 of {size}", "FAULT" if bad else "same" if same else "DIFFER", medians)
    if asked.trace:
        traced(sides, laid, how_of(variants[0]))
    return {"shape": name, "rows": rows, "ranks": size, "us": found, "right": same and not bad}


def traced(sides, laid, how):
    """What rank 0 of the first side did when, in the last of a few rounds."""
    calls, noted = [], []
    for side in sides:
        with side.me.at_work():
            words = side.me.words
            ops = FusedOps(
                side.config, side.placed, layer=0, lane=0, words=words, trace=True, **how
            )
            ops.adopt(laid[side.home])
        calls.append([side.call(ops, "round", 0)])
        noted.append(ops)
    for _ in range(2):
        noted[0].notes.zero_()
        timed(sides, {"traced": calls}, -WARM + 1)
    for line in summary(list(spans(noted[0].notes, noted[0].grid))):
        say("  ", line)


def alone_of(rows, size, asked):
    """Dispatch and combine of dsv3's rows, a launch each."""
    config, sides, calls = transport_config(rows, size), [], {"alone": []}
    for home in (0, 1):
        side = Side(config, size, home, rows)
        made = []
        for one in side.ranks:
            with one.at_work(), side.processors(one.rank):
                made.append(Transport(config, side.placed, layer=0, lane=0, words=one.words))
        n.finish()
        side.once(made, ["dispatch", "experts", "combine"])
        side.forget()
        verbs = ("dispatch", "experts", "combine")
        calls["alone"].append([side.call(made[0], verb, 0) for verb in verbs])
        sides.append(side)
    out, _, back = timed(sides, calls, asked.rounds)["alone"]
    bad = any(n.faults([side.me]) for side in sides)
    same = all(side.again() for side in sides)
    medians, said = (out["median"], back["median"]), "same" if same else "DIFFER"
    say("dispatch and combine", rows, f"1 of {size}", "FAULT" if bad else said, *medians)
    return {
        "alone": rows,
        "ranks": size,
        "us": {"out": out, "back": back},
        "right": same and not bad,
    }


def config_of(name, rows, size):
    config = shape(name, max_rows=rows, heap="cuda", stall_s=4.0)
    return replace(config, experts=max(config.experts * size // 8, config.choices))


def transport_config(rows, size):
    return MoEConfig(
        experts=32 * size, choices=8, hidden=7168, inner=64, max_rows=rows, heap="cuda"
    )


def build(kind, *what):
    """Fill the file cache with what a figure needs."""
    if kind == "alone":
        rows, size = what
        config = transport_config(rows, size)
        for grid in (n.processors_here(), n.share(size - 1, 1)):
            transport_kernels(config, size, layout([config], size), 0, 0, grid=grid)
        return
    name, rows, size, variant, how = what
    config = config_of(name, rows, size)
    wanted = how_of(variant)
    among = (wanted.pop("cut"),) if "cut" in wanted else cuts(config, size)
    for cut in among:
        told = {"cut": cut, "among": among} | wanted | how
        fused_kernel(config, size, layout([config], size), 0, 0, **told)


def kernels_of(variants, asked):
    """All kernels of a line: those that are timed, the peers', the one with notes."""
    yield from ((variant, {}) for variant in variants)
    yield "auto", {"grid": n.share(asked.ranks - 1, 1)}
    if asked.trace:
        yield variants[0], {"trace": True}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", help="shape:rows or shape:rows:variant,...")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--alone", default="", help="rows,...: dispatch and combine, too")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    todo = []
    for one in asked.shapes:
        name, rows, *variants = one.split(":")
        todo.append((name, int(rows), variants[0].split(",") if variants else ["auto"]))
    rows_alone = [int(rows) for rows in asked.alone.split(",") if rows]
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        jobs = [
            pool.submit(build, "round", name, rows, asked.ranks, variant, how)
            for name, rows, variants in todo
            for variant, how in kernels_of(variants, asked)
        ]
        jobs += [pool.submit(build, "alone", rows, asked.ranks) for rows in rows_alone]
        for job in jobs:
            job.result()
    n.befriend()
    found = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(0), "entries": []}
    figures = [partial(alone_of, rows, asked.ranks, asked) for rows in rows_alone]
    figures += [
        partial(rounds_of, name, rows, asked.ranks, variants, asked)
        for name, rows, variants in todo
    ]
    for figure in figures:
        found["entries"].append(figure())
        torch.cuda.empty_cache()
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1))
    sys.exit(not all(one["right"] for one in found["entries"]))


if __name__ == "__main__":
    main()
