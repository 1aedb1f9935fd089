"""kill -9: every survivor names the dead within 100 ms; what returned is right, nothing stays."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import signal
import time

import pytest
from faults.harness import Board, Traffic, shmem, start, until_it_ends

RANKS = 4


@pytest.fixture(scope="module")
def traffic():
    return Traffic(RANKS)


def schedule(traffic, seed, victims=1):
    """Kill ``victims`` random ranks at a random moment; seconds until each survivor raised."""
    rng, board = random.Random(seed), Board(RANKS)
    with start(RANKS, lambda rank: until_it_ends(traffic, rank, board)) as job:
        board.wait(1)
        time.sleep(rng.random() * 0.02)
        dead = rng.sample(range(RANKS), victims)
        killed = time.monotonic()
        for rank in dead:
            os.kill(job.pids[rank], signal.SIGKILL)
        outcomes = job.wait(30)
    survivors = [o for o in outcomes if o.rank not in dead]
    for one in survivors:
        said = one.result
        assert one.code == 0, (seed, one.log)
        assert said["error"] == "PeerLost", (seed, said)
        assert said["how"] == "exited", (seed, said)
        assert said["ranks"], (seed, said)
        assert set(said["ranks"]) <= set(dead), (seed, said)
        assert f"rank {said['ranks'][0]} (pid {job.pids[said['ranks'][0]]}" in said["text"]
        assert said["wrong"] == 0, (seed, said)
        assert said["left"] == {}, (seed, said)
        assert said["closing"] < 1, (seed, said)
    ended = max(outcomes[rank].ended_s for rank in dead)
    return [(one.result["at"] - killed, one.result["at"] - ended) for one in survivors]


def judge(delays):
    """From kill to raise: p99 within 100 ms, worst within 1 s.

    A killed process needs a core to end, and on a machine that others load it may wait a second for
    one; there the part that is ours counts, from the end of the process to the raise.
    """
    others = max(0.0, os.getloadavg()[0] - RANKS) / (os.cpu_count() or 1)
    seen = sorted(since_end if others > 0.5 else since_kill for since_kill, since_end in delays)
    assert seen[int(len(seen) * 0.99)] <= 0.100, (others, seen)
    assert seen[-1] <= 1.0, (others, seen)


def test_a_random_rank_is_killed_a_hundred_times(traffic):
    before = shmem()
    delays = []
    for seed in range(100):
        delays += schedule(traffic, seed)
    judge(delays)
    assert shmem() - before < 16, "shared memory did not come back"


def test_two_ranks_are_killed_at_once(traffic):
    judge([delay for seed in range(20) for delay in schedule(traffic, seed, victims=2)])


def test_all_but_one_are_killed(traffic):
    for seed in range(5):
        schedule(traffic, seed, victims=RANKS - 1)


def test_all_are_killed_and_their_memory_comes_back(traffic):
    before = shmem()
    for _ in range(20):
        board = Board(RANKS)

        def body(rank, board=board):  # slabs of 7 MiB
            return until_it_ends(traffic, rank, board, max_rows=4096)

        with start(RANKS, body) as job:
            board.wait(1)
            for pid in job.pids:
                os.kill(pid, signal.SIGKILL)
            job.wait(30)
    assert shmem() - before < 100, "20 x 28 MiB would be 560"


def die_of_a_bad_address(moe, number):
    if number == 5:
        faulthandler.disable()
        ctypes.string_at(0)


def leave_a_helper_behind_and_die(moe, number):
    if number == 5:
        if os.fork() == 0:  # it holds copies of all sockets for longer than anybody may wait
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("die", [die_of_a_bad_address, leave_a_helper_behind_and_die])
def test_other_ways_to_die_are_noticed_as_fast(traffic, die):
    for odd in range(RANKS):
        board = Board(RANKS)

        def body(rank, odd=odd, board=board):
            return until_it_ends(traffic, rank, board, act=die if rank == odd else None)

        began = time.monotonic()
        with start(RANKS, body) as job:
            outcomes = job.wait(30)
        for one in outcomes:
            if one.rank != odd:
                said = one.result
                assert (said["error"], said["how"]) == ("PeerLost", "exited"), said
                assert said["ranks"] == [odd]
                assert said["wrong"] == 0
                assert said["left"] == {}
                assert said["at"] - began < 2, "not before the helper ended"


@pytest.mark.night
@pytest.mark.timeout(900)
def test_a_random_rank_is_killed_a_thousand_times(traffic):
    judge([delay for seed in range(1000) for delay in schedule(traffic, seed)])
