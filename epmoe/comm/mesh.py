"""Messages between connected ranks: everyone gives one to everyone, or learns who is missing."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from epmoe.comm.fds import close_all, receive, send
from epmoe.comm.peer import Peer
from epmoe.comm.watch import LOOK_S, Watch
from epmoe.errors import PeerLost

LARGEST = 64 << 20  # bytes of one message; a claim of more is not believed
_HEAD = struct.Struct("<4sBBHQQ")  # mark, kind, descriptors, bytes of `what`, number, bytes of body
_MARK = b"epms"
_BYE = struct.Struct("<iB")  # the rank that made me leave or -1, how
_CUT = "closed its connection without a word"
_END_S = 0.5  # how long a process may take from closing its sockets to its end
_HOWS = ("closed", "raised", "exited", "stopped", "corrupt")


class Kind(IntEnum):
    """What a message is."""

    VALUE = 1  # an allgather
    FD = 2  # as VALUE, with exactly one descriptor
    FAILED = 3  # my part went wrong: stands in for whatever was expected of me
    BYE = 4  # I leave; nothing comes after it


@dataclass(slots=True)
class Answer:
    """The message of one peer."""

    kind: Kind
    what: str
    body: bytes
    fds: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Loss:
    """Why a peer's message will not come; ``culprit`` if the peer left because of another."""

    how: str
    text: str
    culprit: int = -1


class _Out:
    """One message on its way to one peer."""

    def __init__(self, parts: Sequence[bytes], fd: int | None) -> None:
        self.parts = [memoryview(p) for p in parts if p]
        self.fd = fd
        self.begun = False

    def pump(self, link: socket.socket) -> None:
        """Send what fits.  A peer that is gone takes nothing more: the reading side judges it."""
        try:
            while self.parts:
                sent = send(link, self.parts[0], self.fd)
                self.begun, self.fd = True, None
                rest = self.parts[0][sent:]
                self.parts[:1] = [rest] if rest else []
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.parts = []


class _In:
    """One message arriving from one peer.  Not a byte behind it is taken from the socket."""

    def __init__(self) -> None:
        self.data = bytearray(_HEAD.size)
        self.at = 0
        self.head: tuple[bytes, int, int, int, int, int] | None = None
        self.fds: list[int] = []
        self.answer: Answer | None = None
        self.loss: _Loss | None = None

    def pump(self, link: socket.socket, number: int) -> None:
        """Take what is there; sets ``answer`` or ``loss`` when it is known."""
        while not (self.answer or self.loss):
            if self.at == len(self.data):
                self._full(number)
                continue
            try:
                count, fds = receive(link, memoryview(self.data)[self.at :])
            except BlockingIOError:
                return
            except ConnectionResetError:
                count, fds = 0, []
            self.fds += fds
            self.at += count
            if not count:
                self.loss = _Loss("closed", _CUT)

    def _full(self, number: int) -> None:
        if self.head is None:
            self.head = _HEAD.unpack(self.data)
            mark, kind, _, what, seen, size = self.head
            if mark != _MARK or kind not in list(Kind) or size > LARGEST:
                self.loss = _Loss("corrupt", f"sent a head no rank sends: {bytes(self.data).hex()}")
            elif seen != number and kind != Kind.BYE:
                self.loss = _Loss("corrupt", f"sent message {seen} where {number} was due")
            else:
                self.data, self.at = bytearray(what + size), 0
            return
        kind, fds, what = Kind(self.head[1]), self.head[2], self.head[3]
        name, body = bytes(self.data[:what]).decode(errors="replace"), bytes(self.data[what:])
        if kind == Kind.BYE:
            culprit, how = _BYE.unpack_from(body.ljust(_BYE.size, b"\0"))
            text = body[_BYE.size :].decode(errors="replace")
            self.loss = _Loss(_HOWS[min(how, len(_HOWS) - 1)], text, culprit)
        elif len(self.fds) != fds:
            why = f"sent {fds} descriptors, {len(self.fds)} arrived (open-files limit reached?)"
            self.loss = _Loss("corrupt", why)
        else:
            self.answer = Answer(kind, name, body, self.fds)


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
        name = what.encode()
        head = _HEAD.pack(_MARK, kind, fd is not None, len(name), self.number, len(body))
        outs = {rank: _Out((head + name, body), fd) for rank in self.links}
        ins = {rank: _In() for rank in self.links}
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

    def _run(self, outs: dict[int, _Out], ins: dict[int, _In], what: str, limit_s: float) -> None:
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
                        ins[rank].loss = _Loss("exited", "ended")
            losses = {rank: one.loss for rank, one in ins.items() if one.loss}
            if losses:
                for rank in (r for r in ins if not ins[r].answer and r not in losses):
                    if self.watch.state_of(self.peers[rank]) in "XZ":  # the cause beside a victim
                        losses[rank] = _Loss("exited", "ended")
                raise self._lost(losses, ended, what)
            busy = [r for r in self.links if outs[r].parts or not ins[r].answer]
            if not busy:
                return
            left = until - time.monotonic()
            if left <= 0:
                state = self.watch.state_of(self.peers[busy[0]])
                text = f"sent nothing for {limit_s:g} s (state {state})"
                raise self._lost({r: _Loss("stopped", text) for r in busy}, ended, what)
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

    def _lost(self, losses: dict[int, _Loss], ended: set[int], what: str) -> PeerLost:
        """The error for what is known now.  A rank that left because of another is no cause."""
        for rank, loss in losses.items():
            if loss.text == _CUT and (rank in ended or self._ends(rank)):
                loss.how, loss.text = "exited", "ended"
        blamed = {x.culprit: x for x in losses.values() if x.culprit in self.links}
        roots = {rank: x for rank, x in losses.items() if x.culprit == -1} or blamed or losses
        ranks = tuple(sorted(roots))
        lines = [
            x.text if x.culprit == r else f"{self.peers[r]} {x.text or x.how}"
            for r, x in ((r, roots[r]) for r in ranks)
        ]
        text = "; ".join(lines) + f" (rank {self.me} was waiting for {what!r})"
        return PeerLost(text, ranks=ranks, how=roots[ranks[0]].how)

    def _ends(self, rank: int) -> bool:
        """Wait a moment for a process whose sockets are closed already: is it on its way out?"""
        until = time.monotonic() + _END_S
        while self.watch.state_of(self.peers[rank]) not in "XZ":
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def leave(
        self, how: str, text: str, *, culprit: int = -1, outs: dict[int, _Out] | None = None
    ) -> None:
        """Tell every peer that can be told without waiting, then close.  Local, idempotent."""
        body = _BYE.pack(culprit, _HOWS.index(how)) + text.encode()[:4096]
        bye = _HEAD.pack(_MARK, Kind.BYE, 0, 0, self.number, len(body)) + body
        for rank, link in self.links.items():
            if not (outs and outs[rank].begun and outs[rank].parts):  # never into half a message
                _Out((bye,), None).pump(link)
            link.close()
        self.links = {}
