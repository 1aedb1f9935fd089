"""The process behind a rank's number."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

_FORM = struct.Struct("<4sIQQQ36s64s")  # mark, pid, started, pid space, net space, boot, host
_MARK = b"epm1"
PACKED = _FORM.size


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank as the operating system knows it.

    A pid alone names nobody for long, so ``started`` (clock ticks since boot, from
    ``/proc/PID/stat``) goes with it, and ``boot`` and ``space`` (the inodes of the pid and network
    namespaces) say where that pid means anything.
    """

    rank: int
    host: str
    boot: str
    pid: int
    started: int
    space: tuple[int, int]

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def near(self, other: Peer) -> bool:
        """True if both can see each other's pid and connect by an abstract socket name."""
        return self.boot == other.boot and self.space == other.space

    def pack(self) -> bytes:
        """``PACKED`` bytes that ``unpack`` reads; the rank is the place in the list."""
        return _FORM.pack(
            _MARK, self.pid, self.started, *self.space, self.boot.encode(), self.host.encode()[:64]
        )

    @classmethod
    def unpack(cls, rank: int, packed: bytes) -> Peer:
        """The inverse of ``pack``; a ``ValueError`` if these bytes are no introduction."""
        if len(packed) != PACKED or packed[:4] != _MARK:
            raise ValueError(
                f"introduction of rank {rank} must be {PACKED} bytes that begin with {_MARK!r}, "
                f"got {len(packed)} that begin with {packed[:4]!r}"
            )
        _, pid, started, pids, nets, boot, host = _FORM.unpack(packed)
        text = host.rstrip(b"\0").decode(errors="replace")
        return cls(rank, text, boot.rstrip(b"\0").decode(), pid, started, (pids, nets))

    @classmethod
    def me(cls, rank: int) -> Peer:
        """This process, as ``rank``."""
        seen = process(os.getpid())
        return cls(
            rank=rank,
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            started=seen[1] if seen else 0,
            space=(_space("pid"), _space("net")),
        )


def process(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, or None if there is no such process.

    >>> process(os.getpid())[0]         # the reader of its own state is running
    'R'
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(b")")[2].split()  # the name before it may hold spaces and brackets
    return fields[0].decode(), int(fields[19])


def state_of(peer: Peer) -> str:
    """The state letter of a peer on this host (``T`` stopped, ``D`` in the kernel, ``Z`` ended).

    ``X`` if it is gone, also when its pid belongs to another process by now; ``?`` if this process
    cannot look, as when it is out of descriptors: a fault being reported must not become another.
    """
    try:
        seen = process(peer.pid)
    except OSError:
        return "?"
    return seen[0] if seen and seen[1] == peer.started else "X"


def ended(peer: Peer) -> bool:
    """True if the process behind this peer runs no more (gone, a zombie, or its pid recycled)."""
    return state_of(peer) in ("X", "Z")


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _space(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino
