"""MoE objects of several ranks over one heap of byte arrays, in one process."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from epmoe.comm.layout import layout
from epmoe.comm.words import C, Y
from epmoe.moe import MoE
from epmoe.runtime import Runtime


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


def slabs(configs, ranks):
    """Fresh slabs whose rows, lists and results are NaN or nonsense: nobody may read them."""
    placed = layout(configs, ranks)
    made = [torch.zeros(placed.total, dtype=torch.uint8) for _ in range(ranks)]
    for slab in made:
        for lane in placed.lanes:
            for layer in lane:
                for name in ("rows", "lists", "results", "weights"):
                    region = layer[name]
                    slab[region.at : region.at + region.bytes] = 0xFF
    return placed, made


def layers(configs, ranks, *, first=1):
    """``[rank][layer]``, no weights loaded yet; ``first`` is the round that comes next."""
    placed, made = slabs(configs, ranks)
    found = []
    for rank in range(ranks):
        group = SimpleNamespace(
            rank=rank,
            size=ranks,
            peers=[f"rank {r}" for r in range(ranks)],
            watch=SimpleNamespace(lost={}, state_of=lambda peer: "S"),
        )
        runtime = Runtime(configs, group, BytesHeap(rank, made), placed)
        for lane in runtime.lanes:
            lane.round = first
            for kind in (C, Y):
                for peer in range(ranks if first > 1 else 0):
                    lane.words.publish(kind, peer, first - 1, 0)
        found.append([MoE(runtime, layer) for layer in range(len(configs))])
    return found


def load_alone(moe, tensors):
    """What ``load`` does after its collective check, for one rank of a simulation."""
    for name, tensor in tensors.items():
        (moe._shared if name.startswith("shared_") else moe._weights)[name] = tensor
