"""Rounds on a GPU: one launch each, and what experts that move need around it."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.comm.device import DeviceSlabs
from epmoe.comm.words import Words
from epmoe.errors import EpmoeError
from epmoe.kernels.choose import Chooser
from epmoe.kernels.cuda import CudaOps, laid_out
from epmoe.kernels.fused import FusedOps
from epmoe.kernels.moving import Carrier, CudaCarrier
from epmoe.kernels.ops import HEAD_FIELDS, VERBS
from epmoe.migration import Migration
from epmoe.rounds import Freight, Head, Tensors, linear
from epmoe.runtime import Lane, Runtime
from epmoe.sched.placement import Placement
from epmoe.shared import shared_rows

VERB = HEAD_FIELDS.index("verb")


class CudaRounds:
    """A round is one launch on the caller's stream; nothing here waits for the GPU.

    What a forward carries is laid out before its launch and fetched after it, before anything else:
    the next round's Y says that it has been read, one round before its half is filled again.  A
    round without rows is made of the split verbs, whose fetches run beside the words.
    """

    def __init__(
        self, runtime: Runtime, layer: int, lane: int, weights: Tensors, shared: Tensors
    ) -> None:
        words = runtime.lanes[lane].words
        if isinstance(words, Words):
            raise EpmoeError("rounds on a GPU need a device heap")
        self._runtime, self._config, self._words = runtime, runtime.configs[layer], words
        self._layer, self._lane = layer, lane
        pools = runtime.lanes[lane].pools
        self.ops = FusedOps(
            self._config, runtime.placed, layer=layer, lane=lane, words=words, pools=pools
        )
        self._verbs: CudaOps | None = None  # made when experts move for the first time
        self._weights, self._shared = weights, shared
        placement = linear(runtime, self._config)
        self._chooser = Chooser(self._config, placement, runtime.group.rank)
        self._table = self._chooser.table
        self._expert_of_S = torch.tensor(placement.expert_of_S, device="cpu")
        # Counts up to a change of placement, and what the slots held until then.
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._counted = torch.zeros(self._config.places, dtype=torch.int64, device="cpu")
        self._rows_E = torch.zeros(self._config.experts, dtype=torch.int64, device="cpu")

    def kept(self, tensors: Tensors) -> Tensors:
        """See ``Rounds``; the kernels' layout is made here, never in a forward."""
        return laid_out(self._config, tensors)

    def adopt(self) -> None:
        """See ``Rounds``."""
        self.ops.adopt(self._weights)

    def place(self, placement: Placement) -> None:
        """See ``Rounds``.  Captured graphs choose by it too: the tables stay where they are."""
        self._unread.append((self.ops.loads.clone(), self._expert_of_S))
        self._expert_of_S = torch.tensor(placement.expert_of_S, device="cpu")
        self._chooser.place(placement)

    def slots(self, ids: Tensor) -> Tensor:
        """See ``Rounds``.  Where every expert has one slot, the round itself looks it up."""
        return self._chooser.slots(ids) if self._table is None else ids

    def run(
        self, turn: Lane, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Freight
    ) -> Tensor:
        """See ``Rounds``.  The round number that counts is the GPU's: graphs replay."""
        out = torch.empty_like(x)
        if freight is not None and VERBS[head[VERB]] == "place":
            self._carry(x, slots, weights, head, freight)
        else:
            if freight is not None:
                freight.load()
            shared = shared_rows(self._config, self._shared, x)
            self.ops.round(x, slots, weights, head, out, shared, self._table)
            if freight is not None:
                freight.unload()
                freight.landed(now=True)
        if turn.round == 1:
            self._words.limit(self._config.stall_s)
        turn.round += 1
        return out

    def _carry(
        self, x: Tensor, slots: Tensor, weights: Tensor, head: Head, freight: Migration
    ) -> None:
        """A round without rows, for its freight alone."""
        if self._verbs is None:
            self._verbs = CudaOps(
                self._config,
                self._runtime.placed,
                layer=self._layer,
                lane=self._lane,
                words=self._words,
                rows=0,
            )
        verbs = self._verbs
        freight.load()
        verbs.stage(x, slots, weights, head)
        verbs.pull()
        freight.unload()
        freight.landed()
        verbs.push()
        verbs.reduce(slots, weights, None, x)

    def counted(self) -> Tensor:
        """See ``Rounds``; waits for the GPU, whatever stream the rounds were on."""
        torch.cuda.synchronize()
        rows_E = self._rows_E.clone()
        for loads, expert_of_S in (*self._unread, (self.ops.loads, self._expert_of_S)):
            total = loads.cpu()
            rows_E.scatter_add_(0, expert_of_S, total - self._counted)
            self._counted = total
        self._unread.clear()
        self._rows_E = rows_E
        return rows_E

    def carrier(self) -> Carrier:
        """See ``Rounds``."""
        heap = self._runtime.heap
        if not isinstance(heap, DeviceSlabs):
            raise EpmoeError(f"freight on a GPU needs a device heap, got {type(heap).__name__}")
        return CudaCarrier(heap, self._runtime.placed.rank["freight"])

    def settled(self) -> None:
        """See ``Rounds``."""
        torch.cuda.synchronize()
        self._words.check()

    def check(self, *, wait: bool) -> None:
        """See ``Rounds``.  Without ``wait`` it reads page-locked memory only: fit for a capture."""
        if wait:
            torch.cuda.synchronize()
        self._words.check()
        if not wait:
            return
        if bad := self.ops.bad():
            raise ValueError(
                f"ids: {bad} choices so far were outside -1..{self._config.experts - 1}; they "
                "counted as -1"
            )

    def close(self) -> None:
        """See ``Rounds``."""
