"""Ranks meet, prove who they are, exchange values, and learn of each other's end."""

from __future__ import annotations

import dataclasses
import mmap
import os
import signal
import struct
import tempfile
import threading
import time

import pytest
import torch.distributed as dist
from ranks import ranks, several

from epmoe import local
from epmoe.comm import door, meeting, mesh
from epmoe.comm import group as group_module
from epmoe.comm.fds import pass_fds
from epmoe.comm.group import Group
from epmoe.comm.peer import PACKED, Peer
from epmoe.errors import ConfigMismatch, EpmoeError, PeerLost


@ranks(1, 2, 4)
def test_every_rank_gets_every_value(rank, group):
    assert [p.rank for p in group.peers] == list(range(group.size))
    assert group.peers[rank].pid == os.getpid()
    for turn in range(20):
        said = group.allgather(bytes([rank, turn]) * turn, what="turn", limit_s=5)
        assert said == [bytes([r, turn]) * turn for r in range(group.size)]


@ranks(2, 4)
def test_values_larger_than_any_socket_cross_without_waiting_for_each_other(rank, group):
    said = group.allgather(bytes([rank]) * (5 << 20), what="large", limit_s=20)
    assert [(one[0], one[-1], len(one)) for one in said] == [
        (r, r, 5 << 20) for r in range(group.size)
    ]


@ranks(4)
def test_one_failing_rank_fails_the_phase_for_all(rank, group):
    def phase():
        with group.guarded("shape the slab", 5):
            if rank == 2:
                raise KeyError("boom")

    with pytest.raises(KeyError if rank == 2 else EpmoeError) as caught:
        phase()
    if rank != 2:
        assert str(caught.value) == f"{group.peers[2]} failed in shape the slab: KeyError: 'boom'"
    assert group.allgather(b"", what="after", limit_s=5) == [b""] * 4


@ranks(2)
def test_a_failure_in_a_phase_of_a_phase_is_told_once(rank, group):
    def phases():
        with group.guarded("outer", 5), group.guarded("inner", 5):
            raise KeyError(rank)

    with pytest.raises(KeyError):
        phases()
    assert group.allgather(bytes([rank]), what="after", limit_s=5) == [b"\0", b"\1"]


@ranks(4)
def test_a_rank_that_fails_early_reaches_ranks_inside_the_phase(rank, group):
    before = len(os.listdir("/proc/self/fd"))

    def phase():
        with group.guarded("map", 5):
            if rank == 1:
                raise MemoryError("no room")
            pass_fds(group, 0, what="slab", limit_s=5)

    with pytest.raises(MemoryError if rank == 1 else EpmoeError, match="no room"):
        phase()
    assert len(os.listdir("/proc/self/fd")) == before  # what had arrived is closed again
    assert group.allgather(b"", what="after", limit_s=5) == [b""] * 4


@ranks(4)
def test_two_failing_ranks_are_both_named_to_the_others(rank, group):
    def phase():
        with group.guarded("load", 5):
            if rank in (1, 3):
                raise OSError(f"disk {rank}")

    with pytest.raises(OSError if rank in (1, 3) else EpmoeError) as caught:
        phase()
    if rank in (0, 2):
        assert "rank 1" in str(caught.value)
        assert "disk 3" in str(caught.value)


@ranks(2, 4)
def test_calls_in_different_order_name_both_on_all_ranks(rank, group):
    mine = "open moe.1" if rank == 1 else "open moe.0"
    with pytest.raises(ConfigMismatch) as caught:
        group.allgather(b"x" * rank, what=mine, limit_s=5)
    assert "rank 0 is at 'open moe.0'" in str(caught.value)
    assert "rank 1 is at 'open moe.1'" in str(caught.value)
    assert group.allgather(b"", what="again", limit_s=5) == [b""] * group.size


@ranks(2)
def test_a_descriptor_where_a_value_is_due_is_a_mismatch(rank, group):
    before = len(os.listdir("/proc/self/fd"))
    call, given = (pass_fds, (group, 0)) if rank == 0 else (group.allgather, (b"",))
    with pytest.raises(ConfigMismatch, match=r"'same' \(FD\).*'same' \(VALUE\)"):
        call(*given, what="same", limit_s=5)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda g: g.allgather("text", what="x", limit_s=1), TypeError, "value must be bytes"),
        (lambda g: g.allgather(b"", what="", limit_s=1), ValueError, "what must have"),
        (lambda g: g.allgather(b"", what="x" * 201, limit_s=1), ValueError, "what must have"),
        (lambda g: g.allgather(b"", what="x", limit_s=0), ValueError, "limit_s must be above 0"),
        (lambda g: g.allgather(b"", what="x", limit_s=1e9), ValueError, "at most 1000000, got 1"),
        (lambda g: Group.from_env(limit_s=None), ValueError, "limit_s must be .* got None"),
        (lambda g: pass_fds(g, -1, what="x", limit_s=1), ValueError, "fd must be an open"),
        (lambda g: Group.from_torch(), ValueError, "process_group must belong"),
    ],
)
def test_wrong_arguments_are_refused_with_their_limit(call, error, text):
    with Group.alone() as group, pytest.raises(error, match=text):
        call(group)


def test_a_value_past_the_largest_is_refused(monkeypatch):
    monkeypatch.setattr(group_module, "LARGEST", 3)
    with Group.alone() as group, pytest.raises(ValueError, match="at most 3 bytes, got 4"):
        group.allgather(b"1234", what="x", limit_s=1)


def test_alone_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with Group.alone() as group:
        assert (group.rank, group.size, group.local_rank, group.one_host) == (0, 1, 0, True)
        assert group.allgather(b"v", what="x", limit_s=1) == [b"v"]
        with group.guarded("phase", 1):
            pass
    with pytest.raises(EpmoeError, match="rank 0 closed this group before 'late'"):
        group.allgather(b"", what="late", limit_s=1)


def lost(call):
    """How long the call took to raise PeerLost, and what it said, as JSON."""
    start = time.monotonic()
    try:
        call()
    except PeerLost as error:
        return [time.monotonic() - start, error.how, list(error.ranks), str(error)]
    return None


def survivors(job, victims):
    for outcome in job.wait(20):
        if outcome.rank not in victims:
            assert outcome.ok, outcome.log
            yield outcome.result


@pytest.mark.parametrize("blind", [False, True], ids=["pidfd", "proc"])
@pytest.mark.parametrize("helper", [False, True], ids=["alone", "with-a-helper"])
def test_a_killed_rank_is_named_at_once(helper, blind, monkeypatch):
    killed = mmap.mmap(-1, 8)
    if blind:
        monkeypatch.delattr(os, "pidfd_open")

    def body(rank):
        group = Group.from_env(limit_s=10)
        group.allgather(b"", what="go", limit_s=5)
        if rank == 2:
            if helper and os.fork() == 0:  # it inherits the sockets: they will not say "end"
                time.sleep(1.0)
                os._exit(0)
            time.sleep(0.05)
            killed[:] = struct.pack("d", time.monotonic())
            os.kill(os.getpid(), signal.SIGKILL)
        found = lost(lambda: group.allgather(b"", what="next", limit_s=5))
        late = time.monotonic() - struct.unpack("d", killed)[0]
        started = time.monotonic()
        group.close()
        group.close()
        return [*found, late, time.monotonic() - started]

    with local.fork_ranks(4, body, end_others=False) as job:
        for _, how, who, text, late, closing in survivors(job, {2}):
            assert (how, who) == ("exited", [2])
            assert f"pid {job.pids[2]}" in text
            assert "'next'" in text
            assert late < 0.5  # 2 ms here; the machine may be busy
            assert closing < 1


def test_two_killed_ranks_are_both_known_to_the_watch():
    def body(rank):
        group = Group.from_env(limit_s=10)
        if rank in (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        found = lost(lambda: group.allgather(b"", what="next", limit_s=5))
        until = time.monotonic() + 1
        while len(group.watch.lost) < 2 and time.monotonic() < until:
            time.sleep(0.001)
        return [found, sorted(group.watch.lost)]

    with local.fork_ranks(4, body, end_others=False) as job:
        for found, known in survivors(job, {1, 3}):
            assert found[1] == "exited"
            assert set(found[2]) <= {1, 3}
            assert {1, 3} <= set(known)  # the other survivor may have finished by then


def test_a_stopped_rank_is_reported_at_the_limit_with_its_state():
    def body(rank):
        group = Group.from_env(limit_s=10)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return lost(lambda: group.allgather(b"", what="next", limit_s=0.5))

    with local.fork_ranks(3, body, end_others=False) as job:
        time.sleep(0.1)
        while job.outcomes[0].code is None or job.outcomes[2].code is None:
            time.sleep(0.01)
        for outcome in (job.outcomes[0], job.outcomes[2]):
            took, how, who, text = outcome.result
            assert (how, who) == ("stopped", [1])
            assert "state T" in text
            assert took < 0.6


@pytest.mark.parametrize(("how", "text"), [("closed", "closed the group"), ("raised", "disk full")])
def test_a_rank_that_leaves_is_told_apart_from_one_that_dies(how, text):
    def body(rank):
        group = Group.from_env(limit_s=10)
        if rank == 0:
            try:
                with group:
                    if how == "raised":
                        raise OSError("disk full")
            except OSError:
                pass
            time.sleep(0.5)
            return None
        return lost(lambda: group.allgather(b"", what="next", limit_s=5))

    with local.fork_ranks(3, body, end_others=False) as job:
        for took, seen, who, said in survivors(job, {0}):
            assert (seen, who) == (how, [0])
            assert text in said
            assert took < 0.4


def test_ranks_that_leave_because_of_a_dead_one_do_not_take_the_blame():
    def body(rank):
        group = Group.from_env(limit_s=10)
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            time.sleep(0.3)  # by now the others have raised, told and ended
        try:
            with group:
                group.allgather(b"", what="next", limit_s=5)
        except PeerLost as error:
            return [list(error.ranks), error.how]

    with local.fork_ranks(4, body, end_others=False) as job:
        assert list(survivors(job, {3})) == [[[3], "exited"]] * 3


def test_a_loss_seen_elsewhere_is_handed_on_with_its_cause():
    def body(rank):
        group = Group.from_env(limit_s=10)
        if rank == 0:  # as a wait on the heap raises it
            try:
                with group:
                    raise PeerLost("rank 1 sent a broken word", ranks=(1,), how="corrupt")
            except PeerLost:
                time.sleep(0.3)
            return None
        if rank == 1:
            time.sleep(0.3)
            return None
        return lost(lambda: group.allgather(b"", what="next", limit_s=5))

    with local.fork_ranks(3, body, end_others=False) as job:
        ((_, how, who, text),) = survivors(job, {0, 1})
    assert (how, who) == ("corrupt", [1])
    assert "rank 1 sent a broken word" in text


def test_ctrl_c_in_a_phase_reaches_the_others():
    def body(rank):
        group = Group.from_env(limit_s=10)

        def phase():
            with group.guarded("compile", 5):
                if rank == 1:
                    raise KeyboardInterrupt

        if rank == 1:
            with pytest.raises(KeyboardInterrupt):
                phase()
            time.sleep(0.5)
            return None
        return lost(phase)

    with local.fork_ranks(2, body, end_others=False) as job:
        ((took, how, who, text),) = survivors(job, {1})
    assert (how, who) == ("raised", [1])
    assert "left compile by KeyboardInterrupt" in text
    assert took < 0.4


def dying(call, when):
    """``call``, with this process killed before or after it."""

    def dies(*given, **named):
        if when == "after":
            call(*given, **named)
        MOMENT[:] = struct.pack("d", time.monotonic())
        os.kill(os.getpid(), signal.SIGKILL)

    return dies


MOMENT = mmap.mmap(-1, 8)  # shared with every fork: when the victim died


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (meeting.Hub, "meet"),
        (group_module, "Watch"),
        (door, "connect"),
        (mesh.Mesh, "exchange"),
    ],
    ids=["meeting", "watch", "connecting", "agreeing"],
)
def test_a_kill_at_any_step_of_forming_the_group_is_raised_on_all(place, name, when):
    def body(rank):
        if rank == 1:
            setattr(place, name, dying(getattr(place, name), when))
        found = lost(lambda: Group.from_env(limit_s=10).allgather(b"", what="go", limit_s=10))
        return [found, time.monotonic() - struct.unpack("d", MOMENT)[0]]

    with local.fork_ranks(4, body, end_others=False) as job:
        for found, late in survivors(job, {1}):
            assert found[1] == "exited"
            assert 1 in found[2]  # and perhaps a survivor that has raised and ended before us
            assert late < 1


def test_a_forked_child_is_not_a_rank():
    def body(rank):
        group = Group.from_env(limit_s=10)
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                group.allgather(b"", what="child", limit_s=1)
            except EpmoeError as error:
                os.write(tell, str(error).encode())
            group.close()
            os._exit(0)
        os.waitpid(pid, 0)
        text = os.read(told, 999).decode()
        assert f"opened by pid {os.getpid()} and is used by pid {pid}" in text
        said = group.allgather(bytes([rank]), what="parent", limit_s=5)  # unharmed by the close
        return len(said)

    assert [o.result for o in several(2, body)] == [2, 2]


def traces():
    """What lies in shared memory and in the temporary folder, and the doors of this machine."""
    with open("/proc/net/unix") as file:
        doors = {line.split()[-1] for line in file if "@epmoe-" in line and " 00010000 " in line}
    return doors, set(os.listdir("/dev/shm")), set(os.listdir(tempfile.gettempdir()))


def test_fifty_groups_leave_no_descriptor_no_thread_and_no_name(monkeypatch):
    def body(rank):
        made = []
        real = door.listen
        monkeypatch.setattr(door, "listen", lambda: made.append(real()) or made[-1])
        Group.from_env(limit_s=10).close()
        fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(50):
            with Group.from_env(limit_s=10):
                mine = "@" + made.pop()[1][1:].decode()
                assert mine not in traces()[0]  # the door is shut once all are in
        return [len(os.listdir("/proc/self/fd")) - fds, threading.active_count() - threads]

    before = traces()
    assert [o.result for o in several(2, body)] == [[0, 0], [0, 0]]
    new = {n for old, now in zip(before[1:], traces()[1:], strict=True) for n in now - old}
    assert not {n for n in new if "epmoe" in n or "torch" in n}


class Faked:
    """A meeting of two in which rank 1 says it is on another machine."""

    rank, size, local_rank = 0, 2, None

    def meet(self, introduction, limit_s):
        me = Peer.unpack(1, introduction[:PACKED])
        far = dataclasses.replace(me, boot="another-boot-id", host="gpu-b2", pid=77)
        return [introduction, far.pack() + introduction[PACKED:]]


def test_ranks_on_another_host_are_refused_by_name():
    with Group(Faked(), limit_s=1) as group:
        assert (group.rank, group.size, group.local_rank, group.one_host) == (0, 2, 0, False)
        assert group.watch.state_of(group.peers[1]) == "?"
        with pytest.raises(EpmoeError, match=r"cannot share memory with rank 1 \(pid 77 on gpu-b2"):
            group.allgather(b"", what="open", limit_s=1)


def test_a_torch_group_is_used_and_left_as_it_was(tmp_path):
    def body(rank):
        store = dist.FileStore(str(tmp_path / "store"), 3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
        pair = dist.new_group([0, 2])
        with Group.from_torch(limit_s=10) as group:
            assert (group.rank, group.size, group.local_rank) == (rank, 3, rank)
            assert len(group.allgather(b"", what="x", limit_s=5)) == 3
        if rank == 1:
            with pytest.raises(ValueError, match="must contain this process"):
                Group.from_torch(pair)
        else:
            with Group.from_torch(pair, limit_s=10) as group:
                assert (group.rank, group.size) == (rank // 2, 2)
        assert dist.is_initialized()
        dist.barrier()
        dist.destroy_process_group()

    several(3, body)
