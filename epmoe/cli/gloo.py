"""Dispatch and combine as a user of torch.distributed writes them: the peer of ``epmoe bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epmoe.comm.group import Group
from epmoe.config import MoEConfig

LIMIT_S = 60.0


class Gloo:
    """The same by all_to_all_single, as its user has to: sort, counts, rows, results, sum."""

    def __init__(self, config: MoEConfig, group: Group) -> None:
        self._ranks, self._each = group.size, config.slots_per_rank(group.size)
        serve = group.rank == 0
        store = _store(0, serve=True) if serve else None
        port = str(store.port).encode() if store else b""
        port = group.allgather(port, what="port of the store", limit_s=LIMIT_S)[0]
        store = store or _store(int(port), serve=False)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)

    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells by expert, the rows in that order, and how many go to each expert."""
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        return (
            order,
            x[order // ids.shape[1]],
            torch.bincount(flat, minlength=self._ranks * self._each),
        )

    def counts(self, counts: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        to, fro = (c.view(self._ranks, self._each).sum(1).tolist() for c in (counts, theirs))
        return to, fro

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every row back from each of its choices, weighted and summed."""
        order, rows, counts = self.sort(x, ids)
        to, fro = self.counts(counts)
        came = rows.new_empty(sum(fro), rows.shape[1])
        dist.all_to_all_single(came, rows, fro, to)
        back = torch.empty_like(rows)
        dist.all_to_all_single(back, came, to, fro)
        cells = torch.empty_like(back)
        cells[order] = back
        cells = cells.view(*ids.shape, x.shape[1])
        out = torch.zeros(x.shape)
        for k in range(ids.shape[1]):
            out += weights[:, k, None] * cells[:, k].float()
        return out.to(x.dtype)

    def bare(self, x: Tensor, ids: Tensor) -> Callable[[], Tensor]:
        """The three all-to-alls alone, everything else done before."""
        _, rows, counts = self.sort(x, ids)
        to, fro = self.counts(counts)
        came, back = rows.new_empty(sum(fro), rows.shape[1]), torch.empty_like(rows)

        def exchange() -> Tensor:
            theirs = torch.empty_like(counts)
            dist.all_to_all_single(theirs, counts)
            dist.all_to_all_single(came, rows, fro, to)
            dist.all_to_all_single(back, came, to, fro)
            return back

        return exchange

    def close(self) -> None:
        """The process group was made here."""
        dist.destroy_process_group()


def _store(port: int, *, serve: bool) -> Any:
    """Where gloo's ranks of this machine meet; port 0 takes a free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    return TCPStore("127.0.0.1", port, is_master=serve, wait_for_workers=False)
