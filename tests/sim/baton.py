"""Ranks as threads of one process that run one at a time; the seed alone decides who is next.

The real host code runs: only ``words.pause`` (the one place a rank gives way) is replaced, the heap
is made of byte arrays, and the group is a name tag.
"""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import torch

from epmoe.comm import words
from epmoe.comm.layout import layout
from epmoe.moe import MoE
from epmoe.runtime import Runtime

STEPS = 200_000  # more than any case needs: a case that gets here hangs


class Hang(BaseException):
    """No rank can finish.  Not an Exception: nothing on the way may catch it."""


class Baton:
    def __init__(self, ranks, seed):
        self.rng = random.Random(seed)
        self.go = [threading.Semaphore(0) for _ in range(ranks)]
        self.back = threading.Semaphore(0)
        self.live = list(range(ranks))
        self.at = -1
        self.steps = 0

    def pause(self, spins=0):
        me = self.at
        self.back.release()
        self.go[me].acquire()
        if self.steps > STEPS:
            raise Hang

    def run(self, body):
        """``body(rank)`` on every rank; rank → what it raised."""
        errors = {}

        def rank(me):
            self.go[me].acquire()
            try:
                body(me)
            except (Exception, Hang) as error:
                errors[me] = error
            self.live.remove(me)
            self.back.release()

        threads = [threading.Thread(target=rank, args=(me,), daemon=True) for me in self.live]
        for thread in threads:
            thread.start()
        # Two-phase: first whether this run has a slow rank at all, then who it is.
        slow = self.rng.choice([None, *self.live])
        real, words.pause = words.pause, self.pause
        try:
            while self.live:
                fast = [r for r in self.live if r != slow or self.rng.random() < 0.1]
                self.at = self.rng.choice(fast or self.live)
                self.steps += 1
                self.go[self.at].release()
                self.back.acquire()
        finally:
            words.pause = real
        for thread in threads:
            thread.join()
        return errors


class BytesHeap:
    generation = 1

    def __init__(self, rank, slabs):
        self.rank, self.ranks, self._slabs = rank, len(slabs), slabs

    @property
    def mine(self):
        return self._slabs[self.rank]

    def peer(self, rank):
        return self._slabs[rank]

    def close(self):
        pass


def layers(configs, ranks, *, poison=True):
    """``[rank][layer]``: MoE objects over one heap of byte arrays, no weights loaded yet.

    Rows, lists and results start as NaN or nonsense: whoever reads what nobody wrote is found.
    """
    placed = layout(configs, ranks)
    slabs = [torch.zeros(placed.total, dtype=torch.uint8) for _ in range(ranks)]
    if poison:
        for slab in slabs:
            for at in placed.lanes:
                for layer in at:
                    for name in ("rows", "lists", "results", "weights"):
                        region = layer[name]
                        slab[region.at : region.at + region.bytes] = 0xFF
    made = []
    for rank in range(ranks):
        group = SimpleNamespace(
            rank=rank,
            size=ranks,
            peers=[f"rank {r}" for r in range(ranks)],
            watch=SimpleNamespace(lost={}, state_of=lambda peer: "R"),
        )
        runtime = Runtime(configs, group, BytesHeap(rank, slabs), placed)
        made.append([MoE(runtime, layer) for layer in range(len(configs))])
    return made
