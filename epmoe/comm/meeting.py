"""How ranks that know nothing of each other hand around one first small value."""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from datetime import timedelta
from typing import Any, Protocol

from epmoe.errors import EpmoeError, PeerLost

GRACE_S = 2.0  # for who gives up in time to say who was absent
_pending: list[tuple[Any, bytearray, bytearray]] = []  # what MPI still holds
MEET, ALL, LOST, ASK, ABSENT = b"M", b"A", b"L", b"Q", b"W"  # first byte between rank and hub


class Meeting(Protocol):
    """One operation: every rank hands in some bytes of equal length and gets those of all."""

    rank: int
    size: int
    local_rank: int | None  # None: count it from the introductions

    def meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        """All introductions by rank, within the limit; an ``EpmoeError`` says who is absent."""
        ...


class Alone:
    """One rank meets itself."""

    def __init__(self, local_rank: int | None = None) -> None:
        self.rank, self.size, self.local_rank = 0, 1, local_rank

    def meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        """Its own introduction."""
        return [introduction]


class Hub:
    """Ranks that ``epmoe.local`` started: the parent gathers, and tells the rest when one dies."""

    def __init__(self, fd: int, rank: int, size: int, local_rank: int | None) -> None:
        self.rank, self.size, self.local_rank, self.fd = rank, size, local_rank, fd

    def meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        """Over the inherited socket, which stays open for the next meeting."""
        try:
            hub = socket.socket(fileno=os.dup(self.fd))
        except OSError as error:
            raise EpmoeError(
                f"EPMOE_HUB_FD={self.fd} is no socket here: this process has a rank's "
                f"environment but was not started as a rank"
            ) from error
        with hub:
            hub.send(MEET + introduction)
            said = self._hear(hub, limit_s)
            if not said:
                hub.send(ASK)
                said = self._hear(hub, 1.0) or ABSENT + b"unknown, the launcher is silent"
        if said[:1] == ABSENT:
            raise EpmoeError(
                f"the ranks did not meet within {limit_s:g} s; absent: rank {said[1:].decode()}"
            )
        if said[:1] == LOST:
            ranks = tuple(int(r) for r in said[1:].decode().split(","))
            text = f"rank {said[1:].decode()} ended before the ranks met; seen by rank {self.rank}"
            raise PeerLost(text, ranks=ranks, how="exited")
        body = said[1:]
        return [body[i : i + len(introduction)] for i in range(0, len(body), len(introduction))]

    def _hear(self, hub: socket.socket, limit_s: float) -> bytes:
        poll = select.poll()
        poll.register(hub, select.POLLIN)
        if not poll.poll(limit_s * 1e3):
            return b""
        said = hub.recv(1 << 20)
        if not said:
            raise EpmoeError(f"the process that started rank {self.rank} ended before the meeting")
        return said


class Store:
    """Ranks that know a host and a port: torch's TCPStore, the launcher's own or rank 0's.

    The store has no authentication: it assumes a closed network, as torch does.  Only what the
    ranks say about themselves goes through it; whoever then connects is judged at the door.
    """

    def __init__(
        self, host: str, port: int, run: str, rank: int, size: int, local: int | None, hosted: bool
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local
        self.host, self.port, self.run, self.hosted = host, port, run, hosted

    def meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        """Keys hold the run, its restart count and how often this rank has met before.

        In a thread: against a server that is stopped, some calls of the store have no limit.
        """
        said: queue.SimpleQueue[list[bytes] | BaseException] = queue.SimpleQueue()

        def talk() -> None:
            try:
                said.put(self._meet(introduction, limit_s))
            except BaseException as error:  # noqa: BLE001  raised below, where it is waited for
                said.put(error)

        threading.Thread(target=talk, name="epmoe store", daemon=True).start()
        try:
            found = said.get(timeout=limit_s + GRACE_S)
        except queue.Empty:
            raise EpmoeError(
                f"rank {self.rank}: the store at {self.host}:{self.port} accepts and does not "
                f"answer, for {limit_s:g} s"
            ) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def _meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

        until = time.monotonic() + limit_s
        where = f"the store at {self.host}:{self.port}"
        try:
            store = TCPStore(
                self.host,
                self.port,
                is_master=self.rank == 0 and not self.hosted,
                timeout=timedelta(seconds=limit_s),
                wait_for_workers=False,
                multi_tenant=True,  # torch.distributed may serve or use the same port later
            )
            turn = store.add(f"epmoe/{self.run}/met/{self.rank}", 1)
            keys = [f"epmoe/{self.run}/{turn}/{rank}" for rank in range(self.size)]
            left = f"epmoe/{self.run}/{turn}/left"
            store.set(keys[self.rank], introduction.hex())
            try:
                store.wait(keys, timedelta(seconds=max(0.001, until - time.monotonic())))
            except DistError as error:
                absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                store.add(left, 1)
                self._serve(store, left, self.size - len(absent), 1.0)
                raise EpmoeError(
                    f"the ranks did not meet at {where} within {limit_s:g} s; absent: rank "
                    f"{', '.join(absent)}"
                ) from error
            found = [bytes.fromhex(store.get(key).decode()) for key in keys]
            store.add(left, 1)
            self._serve(store, left, self.size, until - time.monotonic())
        except DistError as error:
            who = "the launcher" if self.hosted else "rank 0"
            raise EpmoeError(
                f"rank {self.rank} has no connection to {where}, which {who} serves: {error}"
            ) from error
        return found

    def _serve(self, store: Any, left: str, ranks: int, limit_s: float) -> None:
        """A store that rank 0 serves ends with its meeting: not before the others have read it."""
        until = time.monotonic() + limit_s
        while self.rank == 0 and not self.hosted and store.add(left, 0) < ranks:
            if time.monotonic() > until:
                return
            time.sleep(0.001)


class Mpi:
    """Ranks of an mpi4py communicator that somebody else made and will free."""

    def __init__(self, comm: Any, local_rank: int | None = None) -> None:
        self.comm, self.local_rank = comm, local_rank
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())

    def meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        """A nonblocking allgather, tested until the limit: a blocking one could not be left."""
        long = len(introduction)
        mine, found = bytearray(introduction), bytearray(long * self.size)
        request = self.comm.Iallgather(mine, found)
        _pending.append((request, mine, found))  # MPI may write into them after we have left
        until = time.monotonic() + limit_s
        while not request.Test():
            if time.monotonic() > until:
                raise EpmoeError(
                    f"rank {self.rank}: not all {self.size} ranks met over MPI within "
                    f"{limit_s:g} s; MPI does not say who is absent"
                )
            time.sleep(0.0005)
        _pending.remove((request, mine, found))
        return [bytes(found[i : i + long]) for i in range(0, len(found), long)]


class Torch:
    """Ranks of a torch.distributed process group that somebody else made and will destroy."""

    def __init__(self, process_group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ValueError("process_group must belong to an initialised torch.distributed")
        self.group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.local_rank: int | None = None
        if self.rank < 0:
            raise ValueError("process_group must contain this process, it does not")

    def meet(self, introduction: bytes, limit_s: float) -> list[bytes]:
        """One all_gather of bytes, on the GPU if that is all the group can do (nccl)."""
        import torch
        import torch.distributed as dist

        where = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.frombuffer(bytearray(introduction), dtype=torch.uint8).to(where)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(found, mine, group=self.group, async_op=True)
            if work is not None:
                work.wait(timedelta(seconds=limit_s))
        except RuntimeError as error:
            raise EpmoeError(
                f"rank {self.rank}: not all {self.size} ranks met over torch.distributed within "
                f"{limit_s:g} s: {error}"
            ) from error
        return [bytes(one.cpu().tolist()) for one in found]
