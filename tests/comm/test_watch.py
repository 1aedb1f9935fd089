"""The end of a peer's process is known at once, and never mistaken."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import statistics
import time

import pytest

from epmoe.comm.peer import Peer, ended, process, state_of
from epmoe.comm.watch import Watch


@pytest.fixture
def child():
    """A process that sleeps, as rank 1."""
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    yield dataclasses.replace(Peer.me(1), pid=pid, started=process(pid)[1])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def lost_within(watch, rank, limit_s):
    until = time.monotonic() + limit_s
    while rank not in watch.lost and time.monotonic() < until:
        time.sleep(0.0002)
    return watch.lost.get(rank)


def no_pidfd(pid):
    raise OSError(errno.ENOSYS, "no such call")


@pytest.mark.parametrize("blind", [False, True], ids=["pidfd", "proc"])
def test_a_killed_peer_is_known_within_100_ms_before_anybody_reaps_it(child, blind, monkeypatch):
    if blind:
        monkeypatch.setattr(os, "pidfd_open", no_pidfd)
    told = []
    watch = Watch(Peer.me(0), [Peer.me(0), child])
    watch.on_loss(lambda rank, how: told.append((rank, how)))
    assert (watch.lost, watch.blind, told) == ({}, blind, [])
    assert watch.state_of(child) in ("S", "R")
    os.kill(child.pid, signal.SIGKILL)
    start = time.monotonic()
    assert lost_within(watch, 1, 2) == "exited"
    took = time.monotonic() - start
    watch.on_loss(lambda rank, how: told.append((rank, how)))  # at once for what is known
    watch.close()
    watch.close()
    assert watch.state_of(child) == "Z"
    assert told == [(1, "exited"), (1, "exited")]
    assert took < 0.1


def test_a_pid_that_belongs_to_another_process_by_now_is_never_the_peer(child):
    before = dataclasses.replace(child, started=child.started - 1)  # same pid, earlier process
    assert state_of(before) == "X"
    assert ended(before)
    assert not ended(child)
    watch = Watch(Peer.me(0), [before])
    assert watch.lost == {1: "exited"}
    watch.close()


def test_a_peer_that_is_gone_before_the_watch_begins(child):
    gone = dataclasses.replace(child, pid=2**22 - 1)  # the largest pid Linux may give
    watch = Watch(Peer.me(0), [gone])
    assert watch.lost == {1: "exited"}
    watch.close()


def test_a_stopped_peer_is_not_lost_and_its_state_is_known(child):
    watch = Watch(Peer.me(0), [child])
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(0.05)
    assert watch.lost == {}
    assert watch.state_of(child) == "T"
    watch.close()


def test_a_peer_elsewhere_is_not_watched(child):
    far = dataclasses.replace(child, boot="another", pid=2**22 - 1)
    watch = Watch(Peer.me(0), [far])
    assert (watch.lost, watch.fds, watch.state_of(far)) == ({}, {}, "?")
    watch.close()


def test_a_listener_that_fails_does_not_blind_the_others(child, caplog):
    told = []

    def fails(rank, how):
        raise RuntimeError("listener")

    watch = Watch(Peer.me(0), [child])
    watch.on_loss(fails)
    watch.on_loss(lambda rank, how: told.append(rank))
    os.kill(child.pid, signal.SIGKILL)
    lost_within(watch, 1, 2)
    watch.close()
    assert told == [1]
    assert "a listener failed on the loss of rank 1" in caplog.text


def test_an_unexpected_error_of_the_system_is_not_swallowed(child, monkeypatch):
    def full(pid):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="too many open files"):
        Watch(Peer.me(0), [child])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_has_no_thread_and_may_close_its_copy(child):
    watch = Watch(Peer.me(0), [child])
    pid = os.fork()
    if pid == 0:
        watch.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    os.kill(child.pid, signal.SIGKILL)
    assert lost_within(watch, 1, 2) == "exited"  # the parent's watch is unharmed
    watch.close()


def test_names_and_introductions():
    me = Peer.me(3)
    assert Peer.unpack(3, me.pack()) == me
    assert str(me) == f"rank 3 (pid {os.getpid()} on {me.host})"
    with pytest.raises(ValueError, match="introduction of rank 2"):
        Peer.unpack(2, b"garbage")


@pytest.mark.night
def test_200_deaths_measured():
    took = []
    for _ in range(200):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        peer = dataclasses.replace(Peer.me(1), pid=pid, started=process(pid)[1])
        watch = Watch(Peer.me(0), [peer])
        start = time.monotonic()
        watch.on_loss(lambda rank, how, start=start: took.append(time.monotonic() - start))
        os.kill(pid, signal.SIGKILL)
        assert lost_within(watch, 1, 2) == "exited"
        watch.close()
        os.waitpid(pid, 0)
    assert len(took) == 200
    assert statistics.quantiles(took, n=100)[98] < 0.1  # median 0.2 ms on an idle machine


def test_a_state_that_cannot_be_looked_up_is_no_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(24, "Too many open files")

    me = Peer.me(0)
    monkeypatch.setattr("builtins.open", refuse)
    assert state_of(me) == "?"
    assert not ended(me)
