"""Connects the ranks of one host with each other, and nobody else.

Every rank listens on an abstract socket with a random name: Linux keeps it in memory, so there is
no file to squat, to link or to leave behind.  The name is no secret, so whoever knocks is judged:
the user by SO_PEERCRED, the process by the pid it introduced itself with, the job by the nonce.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.comm.peer import Peer, ended
from epmoe.comm.watch import Watch
from epmoe.errors import EpmoeError, PeerLost

log = logging.getLogger("epmoe")

NONCE = 32
NAME = 24  # "\0epmoe-" and 17 random hex digits
CALLER_S = 5.0  # a caller that has not said who it is by then is sent away
WAITING = 64  # callers heard at once besides the ranks; one more sends the oldest away
_HELLO = struct.Struct(f"<8s{NONCE}sII")  # mark, nonce, my rank, ranks
_MARK = b"epmoe-1\0"
_CRED = struct.Struct("3i")  # pid, uid, gid


@dataclass(slots=True)
class _Caller:
    """Somebody who connected and has not yet said who it is."""

    link: socket.socket
    pid: int
    until: float
    said: bytes = b""


def listen() -> tuple[socket.socket, bytes]:
    """A door of this rank: the listening socket and its abstract name of ``NAME`` bytes."""
    name = b"\0epmoe-" + secrets.token_hex(9)[:17].encode()
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    door.bind(name)
    door.listen(1024)
    return door, name


def credentials(link: socket.socket) -> tuple[int, int]:
    """Pid and user id of the process at the other end, as the kernel recorded them."""
    pid, uid, _ = _CRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CRED.size))
    return pid, uid


def hello(nonce: bytes, rank: int, ranks: int) -> bytes:
    """What a rank says first, so that the door knows which one it is."""
    return _HELLO.pack(_MARK, nonce, rank, ranks)


def connect(
    me: int,
    peers: Sequence[Peer],
    door: socket.socket,
    names: Sequence[bytes],
    nonce: bytes,
    watch: Watch,
    links: dict[int, socket.socket],
    limit_s: float,
) -> None:
    """One socket to every peer into ``links``: rank r calls the ranks below, answers those above.

    ``PeerLost`` at once if a peer ends on the way, and after ``limit_s`` if one does not come; the
    caller closes what is in ``links`` by then.  Callers that are refused are logged, no more.
    """
    callers: dict[int, _Caller] = {}
    until = time.monotonic() + limit_s
    try:
        while len(links) < len(peers) - 1:
            for rank in range(me):
                if rank not in links and rank not in watch.lost:
                    called = _call(peers[rank], names[rank], hello(nonce, me, len(peers)))
                    if called:
                        links[rank] = called
            absent = [p for p in peers if p.rank != me and p.rank not in links]
            if not absent:
                break
            if watch.lost:  # connected or not; looked up, so that a victim never hides its cause
                lost = [p for p in peers if p.rank in watch.lost or ended(p)]
                raise _lost(me, lost, "exited", "ended while the ranks were connecting")
            if time.monotonic() > until:
                why = f"did not connect within {limit_s:g} s (state {watch.state_of(absent[0])})"
                raise _lost(me, absent, "stopped", why)
            _listen(door, callers, watch, absent, until)
            _answer(me, peers, callers, links, nonce)
    finally:
        for caller in callers.values():
            caller.link.close()


def _lost(me: int, lost: Sequence[Peer], how: str, text: str) -> PeerLost:
    who = ", ".join(str(p) for p in lost)
    return PeerLost(f"{who} {text}; seen by rank {me}", ranks=tuple(p.rank for p in lost), how=how)


def _call(peer: Peer, name: bytes, words: bytes) -> socket.socket | None:
    """Connect to a peer's door; None if it is full or just closing and worth another try."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        link.connect(name)
        pid, uid = credentials(link)
        if (pid, uid) != (peer.pid, os.geteuid()):
            raise EpmoeError(f"the door of {peer} is held by pid {pid} of user {uid}")
        link.send(words, socket.MSG_NOSIGNAL)
    except (BlockingIOError, ConnectionError):
        link.close()
        return None
    except BaseException:
        link.close()
        raise
    return link


def _listen(
    door: socket.socket,
    callers: dict[int, _Caller],
    watch: Watch,
    absent: Sequence[Peer],
    until: float,
) -> None:
    """Sleep until somebody calls, speaks, ends or runs out of time; let new callers in."""
    poll = select.poll()
    ends = (watch.fds[p.rank] for p in absent if p.rank in watch.fds)
    for fd in (door.fileno(), *callers, *ends):
        poll.register(fd, select.POLLIN)
    # 10 ms: a door that was full is tried again, and the watch may be blind.
    poll.poll(max(0.0, min(0.01, until - time.monotonic())) * 1e3)
    while True:
        try:
            link, _ = door.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNABORTED):
                return
            raise
        link.setblocking(False)
        pid, uid = credentials(link)
        if uid != os.geteuid():
            log.warning("refused a caller of another user (pid %d, user %d)", pid, uid)
            link.close()
            continue
        if len(callers) >= WAITING + len(absent):
            _refuse(callers, next(iter(callers)), "too many callers that say nothing")
        callers[link.fileno()] = _Caller(link, pid, time.monotonic() + CALLER_S)


def _refuse(callers: dict[int, _Caller], fd: int, why: str) -> None:
    caller = callers.pop(fd)
    log.warning("refused a caller (pid %d): %s", caller.pid, why)
    caller.link.close()


def _answer(
    me: int,
    peers: Sequence[Peer],
    callers: dict[int, _Caller],
    links: dict[int, socket.socket],
    nonce: bytes,
) -> None:
    """Hear every caller; the ones that prove to be a missing rank become links."""
    for fd, caller in list(callers.items()):
        try:
            more = caller.link.recv(_HELLO.size - len(caller.said))
        except BlockingIOError:
            if time.monotonic() > caller.until:
                _refuse(callers, fd, f"said nothing for {CALLER_S:g} s")
            continue
        except OSError as error:
            _refuse(callers, fd, str(error))
            continue
        caller.said += more
        if not more:
            _refuse(callers, fd, "hung up before it said who it is")
        elif len(caller.said) == _HELLO.size:
            why, rank = judge(caller.said, caller.pid, me, peers, nonce)
            if not why and rank in links:
                why = f"rank {rank} is connected already"
            if why:
                _refuse(callers, fd, why)
            else:
                links[rank] = callers.pop(fd).link


def judge(said: bytes, pid: int, me: int, peers: Sequence[Peer], nonce: bytes) -> tuple[str, int]:
    """Why this caller is not a rank that should call me ("" if it is), and the rank it claims."""
    mark, theirs, rank, ranks = _HELLO.unpack(said)
    if mark != _MARK:
        return "not the words of a rank", -1
    if not hmac.compare_digest(theirs, nonce):
        return "it belongs to another job (nonce)", -1
    if ranks != len(peers) or not me < rank < ranks:
        return f"it claims rank {rank} of {ranks}, expected {me + 1} to {len(peers) - 1}", rank
    if pid != peers[rank].pid:
        return f"it claims to be {peers[rank]}", rank
    return "", rank
