"""A descriptor given to every peer is the same open file there, and belongs to whoever got it."""

from __future__ import annotations

import fcntl
import os

import pytest
from ranks import ranks

from epmoe.comm.fds import pass_fds


def memory(text):
    fd = os.memfd_create("epmoe-test", os.MFD_CLOEXEC)
    os.write(fd, text)
    return fd


@ranks(1, 2, 4)
def test_every_peer_can_read_what_lies_behind_the_descriptor(rank, group):
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(10):
        mine = memory(b"rank %d turn %d" % (rank, turn))
        got = pass_fds(group, mine, what="slab", limit_s=5)
        assert sorted(got) == [r for r in range(group.size) if r != rank]
        for peer, fd in got.items():
            assert os.pread(fd, 99, 0) == b"rank %d turn %d" % (peer, turn)
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            os.close(fd)
        os.close(mine)
    assert len(os.listdir("/proc/self/fd")) == before


@ranks(2)
def test_a_write_on_one_rank_is_seen_on_the_other(rank, group):
    mine = memory(b"....")
    got = pass_fds(group, mine, what="slab", limit_s=5)
    os.pwrite(got[1 - rank], b"%d" % rank, 0)
    group.allgather(b"", what="written", limit_s=5)
    assert os.pread(mine, 1, 0) == b"%d" % (1 - rank)
    for fd in (mine, *got.values()):
        os.close(fd)


@ranks(2)
def test_a_closed_descriptor_is_refused_here_and_peers_hear_it(rank, group):
    before = len(os.listdir("/proc/self/fd"))

    def phase():
        with group.guarded("share", 5):
            fd = os.dup(0)
            if rank == 0:
                os.close(fd)
                pass_fds(group, fd, what="slab", limit_s=5)
            try:
                pass_fds(group, fd, what="slab", limit_s=5)
            finally:
                os.close(fd)

    with pytest.raises((ValueError, RuntimeError), match="fd must be an open descriptor"):
        phase()
    assert len(os.listdir("/proc/self/fd")) == before
