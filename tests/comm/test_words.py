"""Words, one process: parity, order, four exits, last words, ten thousand flipped bits."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
from sim.slabs import BytesHeap, slabs

from epmoe.comm import words
from epmoe.comm.words import (
    HOWS,
    LEAVE,
    ROUNDS,
    VALUES,
    C,
    LastWords,
    Words,
    Y,
    word,
)
from epmoe.config import MoEConfig
from epmoe.errors import Evicted, PeerLost

CONFIG = MoEConfig(experts=6, choices=2, hidden=16, inner=16, max_rows=4)
RANKS = 3


@pytest.fixture
def three():
    """The words of three ranks over one set of slabs; ``lost`` is what rank 0's watch knows."""
    placed, made = slabs([CONFIG], RANKS)
    lost = {}
    found = [
        Words(
            BytesHeap(rank, made),
            placed,
            0,
            lost=lost if rank == 0 else {},
            describe=lambda r: f"rank {r} (pid {100 + r} on here)",
            state_of=lambda r: "T" if r == 2 else "S",
        )
        for rank in range(RANKS)
    ]
    found[0].lost_for_test = lost  # what the watch writes
    return found


def all_publish(three, kind, round, value=0):
    for one in three:
        one.publish(kind, 0, round, value)


def test_a_word_has_an_even_number_of_ones_and_gives_back_what_it_was_made_of():
    rng = random.Random(1)
    for _ in range(2000):
        round, value = rng.randrange(ROUNDS), rng.randrange(VALUES)
        w = word(round, value)
        assert w.bit_count() % 2 == 0
        assert (w >> 32, w % VALUES) == (round, value)
    assert word(ROUNDS + 5, 7) == word(5, 7)


def test_wait_gives_the_values_by_rank(three):
    for rank, one in enumerate(three):
        one.publish(C, 0, 1, 10 * rank)
    assert three[0].wait(C, 1, 1.0) == [0, 10, 20]


def test_words_of_another_kind_or_peer_do_not_end_a_wait(three):
    for one in three:
        one.publish(Y, 0, 1, 0)
        one.publish(C, 1, 1, 0)
    with pytest.raises(PeerLost, match="waiting for C"):
        three[0].wait(C, 1, 0.02)


def test_the_word_of_the_round_before_is_waited_out(three):
    all_publish(three, C, 1, 5)
    timer = threading.Timer(0.05, lambda: all_publish(three, C, 2, 6))
    timer.start()
    assert three[0].wait(C, 2, 5.0) == [6, 6, 6]
    timer.join()


@pytest.mark.parametrize("first", [1, 1 << 31, ROUNDS - 3])
def test_rounds_wrap(three, first):
    for kind in (C, Y):
        all_publish(three, kind, first - 1)
    for round in range(first, first + 10):
        for kind in (C, Y):
            all_publish(three, kind, round, round % 7)
            assert three[0].wait(kind, round, 1.0) == [round % 7] * RANKS


def test_a_dead_rank_ends_the_wait_that_lacks_it(three):
    three[0].publish(C, 0, 1, 0)
    three[2].publish(C, 0, 1, 0)
    three[0].lost_for_test[1] = "exited"
    with pytest.raises(PeerLost, match=r"rank 1 \(pid 101 on here\) exited in round 1") as caught:
        three[0].wait(C, 1, 5.0)
    assert (caught.value.ranks, caught.value.how, caught.value.round) == ((1,), "exited", 1)
    assert "words (C/Y): rank 0 1/0   1 0/0   2 1/0" in str(caught.value)


def test_a_dead_rank_that_gave_all_it_owed_ends_nothing(three):
    all_publish(three, C, 1, 4)
    three[0].lost_for_test[1] = "exited"
    assert three[0].wait(C, 1, 1.0) == [4, 4, 4]


def test_a_rank_that_leaves_a_later_round_ends_nothing(three):
    three[1].leave(LastWords("closed", (1,), 2, "rank 1 closed its MoE"))
    all_publish(three, Y, 1)
    assert three[0].wait(Y, 1, 1.0) == [0, 0, 0]


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_left_in_this_round_ends_the_wait_with_its_words(three, how):
    three[1].leave(LastWords(how, (1,), 1, "the roof is on fire"))
    with pytest.raises(PeerLost, match="the roof is on fire") as caught:
        three[0].wait(C, 1, 5.0)
    assert (caught.value.ranks, caught.value.how) == ((1,), how)


def test_a_rank_that_left_because_of_another_blames_that_one(three):
    three[1].leave(LastWords("exited", (2,), 1, "its process ended"))
    with pytest.raises(PeerLost, match=r"rank 2 \(pid 102 on here\) exited") as caught:
        three[0].wait(C, 1, 5.0)
    assert caught.value.ranks == (2,)


def test_whoever_is_blamed_itself_is_evicted(three):
    three[1].leave(LastWords("stopped", (0,), 1, "rank 0 is in state T"))
    with pytest.raises(Evicted, match="rank 0: the others went on without this rank in round 1"):
        three[0].wait(C, 1, 5.0)


def test_silence_ends_at_the_limit_and_blames_the_stopped_rank_alone(three):
    began = time.monotonic()
    with pytest.raises(PeerLost, match=r"rank 2 \(pid 102 on here\) is in state T") as caught:
        three[0].wait(C, 1, 0.2)
    assert 0.2 <= time.monotonic() - began < 1.0
    # Rank 1 is silent too, but may be waiting for rank 2, which cannot wait for anybody.
    assert (caught.value.ranks, caught.value.how) == ((2,), "stopped")


def test_silence_of_ranks_that_run_names_all_of_them(three):
    three[2].publish(C, 0, 1, 0)
    with pytest.raises(PeerLost, match=r"rank 1 .* is in state S") as caught:
        three[0].wait(C, 1, 0.05)
    assert caught.value.ranks == (0, 1)


@pytest.mark.parametrize("text", ["", "short", "ü" * 5000, "\0\n\"'" * 900])
def test_last_words_are_cut_but_their_facts_are_whole(text):
    raw = LastWords("raised", (1, 2), 7, text).encoded(2048)
    assert len(raw) < 2048
    read = LastWords.decoded(raw + bytes(2048 - len(raw)), 1)
    assert (read.how, read.ranks, read.round) == ("raised", (1, 2), 7)
    assert text.startswith(read.text)


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[1]", b'["raised", 5, 1, ""]', b"\xff" * 99])
def test_last_words_that_cannot_be_read_say_so(raw):
    read = LastWords.decoded(raw.ljust(2048, b"\0"), 3)
    assert (read.how, read.ranks) == ("raised", (3,))
    assert "cannot be read" in read.text


def test_ten_thousand_flipped_bits_are_all_reported(three):
    """One bit of a word that is waited for, before it was due or after: named, never taken."""
    rng, one = random.Random(3), three[0]
    for number in range(10_000):
        round, kind, src = 2 + number % 50, rng.choice([C, Y]), rng.randrange(RANKS)
        all_publish(three, kind, round, rng.randrange(1000))
        if number % 2:
            three[src].publish(kind, 0, round - 1, rng.randrange(1000))
        one._mine[kind * RANKS + src] ^= 1 << rng.randrange(64)
        read = one.seen(kind, src)
        with pytest.raises(PeerLost) as caught:
            one.wait(kind, round, 0.0)
        assert (caught.value.how, caught.value.ranks) == ("corrupt", (src,))
        assert f"{read:#018x} in round {round}" in str(caught.value)


def test_ten_thousand_words_of_garbage_are_reported_or_run_into_the_limit(three):
    """Half of all garbage has even parity; its round gives it away, one in 2**31 excepted."""
    rng, one, seen = random.Random(4), three[0], Counter()
    for _ in range(10_000):
        all_publish(three, C, 9, 3)
        one._mine[C * RANKS + 1] = rng.getrandbits(64)
        with pytest.raises(PeerLost) as caught:
            one.wait(C, 9, 0.0)
        seen[caught.value.how] += 1
    assert seen == {"corrupt": 10_000}


def test_a_flipped_bit_in_a_leave_word_is_named(three):
    three[0]._mine[LEAVE * RANKS + 1] = 1 << 40
    with pytest.raises(PeerLost, match=f"the word leave of rank 1 .*{1 << 40:#018x}") as caught:
        three[0].wait(C, 1, 0.0)
    assert (caught.value.how, caught.value.ranks) == ("corrupt", (1,))


def test_the_clock_that_people_set_is_not_read(three, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: pytest.fail("only the monotonic clock may be read"))
    with pytest.raises(PeerLost):
        three[0].wait(C, 1, 0.01)


def test_a_pause_sleeps_only_in_a_long_wait_and_never_long(monkeypatch):
    slept = []
    monkeypatch.setattr(words.time, "sleep", slept.append)
    for spins in range(100):
        words.pause(spins)
    assert slept == []
    words.pause(10_000)
    assert 0 < sum(slept) <= 0.001
