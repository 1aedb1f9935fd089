"""One lane's words on GPUs, as the host sees them: kernels publish and wait, the host leaves.

The host tells a waiting kernel that a peer's process ended through page-locked memory that the
kernel reads, and learns from the same kind of memory why a kernel gave up; neither stops the GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch

from epmoe.comm.heap import MOST_DEVICE_RANKS, DeviceHeap
from epmoe.comm.layout import Layout
from epmoe.comm.watch import Watch
from epmoe.comm.words import HOWS, KINDS, LEAVE, ROUNDS, LastWords, word
from epmoe.errors import ConfigMismatch, PeerLost

REPORT = struct.Struct("<IIIIQQ")  # cu/signals.cuh Report
DIFFERS = len(HOWS) + 1  # cu/signals.cuh Why, after those of HOWS


class DeviceWords:
    """Round number, fault, report and limit of one lane; ``world`` is what kernels get by value."""

    def __init__(
        self,
        heap: DeviceHeap,
        placed: Layout,
        lane: int,
        *,
        watch: Watch,
        describe: Callable[[int], str],
        state_of: Callable[[int], str],
        head_fields: tuple[str, ...],
        limit_s: float,
    ) -> None:
        self.rank, self.ranks, self._heap = heap.rank, heap.ranks, heap
        self._describe, self._state_of, self._head_fields = describe, state_of, head_fields
        self._words_at = placed.lanes[lane][0]["words"].at
        self._say = placed.rank["last_words"]
        self._numbers = torch.tensor([1, 0, int(limit_s * 1e9)], device="cuda")
        self._report = torch.zeros(REPORT.size, dtype=torch.uint8, device="cpu").pin_memory()
        self._seen = self._report.numpy().data
        self._gone = torch.zeros(self.ranks, dtype=torch.int32, device="cpu").pin_memory()
        # A stream of its own: a leave must reach the peers while a kernel of ours still waits.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        watch.on_loss(self._lost)

    def world(self) -> bytes:
        """The struct ``World`` of cu/signals.cuh."""
        slabs = [self._heap.address(rank) for rank in range(self.ranks)]
        slabs += [0] * (MOST_DEVICE_RANKS - self.ranks)
        at = self._numbers.data_ptr()
        return struct.pack(
            "<8Q5QII",
            *slabs,
            at,
            at + 8,
            self._report.data_ptr(),
            self._gone.data_ptr(),
            at + 16,
            self.rank,
            0,
        )

    def limit(self, limit_s: float) -> None:
        """The longest wait of the launches that follow on the current stream."""
        self._numbers[2:] = int(limit_s * 1e9)

    def round(self) -> int:
        """The round that comes next, as the GPU has it now; waits for nothing that is queued."""
        with torch.cuda.stream(self._stream):
            return int(self._numbers[0].item())

    def leave(self, why: LastWords) -> None:
        """Tell every peer that nothing of ``why.round`` or later will come from this rank."""
        said = why.encoded(self._say.bytes)
        text = torch.zeros(self._say.bytes, dtype=torch.uint8, device="cpu")
        text[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        raw = word(why.round % ROUNDS, 1 + HOWS.index(why.how)).to_bytes(8, "little")
        leave = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        at = self._words_at + 8 * (LEAVE * self.ranks + self.rank)
        with torch.cuda.stream(self._stream):
            self._heap.write(self.rank, self._say.at, text, self._stream.cuda_stream)
            for peer in range(self.ranks):
                self._heap.write(peer, at, leave, self._stream.cuda_stream)
        self._stream.synchronize()

    def check(self) -> None:
        """Raise what a kernel reported, if one did.  Reads page-locked memory only."""
        why, rank, kind, round, word_seen, waited = REPORT.unpack(self._seen)
        if not why:
            return
        if why == DIFFERS:
            raise ConfigMismatch(
                f"round {round}: {self._head_fields[kind]} differs between "
                f"{self._describe(self.rank)} and {self._describe(rank)} ({word_seen}); ranks must "
                "make the same calls in the same order"
            )
        how, said = HOWS[why - 1], ""
        ranks: tuple[int, ...] = (rank,)
        if how != "corrupt" and self._left(rank):  # it may have left because of a third rank
            last = LastWords.decoded(self._heap.read(rank, self._say.at, self._say.bytes), rank)
            how, ranks, said = last.how, last.ranks, f": {last.text}"
        elif how == "stopped":
            said = f" (state {self._state_of(rank)}), {waited / 1e9:.1f} s passed"
        names = ", ".join(self._describe(r) for r in ranks)
        what = KINDS[kind] if kind < len(KINDS) else "its own blocks"
        raise PeerLost(
            f"{names} {how} in round {round}; this rank ({self.rank}) was waiting for {what}, the "
            f"word read {word_seen:#018x}{said}\n  This heap is closed on all ranks.",
            ranks=ranks,
            how=how,
            round=round,
        )

    def _left(self, rank: int) -> bool:
        at = self._words_at + 8 * (LEAVE * self.ranks + rank)
        return any(self._heap.read(self.rank, at, 8))

    def report(self) -> str:
        """The word table of a fault message: round of C and of Y, rank by rank."""
        raw = self._heap.read(self.rank, self._words_at, 16 * self.ranks)
        words = struct.unpack(f"<{2 * self.ranks}Q", raw)
        cells = (f"{r} {words[r] >> 32}/{words[self.ranks + r] >> 32}" for r in range(self.ranks))
        return "  words (C/Y): rank " + "   ".join(cells)

    def close(self) -> None:
        """Let every kernel of this lane that still waits leave, so that unmapping need not wait."""
        stop = torch.tensor([1 + HOWS.index("closed")], device="cpu").pin_memory()
        with torch.cuda.stream(self._stream):
            self._numbers[1:2].copy_(stop, non_blocking=True)
        self._stream.synchronize()

    def _lost(self, rank: int, how: str) -> None:
        self._gone[rank] = 1
