"""A layer as a user of torch writes it: NCCL's all-to-all around ``torch._grouped_mm``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from epmoe.cli.gloo import open_store
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.local import NO_MULTICAST

LIMIT_S = 120.0


def meet(group: Group) -> None:
    """torch.distributed on NCCL for the group's ranks; NVLink multicast stays off."""
    os.environ.update(NO_MULTICAST)
    serve = group.rank == 0
    store = open_store(0, serve=True) if serve else None
    said = group.allgather(
        str(store.port).encode() if store else b"", what="port of the store", limit_s=LIMIT_S
    )
    store = store or open_store(int(said[0]), serve=False)
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        "nccl", store=store, rank=group.rank, world_size=group.size, device_id=device
    )


class Moved:
    """Which rows go where in one batch: what dispatch and combine are built from."""

    def __init__(self, config: MoEConfig, ranks: int, ids: Tensor) -> None:
        """Collective; waits for the GPU once, since all_to_all_single wants counts on the host."""
        local, flat = config.slots_per_rank(ranks), ids.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        ones = torch.ones_like(flat)
        counts = torch.zeros(config.places, dtype=flat.dtype, device=flat.device)
        counts.scatter_add_(0, flat, ones)
        self.theirs = torch.empty_like(counts)
        dist.all_to_all_single(self.theirs, counts)
        both = torch.stack((counts, self.theirs)).view(2, ranks, local).sum(2)
        self.to, self.fro = both.tolist()
        self.came = sum(self.fro)

    def there(self, sent: Tensor) -> Tensor:
        """Rows in the order of their experts → rows of my experts, source by source."""
        came = sent.new_empty(self.came, sent.shape[1])
        dist.all_to_all_single(came, sent, self.fro, self.to)
        return came

    def back(self, done: Tensor) -> Tensor:
        """The way back."""
        cells = done.new_empty(len(self.order), done.shape[1])
        dist.all_to_all_single(cells, done, self.to, self.fro)
        return cells


class Nccl:
    """Sort, exchange counts, exchange rows, group by expert, two grouped GEMMs, and all the way
    back: eager torch, the weighted sum as one batched product with router weights in bf16."""

    def __init__(self, config: MoEConfig, group: Group, weights: Mapping[str, Tensor]) -> None:
        self._config, self._ranks = config, group.size
        self._local = config.slots_per_rank(group.size)
        gated = config.gated
        self._w1 = torch.cat((weights["w1"], weights["w3"]), 1) if gated else weights["w1"]
        self._w2, self._b1, self._b2 = weights["w2"], None, weights.get("b2")
        if config.bias:
            self._b1 = torch.cat((weights["b1"], weights["b3"]), 1) if gated else weights["b1"]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One forward of this rank's rows."""
        choices, moved = ids.shape[1], Moved(self._config, self._ranks, ids)
        came = moved.there(x[moved.order // choices])
        slots = torch.arange(self._local, device=x.device).repeat(self._ranks)
        slot = slots.repeat_interleave(moved.theirs, output_size=moved.came)
        by_slot = torch.argsort(slot, stable=True)
        ends = moved.theirs.view(self._ranks, self._local).sum(0).cumsum(0).to(torch.int32)
        y = self._experts(came[by_slot], slot[by_slot], ends)
        done = torch.empty_like(y)
        done[by_slot] = y
        cells = y.new_empty(len(moved.order), x.shape[1])
        cells[moved.order] = moved.back(done)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), cells.view(*ids.shape, -1)).squeeze(1)

    def _experts(self, rows: Tensor, slot: Tensor, ends: Tensor) -> Tensor:
        grouped: Any = torch._grouped_mm
        mid = grouped(rows, self._w1.transpose(1, 2), offs=ends)
        if self._b1 is not None:
            mid += self._b1[slot]
        y: Tensor = grouped(self._activated(mid), self._w2.transpose(1, 2), offs=ends)
        if self._b2 is not None:
            y += self._b2[slot]
        return y

    def _activated(self, mid: Tensor) -> Tensor:
        clamp, activation = self._config.clamp, self._config.activation
        if not self._config.gated:
            mid = mid.clamp(max=clamp)
            return functional.gelu(mid) if activation == "gelu" else functional.relu(mid).square()
        gate, up = mid.chunk(2, -1)
        if clamp != float("inf"):
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        if activation == "swiglu":
            return functional.silu(gate) * up
        if activation == "geglu":
            return functional.gelu(gate) * up
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
