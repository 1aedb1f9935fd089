"""The signals of a round: publish, wait, leave.

A word is 64 bits with one writer and one reader: ``round(32) | parity(1) | value(31)``.  Words only
grow, nothing resets them, so a reader that comes late or twice sees the same thing.  Three of them
per pair of ranks and lane: C (my counts and lists are in your mailbox), Y (my results are in your
cells and I am done with your rows) and leave (I will not publish anything of this round or later).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from epmoe.comm.atomics import load, store
from epmoe.comm.heap import Heap
from epmoe.comm.layout import Layout
from epmoe.errors import Evicted, PeerLost

C, Y, LEAVE = 0, 1, 2
KINDS = ("C", "Y", "leave")
ROUNDS = 1 << 32
VALUES = 1 << 31
HOWS = ("exited", "raised", "stopped", "corrupt", "closed")  # the first known cause is reported
STOPPED = ("T", "t")  # process states: by a signal, by a debugger


def pause(spins: int = 0) -> None:
    """The one place where a rank gives way; the simulator replaces it with its baton.

    ``spins`` 0 is a point other ranks may see in between and costs nothing here.  In a wait the
    first turns give the core away (four ranks on two cores: 40 µs a turn against 9,900 without);
    after some milliseconds it sleeps, so that a long wait leaves the cores to those who work.
    """
    if spins:
        if spins < 200:
            os.sched_yield()
        else:
            time.sleep(0.00005)


def word(round: int, value: int) -> int:
    """An even number of ones, so that any odd number of flipped bits is seen at once.

    >>> hex(word(1, 5)), hex(word(1, 1))
    ('0x180000005', '0x100000001')
    """
    w = (round % ROUNDS) << 32 | value
    return w | (w.bit_count() & 1) << 31


@dataclass(frozen=True, slots=True)
class LastWords:
    """What a leaving rank says: how it left, on whose account, in which round, and its text."""

    how: str
    ranks: tuple[int, ...]
    round: int
    text: str

    def encoded(self, limit: int) -> bytes:
        """UTF-8 JSON of at most ``limit`` bytes; the text is cut, the facts never are."""
        for keep in (len(self.text), 1200, 600, 200, 0):
            raw = json.dumps([self.how, self.ranks, self.round, self.text[:keep]]).encode()
            if len(raw) < limit:
                return raw
        raise ValueError(f"last words of {self.ranks} do not fit in {limit} bytes")

    @staticmethod
    def decoded(raw: bytes, writer: int) -> LastWords:
        """What ``writer`` left behind; unreadable text counts as leaving by an exception."""
        try:
            how, ranks, round, text = json.loads(raw.rstrip(b"\0") or b"null")
            return LastWords(str(how), tuple(int(r) for r in ranks), int(round), str(text))
        except (ValueError, TypeError):
            return LastWords("raised", (writer,), 0, "its last words cannot be read")


class Words:
    """One lane's words in this rank's slab, and its cells in every peer's slab.

    ``lost`` is the watch's record of ended processes (rank → how), read without a lock.
    ``describe`` turns a rank into the text that names it in messages.
    """

    def __init__(
        self,
        heap: Heap,
        placed: Layout,
        lane: int,
        *,
        lost: Mapping[int, str],
        describe: Callable[[int], str],
        state_of: Callable[[int], str],
    ) -> None:
        self.rank, self.ranks = heap.rank, heap.ranks
        self._lost, self._describe, self._state_of = lost, describe, state_of
        at = placed.lanes[lane][0]["words"].at
        self._mine = _cells(heap.mine, at, 3 * self.ranks)
        self._theirs = [_cells(heap.peer(r), at, 3 * self.ranks) for r in range(self.ranks)]
        say = placed.rank["last_words"]
        self._say = [heap.peer(r)[say.at : say.at + say.bytes] for r in range(self.ranks)]

    def publish(self, kind: int, peer: int, round: int, value: int) -> None:
        """Everything stored before this call is visible to whoever sees the word."""
        store(self._theirs[peer], kind * self.ranks + self.rank, word(round, value))

    def seen(self, kind: int, src: int) -> int:
        """The word of ``src`` as it stands now."""
        return load(self._mine, kind * self.ranks + src)

    def wait(self, kind: int, round: int, limit_s: float) -> list[int]:
        """Values of all ranks' words of this round; one of four exits is taken, always.

        The word came; the peer's process ended; the peer left; nothing came for ``limit_s``.  Only
        a rank whose word is lacking can end the wait: a rank that published and then died has
        given this round all it owes.
        """
        spins, started = 0, 0.0
        lacking = list(range(self.ranks))
        while True:
            # Read who is gone before the words: a word published just before the end still counts.
            gone = [r for r in lacking if r in self._lost or self.seen(LEAVE, r)]
            pause(spins)
            lacking = [r for r in lacking if not self._came(kind, r, round)]
            if not lacking:
                return [self.seen(kind, r) % VALUES for r in range(self.ranks)]
            if gone := [r for r in gone if r in lacking and self._left_by(r, round)]:
                raise self._loss(gone, kind, round)
            spins += 1
            if spins % 64 == 1:
                now = time.monotonic()
                started = started or now
                if now - started > limit_s:
                    raise self._stalled(lacking, kind, round, now - started)

    def leave(self, why: LastWords) -> None:
        """Tell every peer that nothing of ``why.round`` or later will come from this rank."""
        raw = why.encoded(len(self._say[self.rank]))
        self._say[self.rank][: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self._say[self.rank][len(raw) :] = 0
        for peer in range(self.ranks):
            self.publish(LEAVE, peer, why.round, 1 + HOWS.index(why.how))

    def report(self) -> str:
        """The word table of a fault message: round of C and of Y, rank by rank."""
        cells = (f"{r} {self.seen(C, r) >> 32}/{self.seen(Y, r) >> 32}" for r in range(self.ranks))
        return "  words (C/Y): rank " + "   ".join(cells)

    def close(self) -> None:
        """Drop every view of the heap, so that it can be unmapped."""
        self._mine = memoryview(bytearray())
        self._theirs.clear()
        self._say.clear()

    def _came(self, kind: int, src: int, round: int) -> bool:
        w = self.seen(kind, src)
        behind = (round - (w >> 32)) % ROUNDS
        # A peer is at most one round behind a rank that waits for it, and never ahead.
        if w.bit_count() & 1 or behind > 1:
            raise PeerLost(
                f"the word {KINDS[kind]} of {self._describe(src)} reads {w:#018x} in round "
                f"{round}: no round writes that.\n{self.report()}",
                ranks=(src,),
                how="corrupt",
                round=round,
            )
        return behind == 0

    def _left_by(self, src: int, round: int) -> bool:
        """True if ``src`` owes this round and will not pay: dead, or left in it or before it."""
        w = self.seen(LEAVE, src)
        if w.bit_count() & 1:
            return True
        return src in self._lost or (w != 0 and (round - (w >> 32)) % ROUNDS < ROUNDS // 2)

    def _loss(self, gone: list[int], kind: int, round: int) -> PeerLost | Evicted:
        causes = []
        for src in gone:
            left = self.seen(LEAVE, src)
            if left.bit_count() & 1:
                text = f"the word leave of {self._describe(src)} reads {left:#018x}"
                causes.append(LastWords("corrupt", (src,), round, text))
            elif left:
                causes.append(LastWords.decoded(bytes(self._say[src].tolist()), src))
            else:
                causes.append(LastWords("exited", (src,), round, "its process ended"))
        if any(self.rank in cause.ranks for cause in causes):
            return Evicted(
                f"rank {self.rank}: the others went on without this rank in round {round}: "
                + "; ".join(cause.text for cause in causes)
            )
        first = min(causes, key=lambda cause: HOWS.index(cause.how) if cause.how in HOWS else 1)
        ranks = sorted({r for cause in causes for r in cause.ranks if cause.how == first.how})
        names = ", ".join(self._describe(r) for r in ranks)
        return PeerLost(
            f"{names} {first.how} in round {round}; this rank ({self.rank}) was waiting for "
            f"{KINDS[kind]}: {first.text}\n{self.report()}\n  This heap is closed on all ranks.",
            ranks=tuple(ranks),
            how=first.how,
            round=round,
        )

    def _stalled(self, lacking: list[int], kind: int, round: int, waited: float) -> PeerLost:
        """A peer that itself waits for a stopped one is silent too: the stopped one is blamed."""
        states = {r: self._state_of(r) for r in lacking}
        blamed = [r for r in lacking if states[r] in STOPPED] or lacking
        told = ", ".join(f"{self._describe(r)} is in state {states[r]}" for r in blamed)
        return PeerLost(
            f"nothing came for {waited:.1f} s in round {round}; this rank ({self.rank}) was "
            f"waiting for {KINDS[kind]}: {told}\n{self.report()}\n"
            "  This heap is closed on all ranks.",
            ranks=tuple(blamed),
            how="stopped",
            round=round,
        )


def _cells(slab: torch.Tensor, at: int, count: int) -> memoryview:
    return slab[at : at + 8 * count].numpy().data.cast("Q")
