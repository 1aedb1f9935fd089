"""One thread that learns at once when a peer's process ends."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Callable, Iterable

from epmoe.comm.peer import Peer, ended, state_of

log = logging.getLogger("epmoe")

LOOK_S = 0.02  # without pidfds: how often /proc is read; 1/5 of the 100 ms a death may take


class Watch:
    """Who of the peers has died, known to waiters without a system call.

    ``lost[rank] = "exited"`` is written by the thread as soon as that process ends (measured
    0.2 ms median, 0.6 ms worst of 200) and never taken back; waiters read the plain dict without a
    lock.  It says nothing about peers that left on purpose or are stopped, and nothing about peers
    that are not on this host.

    The detector is a pidfd for each peer, not the end of a socket: that end never comes while a
    helper which the dead rank forked still holds the socket.
    """

    def __init__(self, me: Peer, peers: Iterable[Peer]) -> None:
        self.lost: dict[int, str] = {}
        self.fds: dict[int, int] = {}  # rank -> pidfd; whoever polls by itself may add them
        self.blind = False  # no pidfds here: /proc is read every LOOK_S instead
        self._peers = {p.rank: p for p in peers if p.rank != me.rank and p.near(me)}
        self._calls: list[Callable[[int, str], None]] = []
        self._opener = os.getpid()
        self._thread: threading.Thread | None = None
        self._closed = False
        try:
            for peer in self._peers.values():
                self._open(peer)
            self._wake, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            for fd in self.fds.values():
                os.close(fd)
            raise
        if len(self.lost) < len(self._peers):
            self._thread = threading.Thread(target=self._run, name="epmoe watch", daemon=True)
            self._thread.start()

    def _open(self, peer: Peer) -> None:
        try:
            self.fds[peer.rank] = os.pidfd_open(peer.pid)
        except ProcessLookupError:
            self.lost[peer.rank] = "exited"
            return
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            if not self.blind:
                log.warning("no pidfds here (%s): reading /proc every %g s", error, LOOK_S)
            self.blind = True
        # Only now: whatever pid this is, the descriptor holds on to the process we looked at.
        if ended(peer):
            self.lost[peer.rank] = "exited"

    def on_loss(self, call: Callable[[int, str], None]) -> None:
        """Have ``call(rank, how)`` run on the watch thread at each loss, at once for known ones.

        It may run twice for the same rank (registered while the thread was telling), never not at
        all, and must not block.  Device heaps write their abort word here.
        """
        self._calls.append(call)
        for rank, how in list(self.lost.items()):
            call(rank, how)

    def state_of(self, peer: Peer) -> str:
        """The process state letter for messages: ``T`` is stopped, ``X`` gone, ``?`` elsewhere."""
        return state_of(peer) if peer.rank in self._peers else "?"

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        ranks = {fd: rank for rank, fd in self.fds.items() if rank not in self.lost}
        for fd in ranks:
            poll.register(fd, select.POLLIN)
        while not self._closed:
            for fd, _ in poll.poll(LOOK_S * 1e3 if self.blind else None):
                if fd in ranks:
                    poll.unregister(fd)
                    self._tell(ranks[fd])
            if self.blind:
                for rank, peer in self._peers.items():
                    if rank not in self.lost and ended(peer):
                        self._tell(rank)

    def _tell(self, rank: int) -> None:
        self.lost[rank] = "exited"
        for call in list(self._calls):
            try:
                call(rank, "exited")
            except Exception:  # one broken listener must not make the others blind
                log.exception("a listener failed on the loss of rank %d", rank)

    def close(self) -> None:
        """Stop watching; local, idempotent.  ``lost`` keeps what is known.

        In a forked child there is no thread: only the inherited descriptors are closed.
        """
        if self._closed:
            return
        self._closed = True
        thread, self._thread = self._thread, None
        if thread and os.getpid() == self._opener:
            os.write(self._bell, b"x")
            if thread is not threading.current_thread():
                thread.join()
        for fd in (*self.fds.values(), self._wake, self._bell):
            os.close(fd)
        self.fds.clear()
