"""Everyone gives a message to everyone, or learns at once who is missing."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from epmoe.comm.fds import close_all
from epmoe.comm.message import CUT, Answer, In, Kind, Loss, Out, farewell, head
from epmoe.comm.peer import Peer
from epmoe.comm.watch import LOOK_S, Watch
from epmoe.errors import PeerLost

_END_S = 0.5  # how long a process may take from closing its sockets to its end
_SPIN_S = 2e-4  # without sleeping: ranks that wait awake take 20 us to agree, woken ones 70
_SHORT = 4096  # bytes that are sent with their head: a head alone wakes the peer for nothing


class Mesh:
    """A connected socket to every peer, and the number of exchanges done.

    ``exchange`` is collective; every rank must make the same number of calls.  One thread at a
    time.  After an error the connections are gone and every later call raises that error again.
    """

    def __init__(
        self, me: int, peers: Sequence[Peer], links: dict[int, socket.socket], watch: Watch
    ) -> None:
        self.me = me
        self.peers = tuple(peers)
        self.links = links
        self.watch = watch
        self.number = 0
        self.broken: PeerLost | None = None

    def exchange(
        self, kind: Kind, what: str, body: bytes, *, limit_s: float, fd: int | None = None
    ) -> dict[int, Answer]:
        """Give ``body`` to every peer and get the message of each, whatever its kind or ``what``.

        A peer's death counts only while its message is missing: what it sent before is read
        first.  ``PeerLost`` otherwise, and the other ranks are told whose fault it is.
        """
        if self.broken:
            raise PeerLost(str(self.broken), ranks=self.broken.ranks, how=self.broken.how)
        self.number += 1
        first = head(kind, what, self.number, len(body), fd is not None)
        parts = (first, body) if len(body) > _SHORT else (first + body,)
        outs = {rank: Out(parts, fd) for rank in self.links}
        ins = {rank: In() for rank in self.links}
        try:
            self._run(outs, ins, what, limit_s)
        except BaseException as error:
            for one in ins.values():
                close_all(one.fds)
            lost = error if isinstance(error, PeerLost) else None
            culprit, how = (lost.ranks[0], lost.how) if lost else (-1, "raised")
            self.broken = lost or PeerLost(
                f"rank {self.me} left the group by {type(error).__name__}: {error}",
                ranks=(self.me,),
                how="raised",
            )
            self.leave(how, str(error) or type(error).__name__, culprit=culprit, outs=outs)
            raise
        return {rank: one.answer for rank, one in ins.items() if one.answer}

    def _run(self, outs: dict[int, Out], ins: dict[int, In], what: str, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        ends = {fd: rank for rank, fd in self.watch.fds.items()}
        ended: set[int] = set()
        while True:
            ended |= self.watch.lost.keys()  # before reading: what a dead rank sent is complete now
            for rank, link in self.links.items():
                outs[rank].pump(link)
                ins[rank].pump(link, self.number)
                if rank in ended:
                    outs[rank].parts = []
                    if ins[rank].loss is None and ins[rank].answer is None:
                        ins[rank].loss = Loss("exited", "ended")
            losses = {rank: one.loss for rank, one in ins.items() if one.loss}
            if losses:
                for rank in (r for r in ins if not ins[r].answer and r not in losses):
                    if self.watch.state_of(self.peers[rank]) in "XZ":  # the cause beside a victim
                        losses[rank] = Loss("exited", "ended")
                raise self._lost(losses, ended, what)
            busy = [r for r in self.links if outs[r].parts or not ins[r].answer]
            if not busy:
                return
            left = until - time.monotonic()
            if left <= 0:
                for rank in busy:
                    state = self.watch.state_of(self.peers[rank])
                    text = f"sent nothing for {limit_s:g} s (state {state})"
                    losses[rank] = Loss("stopped", text)
                raise self._lost(losses, ended, what)
            if limit_s - left < _SPIN_S:
                continue
            poll = select.poll()
            for rank in busy:
                write = select.POLLOUT if outs[rank].parts else 0
                read = 0 if ins[rank].answer else select.POLLIN
                poll.register(self.links[rank], write | read)
                if rank in self.watch.fds:
                    poll.register(self.watch.fds[rank], select.POLLIN)
            for fd, _ in poll.poll(min(left, LOOK_S if self.watch.blind else left) * 1e3):
                if fd in ends:
                    ended.add(ends[fd])

    def _lost(self, losses: dict[int, Loss], ended: set[int], what: str) -> PeerLost:
        """The error for what is known now.  A rank that left because of another is no cause."""
        cut = [rank for rank, loss in losses.items() if loss.text == CUT]
        if all(x.text == CUT for x in losses.values()):
            self._until_one_ends(cut)
        for rank in cut:
            if rank in ended or self.watch.state_of(self.peers[rank]) in "XZ":
                losses[rank] = Loss("exited", "ended")
        if any(x.how == "exited" for x in losses.values()):  # then the silent ones left for it
            losses = {rank: x for rank, x in losses.items() if x.text != CUT}
        blamed = {x.culprit: x for x in losses.values() if x.culprit in self.links}
        roots = {rank: x for rank, x in losses.items() if x.culprit == -1} or blamed or losses
        ranks = tuple(sorted(roots))
        lines = [
            x.text if x.culprit == r else f"{self.peers[r]} {x.text or x.how}"
            for r, x in ((r, roots[r]) for r in ranks)
        ]
        text = "; ".join(lines) + f" (rank {self.me} was waiting for {what!r})"
        return PeerLost(text, ranks=ranks, how=roots[ranks[0]].how)

    def _until_one_ends(self, ranks: Sequence[int]) -> None:
        """Wait a moment for processes whose sockets are closed: one may be on its way out."""
        until = time.monotonic() + _END_S
        while time.monotonic() < until:
            if any(self.watch.state_of(self.peers[rank]) in "XZ" for rank in ranks):
                return
            time.sleep(0.001)

    def leave(
        self, how: str, text: str, *, culprit: int = -1, outs: dict[int, Out] | None = None
    ) -> None:
        """Tell every peer that can be told without waiting, then close.  Local, idempotent."""
        bye = farewell(how, text, culprit, self.number)
        for rank, link in self.links.items():
            if not (outs and outs[rank].begun and outs[rank].parts):  # never into half a message
                Out((bye,), None).pump(link)
            link.close()
        self.links = {}
