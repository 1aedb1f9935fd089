"""Ranks that stop, raise, are interrupted or close early: the others learn it, and from whom."""

from __future__ import annotations

import os
import signal
import time

import pytest
from faults.harness import Board, Traffic, start, until_it_ends

RANKS = 3
ODD = 1  # the rank it happens to


@pytest.fixture(scope="module")
def traffic():
    return Traffic(RANKS)


def reports(traffic, act, **changed):
    """``act(moe, number)`` on the odd rank before every round; (its report, the others')."""
    board = Board(RANKS)

    def body(rank):
        return until_it_ends(traffic, rank, board, act=act if rank == ODD else None, **changed)

    with start(RANKS, body) as job:
        outcomes = job.wait(30)
    assert [o.code for o in outcomes] == [0] * RANKS, [o.log for o in outcomes]
    said = [o.result for o in outcomes]
    assert [one["wrong"] for one in said] == [0] * RANKS
    assert [one["left"] for one in said] == [{}] * RANKS
    assert max(one["closing"] for one in said) < 1
    return said[ODD], [one for rank, one in enumerate(said) if rank != ODD]


@pytest.mark.parametrize("verb", ["stage", "wait_plan", "pull", "ffn", "push", "reduce"])
def test_an_exception_on_one_rank_reaches_the_others_with_its_text(traffic, verb):
    def act(moe, number):
        if number == 5:

            def struck(*args, **kwargs):
                raise FloatingPointError("the accelerator is on fire")

            setattr(moe._rounds[0].ops, verb, struck)

    mine, others = reports(traffic, act)
    assert mine["error"] == "FloatingPointError"
    for one in others:
        assert (one["error"], one["how"], one["ranks"]) == ("PeerLost", "raised", [ODD])
        assert "the accelerator is on fire" in one["text"]
        assert one["at"] - mine["at"] < 0.1
        assert one["done"] in (5, 6)


def test_a_rank_that_closes_early_is_named(traffic):
    def act(moe, number):
        if number == 5:
            moe.close()

    mine, others = reports(traffic, act)
    assert mine["error"] == "EpmoeError"
    assert "closed" in mine["text"]
    for one in others:
        assert (one["error"], one["how"], one["ranks"]) == ("PeerLost", "closed", [ODD])
        assert one["at"] - mine["at"] < 0.1
        assert one["done"] == 5


def test_ctrl_c_on_one_rank_reaches_the_others(traffic):
    def strike(_, frame):
        while frame and not frame.f_code.co_filename.endswith("host_rounds.py"):
            frame = frame.f_back
        if frame:  # in a round; between two the rank would close, and the others read just that
            os.kill(os.getpid(), signal.SIGINT)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0.0007)

    def act(moe, number):
        if number == 5:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGALRM, strike)
            signal.setitimer(signal.ITIMER_REAL, 0.01)

    mine, others = reports(traffic, act)
    assert mine["error"] == "KeyboardInterrupt"
    for one in others:
        assert (one["error"], one["how"], one["ranks"]) == ("PeerLost", "raised", [ODD])
        assert "KeyboardInterrupt" in one["text"]
        assert one["at"] - mine["at"] < 0.1


def test_ten_thousand_signals_change_no_bit(traffic):
    board = Board(RANKS)

    def body(rank):
        signal.signal(signal.SIGUSR1, lambda *_: None)
        return until_it_ends(traffic, rank, board, most=400)

    with start(RANKS, body) as job:
        board.wait(1)
        while board[0] < 300 and not job.outcomes[0].ok:
            os.kill(job.pids[0], signal.SIGUSR1)
            time.sleep(0.0002)
        outcomes = job.wait(30)
    assert [o.result["wrong"] for o in outcomes] == [0] * RANKS
    assert [o.result["done"] for o in outcomes] == [400] * RANKS


@pytest.mark.parametrize("attempt", range(3))
def test_a_stopped_rank_is_reported_at_the_stall_limit_and_evicted_when_it_wakes(traffic, attempt):
    board, limit_s = Board(RANKS), 1.0

    def body(rank):
        return until_it_ends(traffic, rank, board, stall_s=limit_s)

    with start(RANKS, body) as job:
        board.wait(10 + attempt)
        stopped = time.monotonic()
        os.kill(job.pids[ODD], signal.SIGSTOP)
        others = [rank for rank in range(RANKS) if rank != ODD]
        until = stopped + 10
        while any(job.outcomes[r].code is None for r in others) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(job.pids[ODD], signal.SIGCONT)
        outcomes = job.wait(30)
    assert [o.code for o in outcomes] == [0] * RANKS, [o.log for o in outcomes]
    for rank in others:
        said = outcomes[rank].result
        assert (said["error"], said["how"], said["ranks"]) == ("PeerLost", "stopped", [ODD])
        assert "state T" in said["text"]
        assert limit_s <= said["at"] - stopped <= 1.2 * limit_s, said
        assert said["wrong"] == 0
        assert said["left"] == {}
    woken = outcomes[ODD].result
    assert woken["error"] == "Evicted", woken
    assert woken["wrong"] == 0
