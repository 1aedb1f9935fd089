"""Ranks that know nothing of each other meet within a limit, or hear who is absent."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import pytest
from ranks import several
from torch.distributed import TCPStore

from epmoe import local
from epmoe.comm import launcher, meeting
from epmoe.comm.group import Group
from epmoe.errors import EpmoeError, PeerLost


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def store_env():
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}


def by_store(store_env, rank, size=3):
    """What torchrun without an agent, or a hand-written script, gives a rank."""
    env = store_env | {"RANK": str(rank), "WORLD_SIZE": str(size)}
    return launcher.from_env(env)


def test_ranks_meet_again_and_again_over_the_hub():
    def body(rank):
        hub = launcher.from_env(os.environ)
        return [[m.decode() for m in hub.meet(b"%d.%d" % (turn, rank), 5)] for turn in range(5)]

    for outcome in several(3, body):
        assert outcome.result == [[f"{turn}.{r}" for r in range(3)] for turn in range(5)]


def test_ranks_meet_again_and_again_over_a_store_that_rank_0_serves(store_env):
    def body(rank):
        seen = []
        for turn in range(3):
            with Group(by_store(store_env, rank), limit_s=10) as group:
                said = group.allgather(b"%d" % turn, what="turn", limit_s=5)
                seen.append([one.decode() for one in said])
        return seen

    for outcome in several(3, body):
        assert outcome.result == [[str(turn)] * 3 for turn in range(3)]


def test_ranks_meet_again_and_again_over_a_store_that_stays(store_env):
    env = store_env | {"TORCHELASTIC_USE_AGENT_STORE": "True"}

    def body(rank):
        if rank == 2:  # the agent; the other two are its ranks
            address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
            store = TCPStore(*address, is_master=True, wait_for_workers=False)
            store.wait(["over"], timedelta(seconds=20))
            return None
        met = [by_store(env, rank, size=2).meet(b"%d%d" % (turn, rank), 10) for turn in range(3)]
        if rank == 0:
            TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False).set("over", "")
        return [[m.decode() for m in one] for one in met]

    outcomes = several(3, body)
    assert outcomes[1].result == [["00", "01"], ["10", "11"], ["20", "21"]]


def test_the_store_says_who_is_absent(store_env):
    def body(rank):
        if rank == 1:
            time.sleep(1.5)
            return
        with pytest.raises(EpmoeError, match="absent: rank 1$"):
            by_store(store_env, rank).meet(b"here", 0.7)

    several(3, body)


def test_a_store_that_never_answers_is_left(monkeypatch):
    monkeypatch.setattr(meeting, "GRACE_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(8)
        where = mute.getsockname()
        one = meeting.Store(*where, "run", 1, 2, None, hosted=True)
        begun = time.monotonic()
        with pytest.raises(EpmoeError, match=f"rank 1.*the store at 127.0.0.1:{where[1]}"):
            one.meet(b"x", 1.0)
        assert time.monotonic() - begun < 5


def test_the_hub_says_who_is_absent_and_the_next_meeting_works():
    def body(rank):
        hub = launcher.from_env(os.environ)
        if rank == 2:
            time.sleep(1)
        else:
            with pytest.raises(EpmoeError, match=r"within 0.5 s; absent: rank 2$"):
                hub.meet(b"first", 0.5)
            time.sleep(0.7)
        return len(hub.meet(b"again", 5))

    assert [o.result for o in several(3, body)] == [3, 3, 3]


def test_a_rank_that_ended_before_the_meeting_is_named_at_once():
    def body(rank):
        if rank == 1:
            return None
        if rank == 2:
            time.sleep(0.2)  # whoever comes after it hears it too
        start = time.monotonic()
        with pytest.raises(PeerLost, match=r"rank 1(,0)? ended before the ranks met") as caught:
            Group.from_env(limit_s=10)
        assert caught.value.ranks[0] == 1
        return time.monotonic() - start

    with local.fork_ranks(3, body, end_others=False) as job:
        for outcome in job.wait(20):
            assert outcome.ok, outcome.log
            assert (outcome.result or 0) < 1


def test_a_process_that_only_inherited_the_environment_is_no_rank():
    with pytest.raises(EpmoeError, match="EPMOE_HUB_FD=999 is no socket here"):
        meeting.Hub(999, 0, 2, 0).meet(b"x", 1)


class Slow:
    """A communicator whose allgather never completes."""

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def Iallgather(self, mine, found):
        return self

    def Test(self):
        return False


def test_mpi_is_left_at_the_limit():
    start = time.monotonic()
    with pytest.raises(EpmoeError, match="not all 2 ranks met over MPI within 0.2 s"):
        meeting.Mpi(Slow()).meet(b"x", 0.2)
    assert time.monotonic() - start < 1
