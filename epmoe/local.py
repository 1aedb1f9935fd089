"""N ranks on this machine: first failure wins, all logs kept, children die with the parent."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from epmoe.comm.meeting import ABSENT, ALL, ASK, LOST, MEET
from epmoe.errors import EpmoeError

THREADS = {"OMP_NUM_THREADS": "1"}  # unless set: N ranks of N threads each starve one another
NO_MULTICAST = {  # in every rank, whatever was set: NVLink multicast stays off below us
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
GRACE_S = 2.0  # from asking a rank to end to ending it
TICK_S = 0.02  # how late a death is seen here if the dead rank's helper holds its socket
_PIECE = 1 << 16
_RESULT, _ERROR, _MORE = b"R", b"E", b"P"
_PDEATHSIG = 1


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
class _Rank:
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

    def __init__(self, ranks: Sequence[_Rank], *, end_others: bool) -> None:
        self._ranks = list(ranks)
        self._end_others = end_others
        self._asked: float | None = None
        self.first: Outcome | None = None  # the failure that came first
        self.pids = tuple(r.outcome.pid for r in ranks)
        self._thread = threading.Thread(target=self._serve, name="epmoe hub", daemon=True)
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
                if rank.end >= 0:
                    os.close(rank.end)
                rank.link.close()

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
            gone = [r.outcome.rank for r in self._ranks if r.outcome.code is not None]
            if len(gone) == len(self._ranks):
                return
            full = len(waiting) == len(self._ranks)
            if full:
                self._send(waiting, ALL + b"".join(waiting[r] for r in sorted(waiting)))
            elif gone and waiting:
                self._send(waiting, LOST + ",".join(map(str, gone)).encode())
            if self._asked and time.monotonic() > self._asked + GRACE_S:
                self._signal(signal.SIGKILL)

    def _send(self, waiting: dict[int, bytes], said: bytes) -> None:
        for rank in waiting:
            try:
                self._ranks[rank].link.send(said, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except (BrokenPipeError, ConnectionResetError, BlockingIOError):
                continue  # it ended: _look will say so
        waiting.clear()

    def _hear(self, rank: _Rank, waiting: dict[int, bytes]) -> bool | None:
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
            absent = [str(r.outcome.rank) for r in self._ranks if r.outcome.rank not in waiting]
            self._send({rank.outcome.rank: b""}, ABSENT + ", ".join(absent).encode())
        elif kind == _MORE:
            rank.parts += body
        elif kind == _RESULT:
            whole, rank.parts = rank.parts + body, b""
            rank.outcome.result = whole[1:] if whole[:1] == b"b" else json.loads(whole[1:])
        elif kind == _ERROR:
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
        if failed and self.first is None:
            # Several at once: the killed one, or the one that did not lose a peer, was the first.
            self.first = min(failed, key=lambda o: (o.code or 0, _lost_a_peer(o)))
            if self._end_others:
                self._asked = time.monotonic()
                self._signal(signal.SIGTERM)


def _lost_a_peer(outcome: Outcome) -> bool:
    return outcome.error is not None and outcome.error.type == "PeerLost"


def run(
    ranks: int,
    target: Sequence[str] | Callable[[int], Any],
    *,
    limit_s: float = 600.0,
    logs: Path | None = None,
    echo: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Start ``ranks`` ranks, wait for all, end the others at the first failure.

    ``target`` is a command line (a fresh process for each rank) or a function of the rank (a fork
    of this process).  The returned job has ended: ``job.first`` is None or the first failure,
    ``job.outcomes[rank]`` has status, log and result.  Rank ``echo`` writes to our own output.

    >>> run(2, ["true"]).first is None
    True
    """
    if callable(target):
        job = fork_ranks(ranks, target, logs=logs, echo=echo, env=env)
    else:
        job = spawn_ranks(ranks, target, logs=logs, echo=echo, env=env)
    with job:
        job.wait(limit_s)
    return job


def spawn_ranks(
    ranks: int,
    argv: Sequence[str],
    *,
    end_others: bool = True,
    logs: Path | None = None,
    echo: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Start a command line once for each rank; ``Group.from_env()`` works in each."""

    def program(rank: int, link: socket.socket) -> NoReturn:
        os.set_inheritable(link.fileno(), True)
        os.execvpe(argv[0], list(argv), os.environ)

    return _start(ranks, program, end_others, logs, echo, env)


def fork_ranks(
    ranks: int,
    body: Callable[[int], Any],
    *,
    end_others: bool = True,
    logs: Path | None = None,
    echo: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Fork this process once for each rank and run ``body(rank)`` there.

    For a process that has imported torch but started neither CUDA nor torch's threads: a rank is
    there in milliseconds instead of two seconds.  What ``body`` returns (bytes, or anything JSON
    can write) becomes ``Outcome.result``; an exception becomes ``Outcome.error`` as text.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise EpmoeError("CUDA is initialised here and would not work in a fork: use spawn_ranks")

    def program(rank: int, link: socket.socket) -> NoReturn:
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.enable(2, all_threads=True)
        code = 1
        try:
            value = body(rank)
            plain = isinstance(value, bytes)
            _say(link, _RESULT, b"b" + value if plain else b"j" + json.dumps(value).encode())
            code = 0
        except BaseException as error:  # noqa: BLE001  # the launcher gets all of it
            trace = traceback.format_exc()
            sys.stderr.write(trace)
            _say(link, _ERROR, json.dumps([type(error).__name__, str(error), trace]).encode())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    return _start(ranks, program, end_others, logs, echo, env)


def _say(link: socket.socket, kind: bytes, body: bytes) -> None:
    while len(body) > _PIECE:
        link.send(_MORE + body[:_PIECE])
        body = body[_PIECE:]
    link.send(kind + body)


def _start(
    ranks: int,
    program: Callable[[int, socket.socket], NoReturn],
    end_others: bool,
    logs: Path | None,
    echo: int | None,
    env: Mapping[str, str] | None,
) -> Job:
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if threading.current_thread() is not threading.main_thread():
        raise EpmoeError("start ranks from the main thread: they end with the thread that did")
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    die_with_parent = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()
    begun: list[_Rank] = []
    for rank in range(ranks):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = _log(rank, logs)
        pid = os.fork()
        if pid == 0:
            die_with_parent(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)  # the parent ended before the line above
            try:
                for other in begun:
                    other.link.close()  # or their ends would not be seen while we live
                ours.close()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                if rank != echo:
                    os.dup2(log, 1)
                    os.dup2(log, 2)
                os.environ.update(THREADS | dict(os.environ) | dict(env or {}) | NO_MULTICAST)
                os.environ.update(
                    EPMOE_HUB_FD=str(theirs.fileno()),
                    RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    LOCAL_RANK=str(rank),
                )
                program(rank, theirs)
            except BaseException as error:  # noqa: BLE001  # nothing of the parent's may run here
                os.write(2, f"rank {rank} could not start: {error!r}\n".encode())
            finally:
                os._exit(127)
        theirs.close()
        begun.append(_Rank(Outcome(rank, pid), ours, log, _pidfd(pid)))
    return Job(begun, end_others=end_others)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1  # the hub looks every TICK_S anyway


def _log(rank: int, logs: Path | None) -> int:
    if logs is None:
        return os.memfd_create(f"rank-{rank}.log", os.MFD_CLOEXEC)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    return os.open(logs / f"rank-{rank}.log", flags, 0o644)
