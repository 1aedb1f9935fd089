"""Ranks started on this machine: first failure wins, logs stay, nobody outlives the launcher."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import time

import pytest

from epmoe import local
from epmoe.comm.peer import process
from epmoe.errors import EpmoeError

PROGRAM = """
import sys
from epmoe.comm.group import Group
with Group.from_env(limit_s=20) as group:
    said = group.allgather(b"%d" % group.rank, what="x", limit_s=5)
    sys.stdout.write(f"I am {group.rank} of {[int(s) for s in said]}")
    sys.stderr.write("!")
"""


def alive(pid):
    seen = process(pid)
    return seen is not None and seen[0] not in "ZX"


def wait_for(true, limit_s=5.0):
    until = time.monotonic() + limit_s
    while not true() and time.monotonic() < until:
        time.sleep(0.002)
    return true()


def test_a_command_line_becomes_ranks_that_find_each_other(tmp_path):
    job = local.run(2, [sys.executable, "-c", PROGRAM], limit_s=60, logs=tmp_path / "logs")
    assert job.first is None, [o.log for o in job.outcomes]
    for rank in (0, 1):
        assert job.outcomes[rank].log == f"I am {rank} of [0, 1]!"
        assert (tmp_path / "logs" / f"rank-{rank}.log").read_text() == job.outcomes[rank].log


def test_results_come_back_as_bytes_or_json_of_any_length():
    def body(rank):
        return [b"", os.urandom(1) * 300_000, {"rank": rank, "x": [1.5, None]}, "y" * 200_000][rank]

    first, second, third, fourth = (o.result for o in local.run(4, body).outcomes)
    assert first == b""
    assert (len(second), len(set(second))) == (300_000, 1)
    assert third == {"rank": 2, "x": [1.5, None]}
    assert fourth == "y" * 200_000


def test_the_first_failure_ends_the_others_and_is_the_one_reported():
    def body(rank):
        if rank == 2:
            time.sleep(0.1)
            sys.stdout.write("about to fail")
            raise ZeroDivisionError("two")
        time.sleep(30)

    start = time.monotonic()
    job = local.run(3, body)
    assert time.monotonic() - start < 3
    assert (job.first.rank, job.first.code) == (2, 1)
    assert (job.first.error.type, job.first.error.text) == ("ZeroDivisionError", "two")
    assert "in body" in job.first.error.trace
    assert job.first.log.startswith("about to fail")
    assert [o.code for o in job.outcomes] == [-signal.SIGTERM, -signal.SIGTERM, 1]


def test_a_rank_that_ignores_the_request_to_end_is_ended(monkeypatch):
    monkeypatch.setattr("epmoe.comm.hub.GRACE_S", 0.3)

    def body(rank):
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(30)
        time.sleep(0.1)
        raise ValueError

    job = local.run(2, body)
    assert (job.first.rank, job.outcomes[0].code) == (1, -signal.SIGKILL)


def test_a_failure_that_came_first_stays_first_though_victims_end_before_it():
    from epmoe.comm.group import Group

    def body(rank):
        with Group.from_env(limit_s=10) as group:
            if rank == 0:
                raise OSError("the cause")  # told to the peers before this process has ended
            group.allgather(b"", what="next", limit_s=5)

    for _ in range(5):
        job = local.run(3, body)
        assert (job.first.rank, job.first.error.type) == (0, "OSError")
        assert [o.error.type for o in job.outcomes[1:]] == ["PeerLost", "PeerLost"]


def test_ranks_that_hang_print_their_stacks_and_are_killed():
    there = mmap.mmap(-1, 2)

    def body(rank):
        def waits_for_ever():
            there[rank] = 1
            time.sleep(30)

        waits_for_ever()

    with local.fork_ranks(2, body) as job:
        until = time.monotonic() + 10
        while there[:] != b"\1\1" and time.monotonic() < until:
            time.sleep(0.005)
        start = time.monotonic()
        os.kill(job.pids[1], signal.SIGSTOP)  # a stopped one as well
        outcomes = job.wait(0.3)
    assert time.monotonic() - start < 3
    assert [o.code for o in outcomes] == [-signal.SIGABRT, -signal.SIGABRT]
    assert all("in waits_for_ever" in o.log for o in outcomes)


def test_pids_are_known_before_the_ranks_end_and_others_live_on_if_asked():
    def body(rank):
        time.sleep(0.3)
        return os.getpid()

    with local.fork_ranks(3, body, end_others=False) as job:
        os.kill(job.pids[1], signal.SIGKILL)
        outcomes = job.wait(10)
    assert [o.code for o in outcomes] == [0, -signal.SIGKILL, 0]
    assert [outcomes[0].result, outcomes[2].result] == [job.pids[0], job.pids[2]]


def test_leaving_the_block_ends_every_rank_and_keeps_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    with local.fork_ranks(3, lambda rank: time.sleep(30)) as job:
        assert all(alive(pid) for pid in job.pids)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in job.pids)  # reaped, not only dead
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() <= 2  # pytest-timeout keeps one


@pytest.mark.parametrize("form", ["fork", "spawn"])
def test_ranks_die_with_a_killed_launcher(form):
    told, tell = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        try:
            if form == "fork":
                job = local.fork_ranks(3, lambda rank: time.sleep(30))
            else:
                job = local.spawn_ranks(3, ["sleep", "30"])
            os.write(tell, " ".join(map(str, job.pids)).encode())
            time.sleep(30)
        finally:
            os._exit(1)
    pids = [int(pid) for pid in os.read(told, 999).split()]
    assert len(pids) == 3
    assert all(alive(pid) for pid in pids)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert wait_for(lambda: not any(alive(pid) for pid in pids), 1.0)
    os.close(told)
    os.close(tell)


def test_every_rank_has_one_thread_unless_set_and_no_multicast_whatever_was_set(monkeypatch):
    names = ["OMP_NUM_THREADS", *local.NO_MULTICAST, "RANK", "WORLD_SIZE", "MINE"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")

    def body(rank):
        return [os.environ.get(name) for name in names]

    job = local.run(2, body, env={"MINE": "x"})
    assert job.outcomes[1].result == ["1", "0", "1", "1", "1", "2", "x"]
    assert local.run(1, body, env={"OMP_NUM_THREADS": "3"}).first is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.run(1, body).outcomes[0].result[0] == "3"


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        local.run(0, ["true"])
    with pytest.raises(ValueError, match="argv must begin with a program .* '/no/such/program'"):
        local.run(1, ["/no/such/program"])
    caught = []

    def elsewhere():
        try:
            local.run(1, ["true"])
        except EpmoeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "from the main thread" in caught[0]


def test_a_schedule_of_four_ranks_takes_milliseconds():
    start = time.monotonic()
    for _ in range(5):
        assert local.run(4, lambda rank: rank).first is None
    assert (time.monotonic() - start) / 5 < 1  # 20 to 40 ms here; importing torch takes 2 s
