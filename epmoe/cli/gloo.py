"""Dispatch and combine as a user of torch.distributed writes them: the peer of ``epmoe bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.formats import DTYPE

LIMIT_S = 60.0


BLOCK = 64  # rows summed at a time: both fp32 blocks stay in a core's cache


class Gloo:
    """The same by all_to_all_single, as a careful user writes it: memory is kept between rounds.

    (With fresh memory and whole tensors in the sum it took 2.5 times the time of its all-to-alls.)
    """

    def __init__(self, config: MoEConfig, group: Group, rows: int) -> None:
        self._ranks, self._each = group.size, config.slots_per_rank(group.size)
        serve = group.rank == 0
        store = open_store(0, serve=True) if serve else None
        port = str(store.port).encode() if store else b""
        port = group.allgather(port, what="port of the store", limit_s=LIMIT_S)[0]
        store = store or open_store(int(port), serve=False)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
        kind, cells = DTYPE[config.dtype], rows * config.choices
        self._sorted: Tensor
        self._back: Tensor
        self._sorted, self._back, self._cells = torch.empty(3, cells, config.hidden, dtype=kind)
        self._came = torch.empty(0, config.hidden, dtype=kind)
        self._total, self._term = torch.empty(2, BLOCK, config.hidden)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every row back from each of its choices, weighted and summed."""
        order, counts = self.sort(x, ids)
        to, fro = self.counts(counts)
        self.exchange(to, fro)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        cells = torch.index_select(self._back, 0, place, out=self._cells)
        cells = cells.view(*ids.shape, x.shape[1])
        out = torch.empty_like(x)
        for at in range(0, len(x), BLOCK):
            block = slice(at, min(at + BLOCK, len(x)))
            total, term = (t[: block.stop - at] for t in (self._total, self._term))
            total.zero_()
            for k in range(ids.shape[1]):
                total.add_(term.copy_(cells[block, k]).mul_(weights[block, k, None]))
            out[block] = total
        return out

    def bare(self, x: Tensor, ids: Tensor) -> Callable[[], Tensor]:
        """The three all-to-alls alone, everything else done before."""
        _, counts = self.sort(x, ids)
        to, fro = self.counts(counts)
        theirs, back = torch.empty_like(counts), self._back

        def moves() -> Tensor:
            dist.all_to_all_single(theirs, counts)
            self.exchange(to, fro)
            return back

        return moves

    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, sorted by expert; the cells in that order, and how many go to each expert."""
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        torch.index_select(x, 0, order // ids.shape[1], out=self._sorted)
        return order, torch.bincount(flat, minlength=self._ranks * self._each)

    def counts(self, counts: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        to, fro = (c.view(self._ranks, self._each).sum(1).tolist() for c in (counts, theirs))
        return to, fro

    def exchange(self, to: list[int], fro: list[int]) -> None:
        """Rows to their experts and, as they are, back."""
        if sum(fro) > len(self._came):
            self._came = self._came.new_empty(sum(fro), self._came.shape[1])
        came = self._came[: sum(fro)]
        dist.all_to_all_single(came, self._sorted, fro, to)
        dist.all_to_all_single(self._back, came, to, fro)

    def close(self) -> None:
        """The process group was made here."""
        dist.destroy_process_group()


def open_store(port: int, *, serve: bool) -> Any:
    """Where gloo's ranks of this machine meet; port 0 takes a free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    return TCPStore("127.0.0.1", port, is_master=serve, wait_for_workers=False)
