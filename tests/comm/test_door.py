"""Ranks of one job get in; whoever else knocks is sent away and the job goes on."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import threading
import time

import pytest

from epmoe.comm import door
from epmoe.comm.peer import Peer
from epmoe.comm.watch import Watch
from epmoe.errors import EpmoeError, PeerLost

NONCE = bytes(range(32))


class House:
    """Rank 0 of three waits behind its door; this process may call as rank 1 or 2."""

    def __init__(self, limit_s=5.0, ranks=3):
        self.peers = [Peer.me(rank) for rank in range(ranks)]
        self.socket, self.name = door.listen()
        self.watch = Watch(self.peers[0], [])
        self.links, self.error = {}, None
        self.thread = threading.Thread(target=self.run, args=(limit_s,))
        self.thread.start()

    def run(self, limit_s):
        names = [self.name] * len(self.peers)
        try:
            given = (0, self.peers, self.socket, names, NONCE, self.watch, self.links, limit_s)
            door.connect(*given)
        except EpmoeError as error:
            self.error = error

    def call(self, words=b""):
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(2)
        link.connect(self.name)
        if words:
            link.sendall(words)
        return link

    def refused(self, link):
        """True if the house hung up."""
        try:
            return link.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self):
        self.thread.join()
        for link in self.links.values():
            link.close()
        self.socket.close()
        self.watch.close()


@pytest.fixture
def house():
    made = House()
    yield made
    made.close()


def both_get_in(house):
    links = [house.call(door.hello(NONCE, rank, 3)) for rank in (1, 2)]
    house.thread.join(3)
    assert sorted(house.links) == [1, 2]
    for link in links:
        link.close()


def refused_in_a_child(house, words, user=None):
    """True if a forked process, perhaps another user's, was sent away."""
    pid = os.fork()
    if pid == 0:
        try:
            if user:
                os.setuid(user)
            os._exit(0 if house.refused(house.call(words)) else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


REFUSED = [
    ("another job", door.hello(bytes(32), 1, 3), "another job (nonce)"),
    ("garbage", b"GET / HTTP/1.1\r\n" * 10, "not the words of a rank"),
    ("itself", door.hello(NONCE, 0, 3), "claims rank 0 of 3, expected 1 to 2"),
    ("too high", door.hello(NONCE, 3, 3), "claims rank 3 of 3"),
    ("huge", door.hello(NONCE, 2**32 - 1, 3), "claims rank 4294967295"),
    ("other size", door.hello(NONCE, 1, 4), "claims rank 1 of 4"),
]


@pytest.mark.parametrize(("words", "why"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_a_caller_that_is_no_rank_of_this_job_is_refused_and_the_job_goes_on(
    words, why, house, caplog
):
    assert house.refused(house.call(words))
    both_get_in(house)
    assert why in caplog.text


def test_a_second_caller_for_a_rank_is_refused_and_the_first_stays(house, caplog):
    first = house.call(door.hello(NONCE, 1, 3))
    assert house.refused(house.call(door.hello(NONCE, 1, 3)))
    last = house.call(door.hello(NONCE, 2, 3))
    house.thread.join(3)
    house.links[1].sendall(b"you")
    assert first.recv(3) == b"you"
    assert "rank 1 is connected already" in caplog.text
    first.close()
    last.close()


def test_another_process_cannot_be_a_rank_even_with_the_nonce(house, caplog):
    assert refused_in_a_child(house, door.hello(NONCE, 1, 3))
    both_get_in(house)
    assert "it claims to be rank 1" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_before_it_says_a_word(house, caplog):
    assert refused_in_a_child(house, b"", user=65534)
    both_get_in(house)
    assert "caller of another user" in caplog.text


def test_callers_that_say_nothing_or_half_are_sent_away_within_their_limit(monkeypatch):
    monkeypatch.setattr(door, "CALLER_S", 0.2)
    house = House()
    silent, half = house.call(), house.call(door.hello(NONCE, 1, 3)[:20])
    gone = house.call()
    gone.close()
    start = time.monotonic()
    assert house.refused(silent)
    assert house.refused(half)
    assert time.monotonic() - start < 1
    both_get_in(house)
    house.close()


def test_a_crowd_of_silent_callers_keeps_no_rank_out(monkeypatch):
    monkeypatch.setattr(door, "WAITING", 4)
    house = House()
    crowd = [house.call() for _ in range(50)]
    assert house.refused(crowd[0])
    both_get_in(house)
    for link in crowd:
        link.close()
    house.close()


def test_10000_random_greetings_are_judged_and_none_gets_in():
    rng, peers, good = random.Random(5), [Peer.me(r) for r in range(3)], door.hello(NONCE, 1, 3)
    assert door.judge(good, os.getpid(), 0, peers, NONCE) == ("", 1)
    for _ in range(10_000):
        words = bytearray(good if rng.random() < 0.5 else rng.randbytes(len(good)))
        words[rng.randrange(44)] ^= 1 << rng.randrange(8)  # mark, nonce or rank
        why, rank = door.judge(bytes(words), os.getpid(), 0, peers, NONCE)
        assert why or rank == 2  # one bit makes 3 of 1 but never 2: nothing passes
        assert why


def test_absent_ranks_are_named_at_the_limit():
    house = House(limit_s=0.3)
    link = house.call(door.hello(NONCE, 2, 3))
    house.close()
    assert isinstance(house.error, PeerLost)
    assert (house.error.ranks, house.error.how) == ((1,), "stopped")
    assert "rank 1 (pid" in str(house.error)
    link.close()


def test_a_door_held_by_another_process_is_not_entered():
    squatter, name = door.listen()
    me, there = Peer.me(1), dataclasses.replace(Peer.me(0), pid=os.getppid())
    mine, _ = door.listen()
    watch = Watch(me, [])
    with pytest.raises(EpmoeError, match=f"is held by pid {os.getpid()}"):
        door.connect(1, [there, me], mine, [name, name], NONCE, watch, {}, 1.0)
    for one in (squatter, mine, watch):
        one.close()


def test_a_name_is_random_and_not_in_the_file_system():
    (one, first), (two, second) = door.listen(), door.listen()
    assert len(first) == len(second) == door.NAME
    assert first[:1] == b"\0"
    assert first != second
    one.close()
    two.close()
