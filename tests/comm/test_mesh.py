"""What a peer may put on the wire: a whole message, or it is refused and named."""

from __future__ import annotations

import array
import os
import random
import socket
import struct
import threading
import time

import pytest

from epmoe.comm import mesh
from epmoe.comm.mesh import Mesh
from epmoe.comm.message import LARGEST, Kind
from epmoe.comm.peer import Peer
from epmoe.comm.watch import Watch
from epmoe.errors import PeerLost


class Wire:
    """Rank 0's mesh, and the bare socket of rank 1 in this same process."""

    def __init__(self):
        self.peers = [Peer.me(0), Peer.me(1)]
        mine, self.theirs = socket.socketpair()
        mine.setblocking(False)
        self.watch = Watch(self.peers[0], self.peers)
        self.mesh = Mesh(0, self.peers, {1: mine}, self.watch)

    def exchange(self, kind=Kind.VALUE, fd=None, limit_s=2.0):
        return self.mesh.exchange(kind, "it", b"mine", limit_s=limit_s, fd=fd)[1]

    def close(self):
        self.mesh.leave("closed", "")
        self.theirs.close()
        self.watch.close()


@pytest.fixture
def wire():
    made = Wire()
    yield made
    made.close()


def head(kind=1, fds=0, what=2, number=1, size=0, mark=b"epms"):
    return struct.pack("<4sBBHQQ", mark, kind, fds, what, number, size)


def test_a_message_byte_by_byte_and_not_a_byte_of_the_next_one(wire):
    said = head(size=3) + b"it" + b"abc"

    def slowly():
        for byte in said + head(number=2, size=1) + b"it" + b"z":
            wire.theirs.send(bytes([byte]))
            time.sleep(0.0005)

    thread = threading.Thread(target=slowly)
    thread.start()
    assert wire.exchange().body == b"abc"
    assert wire.exchange().body == b"z"
    thread.join()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (head(mark=b"HTTP"), "sent a head no rank sends"),
        (head(kind=9), "sent a head no rank sends"),
        (head(size=LARGEST + 1), "sent a head no rank sends"),
        (head(size=2**64 - 1), "sent a head no rank sends"),
        (head(number=7), "sent message 7 where 1 was due"),
        (head(fds=1) + b"it", r"sent 1 descriptors, 0 arrived"),
    ],
)
def test_what_no_rank_sends_is_refused_and_the_rank_named(said, text, wire):
    wire.theirs.send(said)
    with pytest.raises(PeerLost, match=text) as caught:
        wire.exchange()
    assert (caught.value.how, caught.value.ranks) == ("corrupt", (1,))
    with pytest.raises(PeerLost, match=text):  # and it stays so
        wire.exchange()


@pytest.mark.parametrize("said", [b"", head()[:10], head(size=5) + b"it" + b"ab"])
def test_a_hang_up_at_any_byte_of_a_living_process_is_a_leaving(said, wire):
    wire.theirs.send(said)
    wire.theirs.close()
    with pytest.raises(PeerLost, match="closed its connection without a word") as caught:
        wire.exchange()
    assert caught.value.how == "closed"


def test_a_message_that_is_complete_counts_though_its_sender_has_left(wire):
    wire.theirs.send(head(size=1) + b"it" + b"v")
    wire.theirs.close()
    assert wire.exchange().body == b"v"
    with pytest.raises(PeerLost):
        wire.exchange()


def test_half_a_message_is_silence_at_the_limit(wire):
    wire.theirs.send(head(size=5) + b"it" + b"ab")
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"sent nothing for 0.2 s \(state R\)") as caught:
        wire.exchange(limit_s=0.2)
    assert caught.value.how == "stopped"
    assert time.monotonic() - start < 0.5


def test_two_descriptors_where_one_is_due_are_both_closed(wire):
    before = len(os.listdir("/proc/self/fd"))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))]
    wire.theirs.sendmsg([head(kind=2, fds=1) + b"it"], rights)
    with pytest.raises(PeerLost, match="sent 1 descriptors, 2 arrived"):
        wire.exchange(Kind.FD, fd=0)
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the broken link is closed as well


def test_a_farewell_says_why(wire):
    text = b"left by OSError: disk"
    wire.theirs.send(head(kind=4, what=0, size=5 + len(text)) + struct.pack("<iB", -1, 1) + text)
    with pytest.raises(PeerLost, match="left by OSError: disk") as caught:
        wire.exchange()
    assert caught.value.how == "raised"


def test_random_bytes_never_hang_and_blame_the_one_who_sent_them(monkeypatch):
    monkeypatch.setattr(mesh, "_END_S", 0.0)  # this process will not end: look once
    rng = random.Random(11)
    for _ in range(300):
        wire = Wire()
        whole = head(kind=rng.randrange(6), what=0, size=rng.randrange(9)) + rng.randbytes(9)
        said = bytearray(whole if rng.random() < 0.5 else rng.randbytes(40))
        said[rng.randrange(16)] ^= 1 << rng.randrange(8)
        wire.theirs.send(said)
        wire.theirs.shutdown(socket.SHUT_WR)
        blamed = (1,)
        try:
            wire.mesh.exchange(Kind.VALUE, "it", b"", limit_s=1)
        except PeerLost as error:
            blamed = error.ranks
        assert blamed == (1,)
        wire.close()
