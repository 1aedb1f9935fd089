"""The published DeepSeek load balancer, bit for bit: the planner that ours is measured against.

All sums and quotients are float32 and every tie goes to the first candidate, as published, so the
same loads give the same slots.  It starts from nothing at every call: after a small drift it moves
most slots.  ``balance.rebalance`` is the one to use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from epmoe.sched.loads import checked_loads
from epmoe.sched.placement import Placement

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def published(
    loads: Any, *, slots: int, ranks: int, groups: int = 1, hosts: int = 1
) -> tuple[Placement, ...]:
    """One placement per layer of loads [E] or [N, E].

    Hierarchical if ``groups`` (of consecutive experts, as the router's) is a multiple of
    ``hosts``: whole groups are packed onto hosts first.  Otherwise global: hosts are ignored.
    A layer with no load at all is planned as if all experts were equal.
    """
    weight_NE = checked_loads(loads).astype(np.float32)
    experts = weight_NE.shape[1]
    check_shape(experts, slots, ranks)
    for name, value, divided, by in (
        ("groups", groups, "experts", experts),
        ("hosts", hosts, "ranks", ranks),
    ):
        if value < 1 or by % value:
            raise ValueError(f"{name} must divide {divided} ({by}), got {value}")
    if groups % hosts:
        groups = hosts = 1
    expert_NS = _hierarchical(weight_NE, slots, groups, hosts, ranks)
    return tuple(Placement.of(row, experts=experts, ranks=ranks) for row in expert_NS)


def check_shape(experts: int, slots: int, ranks: int) -> None:
    """A ``ValueError`` unless ``slots`` hold every expert and divide evenly over ``ranks``."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if slots < experts or slots % ranks:
        raise ValueError(
            f"slots must be at least experts ({experts}), a multiple of ranks ({ranks}), "
            f"got {slots}"
        )


def _hierarchical(weight_NE: Floats, slots: int, groups: int, hosts: int, ranks: int) -> Ints:
    """Groups onto hosts, replicas inside each host, replicas onto its ranks: expert of every slot.

    In between, experts are numbered in the order of their hosts ("near" ids), so that each host is
    one row of [N * hosts, experts / hosts].
    """
    layers, experts = weight_NE.shape
    size = experts // groups
    sums_NG = torch.from_numpy(weight_NE).view(-1, groups, size).sum(-1).numpy()
    host_NG, place_NG = _pack(sums_NG, hosts)
    first_NG = (host_NG * (groups // hosts) + place_NG) * size
    near_NE = (first_NG[:, :, None] + np.arange(size)).reshape(layers, experts)
    expert_NE = np.argsort(near_NE, axis=1)  # a permutation's inverse
    weight_HE = weight_NE[np.arange(layers)[:, None], expert_NE].reshape(-1, experts // hosts)

    near_HS, counts_HE = _replicate(weight_HE, slots // hosts)
    each_HE = np.divide(weight_HE, counts_HE, dtype=np.float32)
    every = np.arange(len(each_HE))[:, None]
    rank_HS, place_HS = _pack(each_HE[every, near_HS], ranks // hosts)
    order_HS = np.argsort(rank_HS * (slots // ranks) + place_HS, axis=1)
    near_NHS = np.take_along_axis(near_HS, order_HS, 1).reshape(layers, hosts, -1)
    near_NHS = near_NHS + np.arange(hosts)[None, :, None] * (experts // hosts)
    return np.take_along_axis(expert_NE, near_NHS.reshape(layers, slots), 1)


def _replicate(weight_NE: Floats, slots: int) -> tuple[Ints, Ints]:
    """One slot each, then every spare slot to the expert with the most load per replica."""
    layers, experts = weight_NE.shape
    expert_NS = np.tile(np.arange(slots), (layers, 1))
    counts_NE = np.ones((layers, experts), np.int64)
    every = np.arange(layers)
    for slot in range(experts, slots):
        hot_N = (weight_NE / counts_NE.astype(np.float32)).argmax(1)
        expert_NS[:, slot] = hot_N
        counts_NE[every, hot_N] += 1
    return expert_NS, counts_NE


def _pack(weight_NM: Floats, packs: int) -> tuple[Ints, Ints]:
    """Heaviest first, each to the lightest pack with room; returns (pack, place in it)."""
    layers, items = weight_NM.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (layers, 1)), np.zeros((layers, items), np.int64)
    order_NM = np.argsort(-weight_NM, axis=1, kind="stable")
    pack_NM = np.empty((layers, items), np.int64)
    place_NM = np.empty((layers, items), np.int64)
    sums_NP = np.zeros((layers, packs), np.float32)
    full_NP = np.zeros((layers, packs), np.float32)  # 0, or infinity once the pack is full
    used_NP = np.zeros((layers, packs), np.int64)
    every = np.arange(layers)
    for item_N in order_NM.T:
        pack_N = (sums_NP + full_NP).argmin(1)
        pack_NM[every, item_N] = pack_N
        place_NM[every, item_N] = used_NP[every, pack_N]
        sums_NP[every, pack_N] += weight_NM[every, item_N]
        used_NP[every, pack_N] += 1
        full_NP[every, pack_N] = np.where(used_NP[every, pack_N] == room, np.inf, 0)
    return pack_NM, place_NM
