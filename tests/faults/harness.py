"""Ranks with known traffic, what they leave behind, and how they end."""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from sim.draw import draw_step, slots_of, weights_of
from sim.oracle import expected

from epmoe import local
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.moe import MoE

CONFIG = MoEConfig(
    experts=12,
    choices=2,
    hidden=64,
    inner=32,
    max_rows=16,
    dtype="fp32",
    stall_s=20.0,
    open_s=20.0,
)


class Traffic:
    """Steps of ``ranks`` ranks and the right answers, made once, before the ranks are forked."""

    def __init__(self, ranks, config=CONFIG, steps=12, seed=1):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.config, self.ranks = config, ranks
        Group.alone().close()  # what its first use imports is there before the ranks are forked
        self.weights = weights_of(config, g, ranks)
        self.steps = [draw_step(rng, g, [config], ranks) for _ in range(steps)]
        self.wanted = [expected(step, config, self.weights) for step in self.steps]

    def open(self, group, **changed):
        moe = MoE.open(replace(self.config, **changed), group)
        per_rank = self.config.slots_per_rank(group.size)
        try:
            moe.load(**slots_of(self.weights, group.rank, per_rank))
        except BaseException:
            moe.close()
            raise
        return moe

    def run(self, moe, rank, number):
        """One step; True if the answer is right."""
        step = self.steps[number % len(self.steps)]
        out = moe(step.x_R[rank], step.ids_R[rank], step.weights_R[rank], context=step.context)
        return torch.equal(
            out.nan_to_num(7e7), self.wanted[number % len(self.steps)][rank].nan_to_num(7e7)
        )


class Board:
    """One number per rank that parent and ranks all see."""

    def __init__(self, ranks):
        self.memory = mmap.mmap(-1, 8 * ranks)
        self.ranks = ranks

    def __setitem__(self, rank, value):
        struct.pack_into("q", self.memory, 8 * rank, value)

    def __getitem__(self, rank):
        return struct.unpack_from("q", self.memory, 8 * rank)[0]

    def wait(self, least, limit_s=20.0):
        """Until every rank has at least this number."""
        until = time.monotonic() + limit_s
        while min(self[rank] for rank in range(self.ranks)) < least:
            assert time.monotonic() < until, [self[rank] for rank in range(self.ranks)]
            time.sleep(0.0005)


def belongings():
    """What a process must not keep of a heap: descriptors, mappings, names, threads."""
    maps = Path("/proc/self/maps").read_text()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "slabs": maps.count("epmoe"),
        "shm": sorted(n for n in os.listdir("/dev/shm") if "epmoe" in n),
        "tmp": sorted(n for n in os.listdir("/tmp") if n.startswith("epmoe")),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def until_it_ends(traffic, rank, board, *, act=None, most=1_000_000, **changed):
    """Run rounds until something is raised; a report of how it ended and of what is left.

    ``act(moe, number)`` is called before every round.
    """
    before = belongings()
    done = wrong = 0
    report = {"error": None}
    with Group.from_env() as group:
        moe = traffic.open(group, **changed)
        try:
            for number in range(most):
                if act:
                    act(moe, number)
                wrong += not traffic.run(moe, rank, number)
                done += 1
                board[rank] = done
        except (EpmoeError, KeyboardInterrupt, ArithmeticError) as error:
            report = {
                "error": type(error).__name__,
                "how": getattr(error, "how", None),
                "ranks": list(getattr(error, "ranks", ())),
                "text": str(error),
                "at": time.monotonic(),
            }
        closing = time.monotonic()
        moe.close()
        moe.close()
        report["closing"] = time.monotonic() - closing
        del moe
    report["left"] = left_since(before)
    return report | {"done": done, "wrong": wrong}


def left_since(before):
    """What is there now and was not before."""
    after = belongings()
    return {name: (before[name], after[name]) for name in after if after[name] != before[name]}


def start(ranks, body):
    return local.fork_ranks(ranks, body, end_others=False)


def shmem():
    """MiB of shared memory in use on this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) / 1024
    raise AssertionError
