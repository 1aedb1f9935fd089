"""One word: whole, and in order with what was stored before it, between two processes."""

from __future__ import annotations

import mmap
import os
import platform

import pytest

from epmoe.comm import atomics

MESSAGE = 256  # a cell in another cache line than the word


@pytest.fixture(params=["ordered", "through libatomic"])
def way(request, monkeypatch):
    """Both ways to do it; the second is that of other machines than x86."""
    if request.param != "ordered":
        monkeypatch.setattr(atomics, "_ORDERED", False)
        if atomics.why_not():
            pytest.skip(atomics.why_not())
    elif platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this machine reorders")
    return request.param


def test_what_is_stored_is_loaded(way):
    cells = memoryview(bytearray(64)).cast("Q")
    for i, value in enumerate([0, 1, (1 << 64) - 1, 0x8000_0000_0000_0000, 0x1234_5678_9ABC_DEF0]):
        atomics.store(cells, i, value)
        assert atomics.load(cells, i) == value
        assert cells[i] == value


def test_a_message_is_there_before_its_word(way):
    """The litmus test of message passing: 20,000 messages to another process, none torn or late."""
    trials = 20_000
    cells = memoryview(mmap.mmap(-1, 4096)).cast("B").cast("Q")
    child = os.fork()
    if child == 0:
        wrong, seen = 0, 0
        while seen < trials:
            word = atomics.load(cells, 0)
            if word >> 32 != word & 0xFFFFFFFF:
                wrong += 1
            if word & 0xFFFFFFFF > seen:
                seen = word & 0xFFFFFFFF
                wrong += cells[MESSAGE] < seen
            else:
                os.sched_yield()
        os._exit(min(wrong, 100))
    for number in range(1, trials + 1):
        cells[MESSAGE] = number  # not struct.pack_into: that writes zeros first
        atomics.store(cells, 0, number << 32 | number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_machine_without_the_library_says_which(monkeypatch):
    assert atomics.why_not() == ""
    monkeypatch.setattr(atomics, "_ORDERED", False)
    monkeypatch.setattr(atomics, "_RELAXED_MACHINE_LIBRARY", "libnone.so.9")
    assert "libnone.so.9" in atomics.why_not()
