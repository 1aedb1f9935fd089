"""The parent's side of ranks it started: where they meet, and who has ended."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from epmoe.comm.meeting import ABSENT, ALL, ASK, LOST, MEET
from epmoe.errors import EpmoeError

SETTLE_S = 0.2  # from the first failure to asking the rest: they may be about to say why
GRACE_S = 2.0  # from asking a rank to end to ending it
TICK_S = 0.02  # how late an end is seen where there are no pidfds
RESULT, ERROR, MORE = b"R", b"E", b"P"  # what a rank says besides meeting: see meeting.py


@dataclass(frozen=True, slots=True)
class Failure:
    """The exception a rank ended by, as text: nothing is unpickled."""

    type: str
    text: str
    trace: str


@dataclass(slots=True)
class Outcome:
    """How one rank ended.  ``code`` is the exit status, negative if by a signal."""

    rank: int
    pid: int
    code: int | None = None
    log: str = ""
    result: Any = None
    error: Failure | None = None
    ended_s: float = 0.0  # time.monotonic() when the launcher saw it

    @property
    def ok(self) -> bool:
        """True if it ended by itself with status 0."""
        return self.code == 0


@dataclass(slots=True)
class Child:
    """One child as the launcher sees it."""

    outcome: Outcome
    link: socket.socket
    log: int
    end: int  # its pidfd, or -1
    parts: bytes = b""


class Job:
    """Ranks under way.  Leaving the ``with`` block ends and reaps every one of them.

    ``pids[rank]`` is known at once, so a test can stop or kill a rank; pids stay valid until
    ``wait`` or ``close`` has reaped them.
    """

    def __init__(self, ranks: Sequence[Child], *, end_others: bool) -> None:
        self._ranks = list(ranks)
        self._end_others = end_others
        self._failed: float | None = None  # when the first failure was seen
        self._asked: float | None = None  # when the others were asked to end
        self.first: Outcome | None = None  # the failure that came first
        self.pids = tuple(r.outcome.pid for r in ranks)
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._guard, name="epmoe hub", daemon=True)
        self._thread.start()

    @property
    def outcomes(self) -> list[Outcome]:
        """One for each rank; complete after ``wait``."""
        return [r.outcome for r in self._ranks]

    def wait(self, limit_s: float = 60.0) -> list[Outcome]:
        """Until all have ended; after ``limit_s`` the rest print their stacks and are killed.

        Ranks that hung have ``code`` -6 (SIGABRT) or -9 and the stacks in their log.
        """
        try:
            self._thread.join(limit_s)
            if self._thread.is_alive():
                self._signal(signal.SIGCONT)  # a stopped rank cannot print
                self._signal(signal.SIGABRT)
                self._thread.join(GRACE_S)
        finally:
            self.close()
        return self.outcomes

    def close(self) -> None:
        """Kill what still runs, reap all, keep the logs.  Idempotent."""
        self._signal(signal.SIGKILL)
        self._thread.join()
        for rank in self._ranks:
            if rank.log >= 0:
                os.waitpid(rank.outcome.pid, 0)
                size = os.fstat(rank.log).st_size
                rank.outcome.log = os.pread(rank.log, size, 0).decode(errors="replace")
                os.close(rank.log)
                rank.log = -1
                rank.link.close()
                if rank.end >= 0:
                    os.close(rank.end)
        if self._fault:
            fault, self._fault = self._fault, None
            raise EpmoeError(f"the hub of {len(self._ranks)} ranks failed: {fault}") from fault

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            if rank.outcome.code is None:  # not reaped before close(): the pid is still its own
                os.kill(rank.outcome.pid, number)

    def _guard(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001  # raised by close(), in the caller's thread
            self._fault = error

    def _serve(self) -> None:
        """The hub: gathers introductions, takes results, notices ends.  Runs until all ended."""
        waiting: dict[int, bytes] = {}
        poll = select.poll()
        by_fd = {r.link.fileno(): r for r in self._ranks}
        for fd in (*by_fd, *(r.end for r in self._ranks if r.end >= 0)):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll(TICK_S * 1e3):
                if fd not in by_fd or self._hear(by_fd[fd], waiting) is False:
                    poll.unregister(fd)
            self._look(waiting)
            over = [r.outcome for r in self._ranks if r.outcome.code is not None]
            gone = [o.rank for o in sorted(over, key=lambda o: o.ended_s)]  # the cause first
            if len(gone) == len(self._ranks):
                return
            full = len(waiting) == len(self._ranks)
            if full:
                self._send(waiting, ALL + b"".join(waiting[r] for r in sorted(waiting)))
            elif gone and waiting:
                self._send(waiting, LOST + ",".join(map(str, gone)).encode())
            now = time.monotonic()
            if self._asked and now > self._asked + GRACE_S:
                self._signal(signal.SIGKILL)
            elif self._end_others and self._failed and now > self._failed + SETTLE_S:
                self._asked = self._asked or now
                self._signal(signal.SIGTERM)

    def _send(self, waiting: dict[int, bytes], said: bytes) -> None:
        for rank in waiting:
            try:
                self._ranks[rank].link.send(said, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except (BrokenPipeError, ConnectionResetError, BlockingIOError):
                continue  # it ended: _look will say so
        waiting.clear()

    def _hear(self, rank: Child, waiting: dict[int, bytes]) -> bool | None:
        """Take one message: True if there was one, None if not yet, False if none will come."""
        try:
            said = rank.link.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return False
        kind, body = said[:1], said[1:]
        if kind == MEET:
            waiting[rank.outcome.rank] = body
        elif kind == ASK:
            if rank.outcome.rank in waiting:  # else the answer is on its way already
                here = [r.outcome.rank for r in self._ranks]
                absent = ", ".join(str(r) for r in here if r not in waiting)
                self._send(waiting, ABSENT + absent.encode())  # one limit passed: no meeting
        elif kind == MORE:
            rank.parts += body
        elif kind == RESULT:
            whole, rank.parts = rank.parts + body, b""
            rank.outcome.result = whole[1:] if whole[:1] == b"b" else json.loads(whole[1:])
        elif kind == ERROR:
            rank.outcome.error = Failure(*json.loads(rank.parts + body))
            rank.parts = b""
        return bool(said)

    def _look(self, waiting: dict[int, bytes]) -> None:
        """Notice who has ended, without reaping: until close() no pid is given to another."""
        failed = []
        for rank in self._ranks:
            if rank.outcome.code is not None:
                continue
            found = os.waitid(os.P_PID, rank.outcome.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found:
                while self._hear(rank, waiting):
                    pass  # its last words came before its end
                status = found.si_status
                rank.outcome.code = status if found.si_code == os.CLD_EXITED else -status
                rank.outcome.ended_s = time.monotonic()
                if not rank.outcome.ok:
                    failed.append(rank.outcome)
        if failed and self._asked is None:
            # A rank that was killed, or that did not merely lose a peer, is the cause.
            known = failed if self.first is None else [self.first, *failed]
            self.first = min(known, key=lambda o: ((o.code or 0) > 0, _lost_a_peer(o)))
            self._failed = self._failed or time.monotonic()


def _lost_a_peer(outcome: Outcome) -> bool:
    return outcome.error is not None and outcome.error.type == "PeerLost"
