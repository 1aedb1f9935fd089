"""One heap's life without a process: poisoned once, closed once, in order, one caller a lane."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
from sim.slabs import layers

from epmoe.comm.words import LEAVE, ROUNDS
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError, PeerLost
from epmoe.runtime import Runtime

CONFIG = MoEConfig(experts=4, choices=1, hidden=16, inner=8, max_rows=4, lanes=2)


@pytest.fixture
def pair():
    return [moe._runtime for (moe,) in layers([CONFIG], 2)]


def left(runtime, lane, src):
    """Round and value of the leave word that ``src`` has written to this rank."""
    at = runtime.placed.lanes[lane][0]["words"]
    cells = memoryview(runtime.heap.mine[at.at : at.at + at.bytes].numpy()).cast("B").cast("Q")
    word = cells[LEAVE * 2 + src]
    return word >> 32, word & 0x7FFFFFFF


def test_an_exception_in_a_turn_poisons_and_tells_every_lane_its_round(pair):
    pair[1].lanes[0].round, pair[1].lanes[1].round = 5, ROUNDS + 9
    with pytest.raises(KeyError), pair[1].turn(0):
        raise KeyError("gone")
    assert left(pair[0], 0, 1)[0] == 5
    assert left(pair[0], 1, 1)[0] == 9
    assert left(pair[0], 0, 1)[1] != 0
    with pytest.raises(
        EpmoeError, match="rank 1: this heap is unusable since KeyError: 'gone'"
    ) as caught:
        pair[1].check()
    assert isinstance(caught.value.__cause__, KeyError)
    pair[0].check()  # the other rank notices in its own next wait


@pytest.mark.parametrize("heap", ["cuda", "nvshmem"])
@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (2, "lanes must be 1 on a {} heap of 2 ranks, got 2"),
        (16, "ranks must be at most 8 on a {}"),
    ],
)
def test_what_gpus_cannot_do_is_refused_before_any_memory_is_asked_for(heap, ranks, said):
    class Ranks:
        size = ranks

        def allgather(self, told, **_):
            return [told] * ranks

    with pytest.raises(ValueError, match=said.format(heap)):
        Runtime.open([replace(CONFIG, heap=heap, experts=16)], Ranks())


def test_the_first_fault_is_kept(pair):
    for number in range(3):
        pair[0].poison(ValueError(f"number {number}"), 1)
    with pytest.raises(EpmoeError, match="number 0"):
        pair[0].check()


def test_a_close_says_closed_and_a_fault_before_it_is_not_overwritten(pair):
    pair[1].poison(PeerLost("rank 7 exited", ranks=(7,), how="exited"), 3)
    said = left(pair[0], 0, 1)
    pair[1].close()
    pair[1].close()
    assert left(pair[0], 0, 1) == said
    with pytest.raises(EpmoeError, match="rank 1: this MoE is closed"):
        pair[1].check()


def test_a_turn_is_for_one_caller_and_the_lane_is_free_afterwards(pair):
    with pair[0].turn(1):
        with pytest.raises(EpmoeError, match="lane 1 is in round 1 already"), pair[0].turn(1):
            pass
        with pair[0].turn(0):
            pass
    with pair[0].turn(1):
        pass
    for number in (-1, 2):
        text = rf"lane must be in 0..1, got {number}"
        with pytest.raises(ValueError, match=text), pair[0].turn(number):
            pass
    pair[0].check()


def test_the_first_round_may_wait_longer(pair):
    lane = pair[0].lanes[0]
    assert pair[0].limit_s(lane) == CONFIG.open_s
    lane.round = 2
    assert pair[0].limit_s(lane) == CONFIG.stall_s
    lane.round = ROUNDS + 1
    assert pair[0].limit_s(lane) == CONFIG.stall_s


def test_a_forked_child_may_neither_use_nor_poison_nor_close(pair):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pair[0].poison(ValueError("child"), 1)
            pair[0].close()
            pair[0].check()
        except EpmoeError as error:
            text = f"opened by pid {os.getppid()} and is used in pid {os.getpid()}"
            code = 0 if text in str(error) and not pair[0].closed else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_close_in_another_thread_is_what_a_turn_reports(pair):
    def closed_from_elsewhere():
        thread = threading.Thread(target=pair[0].close)
        thread.start()
        thread.join()
        raise IndexError("a view that is gone")

    text = "closed by another thread in round 1 of lane 0"
    with pytest.raises(EpmoeError, match=text), pair[0].turn(0):
        closed_from_elsewhere()
