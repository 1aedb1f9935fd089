"""One message between two ranks: how it is written, sent and received piece by piece."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from epmoe.comm.fds import receive, send

LARGEST = 64 << 20  # bytes of one message; a claim of more is not believed
_HEAD = struct.Struct("<4sBBHQQ")  # mark, kind, descriptors, bytes of `what`, number, bytes of body
_MARK = b"epms"
_BYE = struct.Struct("<iB")  # the rank that made me leave or -1, how
CUT = "closed its connection without a word"
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
class Loss:
    """Why a peer's message will not come; ``culprit`` if the peer left because of another."""

    how: str
    text: str
    culprit: int = -1


class Out:
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


class In:
    """One message arriving from one peer.  Not a byte behind it is taken from the socket."""

    def __init__(self) -> None:
        self.data = bytearray(_HEAD.size)
        self.at = 0
        self.head: tuple[bytes, int, int, int, int, int] | None = None
        self.fds: list[int] = []
        self.answer: Answer | None = None
        self.loss: Loss | None = None

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
                self.loss = Loss("closed", CUT)

    def _full(self, number: int) -> None:
        if self.head is None:
            self.head = _HEAD.unpack(self.data)
            mark, kind, _, what, seen, size = self.head
            if mark != _MARK or kind not in list(Kind) or size > LARGEST:
                self.loss = Loss("corrupt", f"sent a head no rank sends: {bytes(self.data).hex()}")
            elif seen != number and kind != Kind.BYE:
                self.loss = Loss("corrupt", f"sent message {seen} where {number} was due")
            else:
                self.data, self.at = bytearray(what + size), 0
            return
        kind, fds, what = Kind(self.head[1]), self.head[2], self.head[3]
        name, body = bytes(self.data[:what]).decode(errors="replace"), bytes(self.data[what:])
        if kind == Kind.BYE:
            culprit, how = _BYE.unpack_from(body.ljust(_BYE.size, b"\0"))
            text = body[_BYE.size :].decode(errors="replace")
            self.loss = Loss(_HOWS[min(how, len(_HOWS) - 1)], text, culprit)
        elif len(self.fds) != fds:
            why = f"sent {fds} descriptors, {len(self.fds)} arrived (open-files limit reached?)"
            self.loss = Loss("corrupt", why)
        else:
            self.answer = Answer(kind, name, body, self.fds)


def head(kind: Kind, what: str, number: int, size: int, fds: int = 0) -> bytes:
    """What goes before a body of ``size`` bytes."""
    name = what.encode()
    return _HEAD.pack(_MARK, kind, fds, len(name), number, size) + name


def farewell(how: str, text: str, culprit: int, number: int) -> bytes:
    """The last message of a rank; ``culprit`` is the rank that made it leave, or -1."""
    body = _BYE.pack(culprit, _HOWS.index(how)) + text.encode()[:4096]
    return head(Kind.BYE, "", number, len(body)) + body
