"""Rounds of up to eight ranks that share the GPUs of one process, bit for bit against one rank:

python tests/gpu/neighbours.py [--ranks 8,4] [--tight]

A rank is a slab, its words, a stream and a share of a GPU's processors, so that all ranks run at a
time.  That checks what a kernel of many ranks computes.  It does not check how descriptors travel,
and where all ranks share one GPU nothing crosses a link.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

# Before CUDA starts: a queue for each rank's launch, and no code that is loaded, which waits for
# the GPU, while a round waits for its peers.
os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}

import torch
from fused_ranks import CASES, SMALL, batch, tighten
from fused_round import Alone, processors, say, weights_of
from there_and_back import came_back, turned, were_asked

from epmoe.comm.layout import layout
from epmoe.kernels import sizes
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.cuda import FEW as FEW_ROWS
from epmoe.kernels.cuda import CudaOps, laid_out
from epmoe.kernels.cuda import compiled as split_kernels
from epmoe.kernels.fused import FusedOps
from epmoe.kernels.fused import compiled as fused_kernel
from epmoe.kernels.gemm import constants, processors_of
from epmoe.kernels.ops import forward_head
from epmoe.kernels.sizes import up_columns
from epmoe.kernels.transport import Transport
from epmoe.kernels.transport import compiled as transport_kernels

LATE = 400_000  # clock cycles, 0.2 ms
APART = replace(SMALL, experts=32, choices=6, hidden=2880, max_rows=200)


def device_of(rank):
    return rank % torch.cuda.device_count()


def share(ranks, gpus):
    """Processors of each rank, whole clusters."""
    return processors_here() // -(-ranks // gpus) // 2 * 2


@functools.cache
def processors_here():
    """Of a GPU; of an H200 where there is none."""
    return processors_of(0) if torch.cuda.is_available() else 132


class Neighbour:
    """A rank: its words, its GPU, its stream."""

    def __init__(self, rank, ranks, nbytes, *, device, limit_s=5.0):
        self.rank, self.device = rank, device
        with torch.cuda.device(device):
            self.words = Alone(nbytes, limit_s)
            self.stream = torch.cuda.Stream()
        self.words.rank, self.words.ranks = rank, ranks

    @contextmanager
    def at_work(self):
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield


def neighbours(ranks, nbytes, devices=device_of, **how):
    """All ranks, each with the slabs of all."""
    made = [Neighbour(r, ranks, nbytes, device=devices(r), **how) for r in range(ranks)]
    for one in made:
        one.words.slabs = [other.words.slab for other in made]
    finish()
    return made


def befriend():
    """Each GPU may reach the others' memory: torch sees to it when it copies."""
    for here in range(torch.cuda.device_count()):
        for there in range(torch.cuda.device_count()):
            torch.zeros(1, device=f"cuda:{here}").to(f"cuda:{there}")


def finish():
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def slots_of(config, weights, rank, ranks):
    """The weights of a rank's slots, on its GPU."""
    local = config.slots_per_rank(ranks)
    return {name: w[rank * local : (rank + 1) * local].to("cuda") for name, w in weights.items()}


def faults(ranks):
    return {one.rank: one.words.said() for one in ranks if one.words.said()[0]}


class Whole:
    """The oracle: the same rows and experts on one rank, by separate launches."""

    @staticmethod
    def compiled(config, ranks):
        """Fill the file cache."""
        whole = replace(config, max_rows=ranks * config.max_rows)
        split_kernels(whole, 1, layout([whole], 1), 0, 0)
        early, inner, hidden = config.weight_in == "fc2", config.inner, config.hidden
        first = (config.experts, up_columns(config), hidden, config.activation, config.bias, early)
        for tall in (0, FEW_ROWS):
            for one in (first, (config.experts, hidden, inner, None, config.bias, early)):
                compile_kernel("grouped_gemm.cu", "grouped_gemm", constants(*one, tall=tall))

    def __init__(self, config, ranks, weights):
        self.config = replace(config, max_rows=ranks * config.max_rows)
        placed = layout([self.config], 1)
        self.ops = CudaOps(self.config, placed, layer=0, lane=0, words=Alone(placed.total))
        self.ops.adopt(laid_out(self.config, weights))

    def __call__(self, batches):
        x, ids, weights = (torch.cat([b[i].to("cuda:0") for b in batches]) for i in range(3))
        out = torch.empty_like(x)
        self.ops.round(x, ids, weights, forward_head(self.config.max_rows), out)
        return out.split([len(b[0]) for b in batches])


KINDS = ("full", "masked", "one", "skewed", "any", "none")


def drawn(config, ranks, rng, kind):
    """A batch of each rank, on its GPU."""
    found = []
    for one in ranks:
        rows = rng.choice([0, 1, config.max_rows // 3, config.max_rows, config.max_rows])
        if kind == "full":
            rows = config.max_rows
        with torch.cuda.device(one.device):
            x, ids, weights = batch(config, rows, kind, rng)
            if kind == "skewed":  # half of all choices to the last rank's slots
                last = config.experts - config.slots_per_rank(len(ranks))
                to = torch.randint_like(ids, last, config.experts)
                ids = torch.where(torch.rand(ids.shape, device="cuda") < 0.5, to, ids)
            found.append((x, ids, weights))
    finish()
    return found


def together(ranks, rng, calls):
    """One call of each rank, started in any order, some late."""
    for one in rng.sample(ranks, len(ranks)):
        with one.at_work():
            if rng.random() < 0.3:
                torch.cuda._sleep(rng.randrange(LATE))
            calls[one.rank]()
    finish()


def check(name, config, size, rounds, far=None, **how):
    """True if rounds in one launch equal one rank's.

    ``far``: of all weights, the batches and that rank's answers; what it finds to be wrong.
    """
    seed = zlib.crc32(repr((name, size, how)).encode())
    torch.manual_seed(seed)
    rng, wrong, gpus = random.Random(seed), [], torch.cuda.device_count()
    placed, grid = layout([config], size), share(size, gpus)
    ranks, weights = neighbours(size, placed.total), weights_of(config)
    whole = Whole(config, size, weights)
    made = []
    for one in ranks:
        with one.at_work(), processors(grid):
            ops = FusedOps(config, placed, layer=0, lane=0, words=one.words, **how)
            ops.adopt(slots_of(config, weights, one.rank, size))
            made.append(ops)
    for i in range(rounds):
        kind = KINDS[i % len(KINDS)]
        batches = drawn(config, ranks, rng, kind)
        want = whole(batches)
        have = [torch.full_like(b[0], float("nan")) for b in batches]
        finish()
        together(
            ranks,
            rng,
            [
                partial(ops.round, *b, forward_head(config.max_rows), out)
                for ops, b, out in zip(made, batches, have, strict=True)
            ],
        )
        off = [
            int((w != h.to("cuda:0")).any(1).sum()) if len(w) else 0
            for w, h in zip(want, have, strict=True)
        ]
        found = [far(weights, batches, want)] if far else []
        if any(off) or faults(ranks) or any(found):
            wrong.append((i, kind, off, faults(ranks), *found))
            break
    said = f"{size} ranks on {gpus} GPUs, {grid} CTAs each"
    say("WRONG" if wrong else "right", name, said, how, f"{rounds} rounds", *wrong)
    return not wrong


def check_alone(config, size, rounds):
    """Dispatch and combine, a launch each."""
    rng, right, gpus = random.Random(2), 0, torch.cuda.device_count()
    placed, grid = layout([config], size), share(size, gpus)
    ranks = neighbours(size, placed.total)
    made = []
    for one in ranks:
        with one.at_work(), processors(grid):
            made.append(Transport(config, placed, layer=0, lane=0, words=one.words))
    for i in range(rounds):
        batches = drawn(config, ranks, rng, KINDS[i % len(KINDS)])
        have = [torch.full_like(b[0], float("nan")) for b in batches]
        asked = torch.cat([b[1].to("cuda:0") for b in batches])
        finish()
        there = [
            partial(ops.dispatch, *b, forward_head(config.max_rows))
            for ops, b in zip(made, batches, strict=True)
        ]
        together(ranks, rng, there)
        good = True
        for one, ops in zip(ranks, made, strict=True):
            with torch.cuda.device(one.device):
                good &= were_asked(asked, turned(ops, one.rank), one.rank)
        finish()
        back = [
            partial(ops.combine, ids, weights, out)
            for ops, (_, ids, weights), out in zip(made, batches, have, strict=True)
        ]
        together(ranks, rng, back)
        good &= all(came_back(config, *b, out) for b, out in zip(batches, have, strict=True))
        right += good and not faults(ranks)
    good = right == rounds
    how = f"{size} ranks on {gpus} GPUs K{config.choices} H{config.hidden} {config.weight_in}"
    say("right" if good else "WRONG", "alone", how, f"{right} of {rounds} rounds", faults(ranks))
    return good


def check_missing(config, size):
    """One rank never comes: every other one leaves at its limit, names it and gives NaN."""
    placed, missing = layout([config], size), size // 2
    ranks = neighbours(size, placed.total, limit_s=0.2)
    made, weights = [], weights_of(config)
    for one in ranks:
        with one.at_work(), processors(share(size, torch.cuda.device_count())):
            ops = FusedOps(config, placed, layer=0, lane=0, words=one.words)
            ops.adopt(slots_of(config, weights, one.rank, size))
            made.append(ops)
    batches = []
    for one in ranks:
        with torch.cuda.device(one.device):
            batches.append(batch(config, config.max_rows, "any", None))
    have = [torch.zeros_like(b[0]) for b in batches]
    finish()
    calls = [
        partial(ops.round, *b, forward_head(config.max_rows), out)
        for ops, b, out in zip(made, batches, have, strict=True)
    ]
    others = [one for one in ranks if one.rank != missing]
    together(others, random.Random(3), calls)
    said = {one.rank: one.words.said()[:3] for one in others}
    stopped = 3  # cu/signals.cuh Why, and its word C
    good = all(s == (stopped, missing, 0) for s in said.values())
    good &= all(bool(torch.isnan(have[one.rank]).all()) for one in others)
    say("right" if good else "WRONG", f"rank {missing} of {size} never came:", said)
    return good


def build(config, size, grid, how, tight):
    """Fill the file cache with what a check needs."""
    if tight:
        tighten()
    placed = layout([config], size)
    if how is None:
        transport_kernels(config, size, placed, 0, 0, grid=grid)
        return
    fused_kernel(config, size, placed, 0, 0, among=(how["cut"],), grid=grid, **how)
    Whole.compiled(config, size)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="8,4")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tight", action="store_true", help="no more ring than must be")
    asked = parser.parse_args()
    if asked.tight:
        tighten()
    gpus, sizes_asked = torch.cuda.device_count(), [int(n) for n in asked.ranks.split(",")]
    all_cuts = (sizes.FEW, sizes.SOME, sizes.MANY)
    ways = [{"cut": cut, "counted": counted} for cut in all_cuts for counted in (True, False)]
    todo = {n: replace(SMALL, **CASES[n]) for n in asked.cases.split(",") if n}
    apart = [replace(APART, weight_in=where) for where in ("reduce", "fc2")]
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        jobs = [
            pool.submit(build, config, size, share(size, gpus), how, asked.tight)
            for size in sizes_asked
            for configs, hows in ((todo.values(), ways), (apart, [None]))
            for config in configs
            for how in hows
        ]
        for job in jobs:
            job.result()
    befriend()
    good = True
    for size in sizes_asked:
        for name, config in todo.items():
            for how in ways:
                good &= check(name, config, size, asked.rounds, **how)
        for config in apart:
            good &= check_alone(config, size, asked.rounds)
        good &= check_missing(SMALL, size)
    sys.exit(not good)


if __name__ == "__main__":
    main()
