"""N ranks on this machine: first failure wins, all logs kept, children die with the parent."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from epmoe.comm.hub import ERROR, MORE, RESULT, Child, Job, Outcome
from epmoe.errors import EpmoeError

UNLESS_SET = {
    "OMP_NUM_THREADS": "1",  # N ranks of N threads each starve one another
    "PYTHONFAULTHANDLER": "1",  # a rank that hangs prints its stacks when it is aborted
}
NO_MULTICAST = {  # in every rank, whatever was set: NVLink multicast stays off below us
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_PIECE = 1 << 16
_PDEATHSIG = 1


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

    path = shutil.which(argv[0], path=(env or {}).get("PATH"))
    if path is None:
        raise ValueError(f"argv must begin with a program that can be run, got {argv[0]!r}")

    def program(rank: int, link: socket.socket) -> NoReturn:
        os.set_inheritable(link.fileno(), True)
        os.execve(path, list(argv), os.environ)

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
        if torch is not None:
            # After a fork torch makes its thread pool anew at the first use, and two threads that
            # are first at once find none ("Invalid thread pool"): use it here, while there is one.
            torch.set_num_threads(torch.get_num_threads())
        try:
            value = body(rank)
            plain = isinstance(value, bytes)
            _say(link, RESULT, b"b" + value if plain else b"j" + json.dumps(value).encode())
            code = 0
        except BaseException as error:  # noqa: BLE001  # the launcher gets all of it
            trace = traceback.format_exc()
            sys.stdout.flush()  # what it printed before comes before
            sys.stderr.write(trace)
            _say(link, ERROR, json.dumps([type(error).__name__, str(error), trace]).encode())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    return _start(ranks, program, end_others, logs, echo, env)


def _say(link: socket.socket, kind: bytes, body: bytes) -> None:
    while len(body) > _PIECE:
        link.send(MORE + body[:_PIECE])
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
    begun: list[Child] = []
    try:
        for rank in range(ranks):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            log = _log(rank, logs)
            pid = os.fork()
            if pid == 0:
                die_with_parent(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != parent:
                    os._exit(1)  # the parent ended before the line above
                try:
                    for other in (*(c.link for c in begun), ours):
                        other.close()  # or the ends of the ranks before us would not be seen
                    _become(rank, ranks, theirs, None if rank == echo else log, env or {})
                    program(rank, theirs)
                except BaseException as error:  # noqa: BLE001  # nothing of the parent's runs here
                    os.write(2, f"rank {rank} could not start: {error!r}\n".encode())
                finally:
                    os._exit(127)
            theirs.close()
            begun.append(Child(Outcome(rank, pid), ours, log, _pidfd(pid)))
    except BaseException:
        Job(begun, end_others=True).close()
        raise
    return Job(begun, end_others=end_others)


def _become(
    rank: int, ranks: int, link: socket.socket, log: int | None, env: Mapping[str, str]
) -> None:
    """Give the forked child its place: input, output and environment of a rank."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if log is not None:
        os.dup2(log, 1)
        os.dup2(log, 2)
    os.environ.update(UNLESS_SET | dict(os.environ) | dict(env) | NO_MULTICAST)
    os.environ.update(
        EPMOE_HUB_FD=str(link.fileno()),
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
    )


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
