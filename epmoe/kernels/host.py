"""The verbs in torch on the host heap: the living definition of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmoe.comm import words as signals
from epmoe.comm.heap import Heap
from epmoe.comm.layout import Layout, Region, record
from epmoe.comm.words import C, Words, Y
from epmoe.config import MoEConfig
from epmoe.errors import ConfigMismatch, PeerLost
from epmoe.formats import DTYPE, format_of
from epmoe.formats.expert import expert
from epmoe.kernels.ops import HEAD_FIELDS, VERBS
from epmoe.sched.plan import Plan, plan, request

REDUCED = 1 << 19  # fp32 values summed at a time: 2 MiB, near the core, and their pages are kept

Items = npt.NDArray[np.void]  # rows as opaque items, which numpy moves whole


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The offsets of a round, the cells each source asked for, and the rows of every slot of all
    ranks: private copies, safe to keep after the first Y has left."""

    plan: Plan
    cells_R: tuple[npt.NDArray[np.int64], ...]
    rows_S: Tensor


class HostOps:
    """One layer on one lane.  ``weights`` holds the format's per-slot tensors of this rank."""

    def __init__(
        self,
        config: MoEConfig,
        heap: Heap,
        placed: Layout,
        *,
        layer: int,
        lane: int,
        words: Words,
        weights: Mapping[str, Tensor],
        describe: Callable[[int], str],
    ) -> None:
        self.config, self.words, self.weights, self.describe = config, words, weights, describe
        self.rank, self.ranks = heap.rank, heap.ranks
        at = placed.lanes[lane][layer]
        slabs = [heap.peer(rank) for rank in range(self.ranks)]

        def everywhere(name: str, dtype: torch.dtype) -> list[Tensor]:
            return [_view(slab, at[name], dtype) for slab in slabs]

        # Small things go through numpy: a call of torch takes ten times as long.
        self._heads = [heads.numpy() for heads in everywhere("heads", torch.int64)]
        self._counts = [counts.numpy() for counts in everywhere("counts", torch.int32)]
        self._lists = [lists.numpy() for lists in everywhere("lists", torch.int32)]
        self._weights = everywhere("weights", torch.float32)
        rows = everywhere("rows", torch.uint8)
        self._parts = record(config)[0]
        # The slab is viewed, not the tensor: torch gives some empty ones a stride of 0.
        self._staged = {
            name: rows[self.rank][:, start : start + part.nbytes].view(part.dtype)
            for name, (start, part) in self._parts.items()
        }
        self._rows = [_items(records) for records in rows]
        results = everywhere("results", DTYPE[config.dtype])
        self._results = results[self.rank]
        self._cells = [_items(cells) for cells in results]
        self._pool = rows[self.rank].new_empty(0, rows[self.rank].shape[1])
        self._block = max(1, min(config.max_rows, REDUCED // (config.choices * config.hidden)))
        terms = (self._block, config.choices, config.hidden)
        self._terms = torch.empty(terms, dtype=torch.float32, device="cpu")
        # My right neighbour first, me last: no rank is everyone's first.
        self._peers = tuple((self.rank + 1 + step) % self.ranks for step in range(self.ranks))

    def stage(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, head: tuple[int, ...], round: int
    ) -> None:
        """See ``Ops``.  Every peer gets its mailbox before its word, also when it is empty."""
        rows = len(x_TH)
        staged = format_of(self.config).stage_rows(self.config, self.weights, x_TH)
        for name, mine in self._staged.items():
            mine[:rows] = staged[name].flatten(1)
        if self.config.weight_in == "fc2":
            self._weights[self.rank][:rows] = weights_TK
        signals.pause()
        ask = request(slots_TK, self.ranks, self.config.slots_per_rank(self.ranks))
        head_8, counts_S, cells_R = np.array(head), ask.counts_RL.reshape(-1), ask.cells_R()
        for peer in self._peers:
            self._heads[peer][self.rank] = head_8
            self._counts[peer][self.rank] = counts_S
            signals.pause()
            cells = cells_R[peer]
            self._lists[peer][self.rank, : len(cells)] = cells
            signals.pause()
            self.words.publish(C, peer, round, len(cells))

    def wait_plan(self, round: int, limit_s: float) -> HostPlan:
        """See ``Ops``.  After the first Y a mailbox may hold the next round: copy it here."""
        asked_R = self.words.wait(C, round, limit_s)
        heads = self._heads[self.rank].copy()
        counts_RS = self._counts[self.rank].astype(np.int64)
        slots = self.config.slots_per_rank(self.ranks)
        counts_RL = counts_RS[:, self.rank * slots : (self.rank + 1) * slots]
        lists = self._lists[self.rank]
        cells_R = tuple(lists[src, :asked].astype(np.int64) for src, asked in enumerate(asked_R))
        self._check_heads(heads, round)
        cells = self.config.max_rows * self.config.choices
        least_R, sum_R = counts_RL.min(1).tolist(), counts_RL.sum(1).tolist()
        for src, asked in enumerate(asked_R):
            if sum_R[src] != asked or least_R[src] < 0:
                counts = counts_RL[src].tolist()
                self._corrupt(src, round, f"counts {counts} for a word of {asked} rows")
            # An entry below zero is a very large one without its sign.
            if asked and cells_R[src].view(np.uint64).max() >= cells:
                self._corrupt(src, round, f"a list entry outside 0..{cells - 1}")
        return HostPlan(plan(counts_RL), cells_R, torch.from_numpy(counts_RS.sum(0)))

    def pull(self, plan: HostPlan) -> tuple[Tensor, Tensor]:
        """See ``Ops``: the records of all asked rows, and the router weights of their choices."""
        if len(self._pool) < plan.plan.rows:  # kept: fresh pages cost more than the rows
            self._pool = self._pool.new_empty(plan.plan.rows, self._pool.shape[1])
        records, by_fc2 = self._pool[: plan.plan.rows], self.config.weight_in == "fc2"
        weights = torch.empty(plan.plan.rows if by_fc2 else 0, dtype=torch.float32, device="cpu")
        into = _items(records)
        for src in self._peers:
            cells, span = plan.cells_R[src], plan.plan.source(src)
            # They are in range (wait_plan has looked); "clip" only spares numpy a second copy.
            np.take(self._rows[src], cells // self.config.choices, out=into[span], mode="clip")
            if by_fc2:
                weights[span] = self._weights[src].view(-1)[torch.from_numpy(cells)]
            signals.pause()
        return records, weights

    def ffn(self, rows: tuple[Tensor, Tensor], plan: HostPlan) -> Tensor:
        """See ``Ops``.  A slot's rows are gathered in (source, token, choice) order: one GEMM."""
        raw, weights = rows
        parts = {
            name: raw[:, at : at + part.nbytes].view(part.dtype).view(len(raw), *part.shape)
            for name, (at, part) in self._parts.items()
        }
        y_NH = torch.empty(
            len(raw), self.config.hidden, dtype=DTYPE[self.config.dtype], device="cpu"
        )
        for slot in range(self.config.slots_per_rank(self.ranks)):
            pieces = plan.plan.pieces(slot)
            if not pieces:
                continue
            mine = {name: torch.cat([part[p] for p in pieces]) for name, part in parts.items()}
            weights_T = torch.cat([weights[p] for p in pieces])  # empty unless fc2 applies them
            y_TH = expert(self.config, self.weights, slot, mine, weights_T)
            for p, y in zip(
                pieces, torch.split(y_TH, [p.stop - p.start for p in pieces]), strict=True
            ):
                y_NH[p] = y
        return y_NH

    def push(self, y_NH: Tensor, plan: HostPlan, round: int) -> None:
        """See ``Ops``.  A source with no row for me gets its Y all the same: it waits for it."""
        results = _items(y_NH)
        for src in self._peers:
            self._cells[src][plan.cells_R[src]] = results[plan.plan.source(src)]
            signals.pause()
            self.words.publish(Y, src, round, 0)

    def reduce(
        self,
        slots_TK: Tensor,
        weights_TK: Tensor,
        shared_TH: Tensor | None,
        round: int,
        limit_s: float,
    ) -> Tensor:
        """See ``Ops``.  The cell of an unused choice holds some older round's bits: never read."""
        self.words.wait(Y, round, limit_s)
        rows, choices = slots_TK.shape
        cells = self._results[: rows * choices].view(rows, choices, self.config.hidden)
        out = torch.empty(rows, self.config.hidden, dtype=DTYPE[self.config.dtype], device="cpu")
        unused_TK1, weights_TK1 = (slots_TK < 0)[:, :, None], weights_TK[:, :, None]
        masked = bool(unused_TK1.any())
        for start in range(0, rows, self._block):
            block = slice(start, min(start + self._block, rows))
            # All choices at once, as they lie: one by one took twice as long from cold memory.
            terms = self._terms[: block.stop - start].copy_(cells[block])
            if self.config.weight_in == "reduce":
                terms.mul_(weights_TK1[block])
            if masked:
                terms.masked_fill_(unused_TK1[block], 0.0)
            total = terms[:, 0]
            for k in range(1, choices):
                total.add_(terms[:, k])  # not addcmul_: it may fuse, and then rounds once
            if shared_TH is not None:
                total.add_(shared_TH[block])
            out[block] = total
        return out

    def close(self) -> None:
        """See ``Ops``."""
        for views in (self._heads, self._counts, self._lists, self._weights, self._rows):
            views.clear()
        self._staged.clear()
        self._results = self._results.new_empty(0)
        self._cells.clear()

    def _check_heads(self, heads: npt.NDArray[np.int64], round: int) -> None:
        mine = heads[self.rank].tolist()
        for src, theirs in enumerate(heads.tolist()):
            for name, a, b in zip(HEAD_FIELDS, mine, theirs, strict=True):
                if a != b:
                    if name == "verb" and 0 <= b < len(VERBS):
                        a, b = VERBS[a], VERBS[b]
                    raise ConfigMismatch(
                        f"round {round}: {name} is {a} on {self.describe(self.rank)} and {b} on "
                        f"{self.describe(src)}; ranks must make the same calls in the same order"
                    )

    def _corrupt(self, src: int, round: int, what: str) -> None:
        raise PeerLost(
            f"the mailbox of {self.describe(src)} holds {what} in round {round}\n"
            f"{self.words.report()}\n  This heap is closed on all ranks.",
            ranks=(src,),
            how="corrupt",
            round=round,
        )


def _view(slab: Tensor, region: Region, dtype: torch.dtype) -> Tensor:
    return slab[region.at : region.at + region.bytes].view(dtype).view(region.shape)


def _items(rows: Tensor) -> Items:
    """Each row as one opaque item: numpy moves such items whole.

    Scattering 512 rows of 2 KiB so takes 20 µs; index_copy_ in bf16 took 142, in int64 80.
    """
    raw = rows.view(torch.uint8).numpy()
    return raw.view(np.dtype((np.void, raw.shape[1])))[:, 0]
