"""Passes file descriptors between ranks that proved who they are."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epmoe.comm.group import Group

_ROOM = 4  # descriptors we make room for, so that a second one is seen and closed, not cut off


def pass_fds(group: Group, fd: int, *, what: str, limit_s: float) -> dict[int, int]:
    """Give ``fd`` to every peer and get one from each: ``{peer's rank: new descriptor}``.

    Collective.  The descriptors are close-on-exec and belong to the caller; ``fd`` stays the
    caller's too.  All or nothing: if this raises, every descriptor that had arrived is closed.
    Only ranks that were let in by the door (same user, introduced pid, the job's nonce) are on
    the other ends; nothing is looked up by name or by pid.
    """
    try:
        os.fstat(fd)
    except OSError as error:
        raise ValueError(f"fd must be an open descriptor, got {fd}") from error
    return group.exchange_fds(fd, what=what, limit_s=limit_s)


def send(link: socket.socket, data: memoryview, fd: int | None) -> int:
    """Send some bytes without waiting; ``fd`` rides on the first of them.  Bytes sent."""
    if fd is None:
        return link.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    return link.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(link: socket.socket, data: memoryview) -> tuple[int, list[int]]:
    """Receive into ``data`` without waiting: bytes read, and the descriptors that came along."""
    room = socket.CMSG_SPACE(_ROOM * array.array("i").itemsize)
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    count, rights, _, _ = link.recvmsg_into([data], room, flags)
    fds = array.array("i")
    for level, kind, body in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return count, list(fds)


def close_all(fds: list[int]) -> None:
    """Close every descriptor of the list and empty it."""
    while fds:
        os.close(fds.pop())
