"""Sealed memory: shared, of a fixed size, without a name, gone when nobody holds it."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from faults.harness import belongings, left_since
from ranks import ranks

from epmoe.comm import host, open_heap
from epmoe.errors import EpmoeError

SIZE = 1 << 20


@ranks(1, 2, 4)
def test_every_rank_sees_every_slab_and_all_are_zero_at_first(rank, group):
    heap = open_heap("host", group, SIZE, generation=1, limit_s=20)
    assert (heap.rank, heap.ranks, heap.generation) == (rank, group.size, 1)
    assert all(not heap.peer(r).any() and len(heap.peer(r)) == SIZE for r in range(group.size))
    group.allgather(b"", what="all are zero", limit_s=20)
    for peer in range(group.size):
        heap.peer(peer)[rank] = 10 * peer + rank + 1
    group.allgather(b"", what="written", limit_s=20)
    want = [10 * rank + r + 1 for r in range(group.size)]
    assert heap.mine[: group.size].tolist() == want
    assert torch.equal(heap.mine, heap.peer(rank))
    heap.close()
    heap.close()


@ranks(2)
def test_nothing_stays_after_close_and_nothing_has_a_name(rank, group):
    before = belongings()
    heap = open_heap("host", group, SIZE, generation=1, limit_s=20)
    during = belongings()
    assert during["slabs"] - before["slabs"] == 2
    assert {n for n in ("shm", "tmp", "threads") if during[n] != before[n]} == set()
    assert during["fds"] - before["fds"] <= 2  # Python's mmap keeps a descriptor of its own
    heap.close()
    assert left_since(before) == {}


@ranks(2)
def test_a_view_somebody_keeps_stays_readable(rank, group):
    heap = open_heap("host", group, SIZE, generation=1, limit_s=20)
    view = heap.mine[:8]
    view[:] = 7
    heap.close()
    assert view.tolist() == [7] * 8


@ranks(2, mpi=False)
def test_a_forked_child_has_no_slabs(rank, group):
    heap = open_heap("host", group, SIZE, generation=1, limit_s=20)
    child = os.fork()
    if child == 0:
        os._exit(Path("/proc/self/maps").read_text().count("epmoe-slab"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    heap.close()


def test_nobody_can_change_the_size_of_a_slab():
    fd = host._memory_file(SIZE, 0)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert os.fstat(fd).st_size == SIZE
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(again, 0)
    os.close(again)
    os.close(fd)


def test_a_slab_of_another_size_is_not_mapped():
    fd = host._memory_file(SIZE, 3)
    with pytest.raises(EpmoeError, match=f"rank 3 has {SIZE} bytes, the layout says {SIZE + 128}"):
        host._mapped(fd, SIZE + 128, 3)
    os.close(fd)


def test_too_much_is_refused_with_both_sizes_before_it_is_taken():
    assert host.why_not(SIZE) == ""
    assert "MiB and" in host.why_not(1 << 50)
    assert 0 < host.free_memory() < 1 << 50


@ranks(2)
def test_a_heap_that_is_not_there_is_no_other_heap(rank, group):
    with pytest.raises(ValueError, match="heap must be host, cuda or nvshmem, got 'paper'"):
        open_heap("paper", group, SIZE, generation=1, limit_s=20)


def test_a_forked_child_that_collects_its_heap_keeps_its_own_memory():
    mapping = host._mapped(host._memory_file(1 << 24, 0), 1 << 24, 0)
    begin = mapping.data_ptr()
    pid = os.fork()
    if pid == 0:  # the slab is not mapped here: what the child maps may lie in its place
        try:
            own = [mmap.mmap(-1, 1 << 22) for _ in range(16)]
            del mapping
            gc.collect()
            for one in own:
                one[:: 1 << 12] = bytes(1 << 10)  # a fault of memory, if it has been unmapped
            os._exit(0)
        finally:
            os._exit(1)
    assert begin
    assert os.waitpid(pid, 0)[1] == 0
