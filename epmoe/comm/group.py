"""Who the ranks are, and what they tell each other outside of rounds."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from epmoe.comm import door as doors
from epmoe.comm import launcher, meeting
from epmoe.comm.fds import close_all
from epmoe.comm.mesh import Mesh
from epmoe.comm.message import LARGEST, Answer, Kind
from epmoe.comm.peer import PACKED, Peer
from epmoe.comm.watch import Watch
from epmoe.config import LONGEST_S
from epmoe.errors import ConfigMismatch, EpmoeError, PeerLost

MEET_S = 300.0  # ranks may start minutes apart: containers, imports, queues
CONNECT_S = 30.0  # once they have met all are alive, so connecting takes milliseconds
TOLD = "_told_by_epmoe"  # of an error: by which group, after how many exchanges


def check_limit(limit_s: float) -> None:
    """A number of seconds that the system can wait."""
    if not isinstance(limit_s, (int, float)) or not 0 < limit_s <= LONGEST_S:
        raise ValueError(f"limit_s must be above 0 and at most {LONGEST_S}, got {limit_s!r}")


@dataclass(slots=True)
class Said:
    """What the ranks tell each other when a guarded phase ends."""

    mine: bytes = b""
    by_rank: list[bytes] = field(default_factory=list)


class Group:
    """The ranks of one job, each proved to be the process it says, with a watch on each.

    ``from_env`` finds the launcher; ``from_torch`` and ``from_mpi`` take what the caller already
    has and never initialise or destroy it.  Afterwards everything goes over sockets between the
    ranks of this host, so that a death is seen at once in every phase.  ``allgather``, ``guarded``
    and ``fds.pass_fds`` are collective: same order on every rank, one thread at a time.
    """

    def __init__(self, met: meeting.Meeting, *, limit_s: float = MEET_S) -> None:
        check_limit(limit_s)
        self.rank, self.size = met.rank, met.size
        self._opener = os.getpid()
        self._common: EpmoeError | None = None  # the last error that all ranks raised alike
        self._exchanges = 0
        self._closed = False
        self._mesh: Mesh | None = None
        share = secrets.token_bytes(doors.NONCE)
        door, name = doors.listen()
        watch: Watch | None = None
        try:
            me = Peer.me(self.rank)
            said = met.meet(me.pack() + name + share, limit_s)
            if len(said) != self.size:
                raise EpmoeError(f"{len(said)} introductions for {self.size} ranks")
            self.peers = tuple(Peer.unpack(r, one[:PACKED]) for r, one in enumerate(said))
            near = [p.rank for p in self.peers if p.near(me)]
            self.one_host = len(near) == self.size
            known = met.local_rank
            self.local_rank = near.index(self.rank) if known is None else known
            self.watch = watch = Watch(me, self.peers)
            if self.one_host:
                names = [one[PACKED : PACKED + doors.NAME] for one in said]
                nonce = hashlib.sha256(b"".join(one[-doors.NONCE :] for one in said)).digest()
                self._mesh = Mesh(self.rank, self.peers, {}, watch)
                within = min(CONNECT_S, limit_s)
                doors.connect(
                    self.rank, self.peers, door, names, nonce, watch, self._mesh.links, within
                )
                self.allgather(b"", what="forming the group", limit_s=CONNECT_S)
        except BaseException as error:
            self._leave_by(error)
            if watch:
                watch.close()
            raise
        finally:
            door.close()

    @classmethod
    def from_env(cls, *, limit_s: float = MEET_S) -> Group:
        """The ranks this process was started with: epmoe.local, torchrun, mpirun, Slurm, alone."""
        return cls(launcher.from_env(os.environ), limit_s=limit_s)

    @classmethod
    def from_torch(cls, process_group: Any = None, *, limit_s: float = MEET_S) -> Group:
        """The ranks of a torch.distributed group (the default one if None); it stays yours."""
        return cls(meeting.Torch(process_group), limit_s=limit_s)

    @classmethod
    def from_mpi(cls, comm: Any, *, limit_s: float = MEET_S) -> Group:
        """The ranks of an mpi4py communicator; it stays yours."""
        return cls(meeting.Mpi(comm), limit_s=limit_s)

    @classmethod
    def alone(cls) -> Group:
        """One rank, whatever the environment says."""
        return cls(meeting.Alone())

    def allgather(self, value: bytes, *, what: str, limit_s: float) -> list[bytes]:
        """Every rank's ``value``, by rank.

        ``what`` names the moment in messages and must be equal on all ranks, else all raise
        ``ConfigMismatch`` naming both.  ``PeerLost`` if a peer ends, leaves or stays silent.
        """
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"value must be bytes, got {type(value).__name__}")
        if len(value) > LARGEST:
            raise ValueError(f"value must be at most {LARGEST} bytes, got {len(value)}")
        answers = self._exchange(Kind.VALUE, bytes(value), what=what, limit_s=limit_s)
        return [answers[r].body if r in answers else bytes(value) for r in range(self.size)]

    def exchange_fds(self, fd: int, *, what: str, limit_s: float) -> dict[int, int]:
        """The messages under ``fds.pass_fds``, which is the one to call."""
        answers = self._exchange(Kind.FD, b"", what=what, limit_s=limit_s, fd=fd)
        return {rank: answer.fds[0] for rank, answer in answers.items()}

    @contextmanager
    def guarded(self, phase: str, limit_s: float) -> Iterator[Said]:
        """All ranks pass this phase, or all raise.

        What is put into ``mine`` of the object given is in ``by_rank`` of all after the phase.
        A rank that fails raises its own error; the others, wherever they are in the phase, raise an
        ``EpmoeError`` with its name and its text (``PeerLost`` if it died or left).
        """
        said = Said()
        try:
            yield said
        except Exception as error:
            told = error is self._common or getattr(error, TOLD, None) == (self, self._exchanges)
            if not told and not (self._mesh and self._mesh.broken):
                self._tell(phase, error, limit_s)
                # The others leave an outer phase by this, too: it is not told there again.  (Kept
                # with the error: an error that the group kept would keep what its frames hold.)
                setattr(error, TOLD, (self, self._exchanges))
            raise
        except BaseException as error:  # Ctrl-C: tell, but wait for nobody
            self._leave_by(error, phase)
            raise
        said.by_rank = self.allgather(said.mine, what=f"end of {phase}", limit_s=limit_s)

    def _tell(self, phase: str, error: Exception, limit_s: float) -> None:
        text = f"{phase}: {type(error).__name__}: {error}".encode()[:4096]
        try:
            self._exchange(Kind.FAILED, text, what=f"end of {phase}", limit_s=limit_s)
        except EpmoeError as other:  # my own error goes first; the group keeps this one
            error.add_note(f"telling the other ranks failed as well: {other}")

    def _exchange(
        self, kind: Kind, body: bytes, *, what: str, limit_s: float, fd: int | None = None
    ) -> dict[int, Answer]:
        if not what or len(what.encode()) > 200:
            raise ValueError(f"what must have 1 to 200 bytes, got {what!r}")
        check_limit(limit_s)
        if os.getpid() != self._opener:
            raise EpmoeError(
                f"this group was opened by pid {self._opener} and is used by pid {os.getpid()}: "
                f"a forked process is not a rank"
            )
        if self._closed:
            raise EpmoeError(f"rank {self.rank} closed this group before {what!r}")
        if self._mesh is None:
            far = next(p for p in self.peers if not p.near(self.peers[self.rank]))
            raise EpmoeError(
                f"{what!r}: {self.peers[self.rank]} cannot share memory with {far}: it runs on "
                f"another host or in another container, and epmoe's heaps end at one host"
            )
        self._exchanges += 1
        answers = self._mesh.exchange(kind, what, body, limit_s=limit_s, fd=fd)
        self._common = None if kind == Kind.FAILED else self._judge(kind, what, answers)
        if kind == Kind.FAILED or self._common:
            for answer in answers.values():
                close_all(answer.fds)
        if self._common:
            raise self._common
        return answers

    def _judge(self, kind: Kind, what: str, answers: dict[int, Answer]) -> EpmoeError | None:
        failed = [r for r, a in answers.items() if a.kind == Kind.FAILED]
        if failed:
            lines = [f"{self.peers[r]} failed in {answers[r].body.decode()}" for r in failed]
            return EpmoeError("; ".join(lines))
        places = {r: (a.kind, a.what) for r, a in answers.items()} | {self.rank: (kind, what)}
        if len(set(places.values())) > 1:
            lines = [f"rank {r} is at {w!r} ({k.name})" for r, (k, w) in sorted(places.items())]
            return ConfigMismatch("ranks call in different order: " + ", ".join(lines))
        return None

    def close(self, error: BaseException | None = None) -> None:
        """Leave: local, waits for nobody, twice is fine.  Peers that still need me are told why."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._opener:  # a forked copy closes its copies, and says nothing
            for link in self._mesh.links.values() if self._mesh else ():
                link.close()
        else:
            self._leave_by(error)
        self.watch.close()

    def _leave_by(self, error: BaseException | None, where: str = "the group") -> None:
        if self._mesh is None or self._mesh.broken:
            return
        how, text, culprit = "closed", f"closed {where}", -1
        if isinstance(error, PeerLost):  # I am not the cause
            how, text, culprit = error.how, str(error), error.ranks[0]
        elif error is not None:
            how, text = "raised", f"left {where} by {type(error).__name__}: {error}"
        self._mesh.broken = PeerLost(f"rank {self.rank} {text}", ranks=(self.rank,), how=how)
        self._mesh.leave(how, text, culprit=culprit)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)
