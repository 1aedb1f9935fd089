"""The NVSHMEM heap around a pretended NVSHMEM: who is asked what, in which order; what fails."""

import os
import re

import numpy as np
import pytest
import torch
from ranks import several

from epmoe import Group
from epmoe.comm import nvshmem
from epmoe.comm.device import DeviceSlabs
from epmoe.errors import EpmoeError

LIMIT_S = 20.0
UID = np.dtype([("version", np.int32), ("internal", np.int8, (124,))], align=True)
BASE = 0x7F0000000010  # not a multiple of 128


class Pretended:
    """``nvshmem.core`` and ``nvshmem.bindings`` in one, without a GPU."""

    def __init__(self, rank, *, running=0, room=1 << 40, deaf=(), as_rank=None, size=2):
        self.rank, self.running, self.room, self.deaf, self.size = rank, running, room, deaf, size
        self.as_rank = rank if as_rank is None else as_rank
        self.calls, self.uid, self.env = [], None, {}

    def get_version(self):
        self.calls.append("version")

    def init_status(self):
        return self.running

    def my_pe(self):
        return self.as_rank

    def n_pes(self):
        return self.size

    def get_unique_id(self, empty):
        uid = type("Uid", (), {})()
        uid._data = np.zeros(1, dtype=UID)
        if not empty:
            uid._data["internal"] = 77
        return uid

    def init(self, device, uid, rank, nranks, initializer_method):
        self.calls.append("init")
        self.env = {name: os.environ.get(name) for name in nvshmem.ALWAYS}
        self.uid = (int(uid._data["internal"][0, 5]), rank, nranks, initializer_method)

    def malloc(self, nbytes):
        self.calls.append("malloc")
        return BASE if nbytes <= self.room else 0

    def ptr(self, address, rank):
        return 0 if rank in self.deaf else address + (rank << 40)

    def free(self, address):
        self.calls.append(f"free {address:#x}")

    def finalize(self):
        self.calls.append("finalize")


@pytest.fixture(autouse=True)
def no_gpu_is_needed(monkeypatch):
    monkeypatch.setattr(nvshmem, "driver", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(DeviceSlabs, "_expect_gpu", lambda self: None)
    monkeypatch.setattr(DeviceSlabs, "_expect_free", lambda self, nbytes: None)
    device = type("Device", (), {"__init__": lambda s, n: None, "set_current": lambda s: None})
    real = nvshmem.importlib.import_module
    fake = type("core", (), {"Device": device})
    monkeypatch.setattr(
        nvshmem.importlib, "import_module", lambda n: fake if n == "cuda.core" else real(n)
    )


def with_heap(monkeypatch, pretend, body):
    """``body(heap, pretended)`` on two ranks; what it returns, or the error as text, by rank."""

    def one(rank):
        pretended = pretend(rank)
        monkeypatch.setattr(nvshmem, "_modules", lambda: (pretended, pretended))
        monkeypatch.setattr(DeviceSlabs, "_clear", lambda self: pretended.calls.append("clear"))
        with Group.from_env() as group:
            try:
                heap = nvshmem.NvshmemHeap(group, 1000, generation=1, limit_s=LIMIT_S)
            except EpmoeError as error:
                return f"{type(error).__name__}: {error}"
            return body(heap, pretended)

    return [outcome.result for outcome in several(2, one)]


def test_it_is_started_by_the_id_of_rank_0_without_multicast(monkeypatch):
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "0")

    def body(heap, pretended):
        return [pretended.uid, pretended.env, pretended.calls]

    for rank, (uid, env, calls) in enumerate(with_heap(monkeypatch, Pretended, body)):
        assert uid == [77, rank, 2, "uid"]
        assert env == nvshmem.ALWAYS
        assert env["NVSHMEM_DISABLE_NVLS"] == "1"
        assert calls == ["version", "init", "malloc", "clear"]


def test_slabs_are_aligned_and_peers_are_where_nvshmem_says(monkeypatch):
    found = with_heap(monkeypatch, Pretended, lambda heap, _: [heap.address(0), heap.address(1)])
    start = 0x7F0000000080
    assert found == [[start, start + (1 << 40)], [start, start]]


def test_close_waits_for_nobody_and_finalize_gives_all_back(monkeypatch):
    def body(heap, pretended):
        del pretended.calls[:]
        heap.close()
        heap.close()
        closed = list(pretended.calls)
        heap.finalize()
        heap.finalize()
        return [closed, pretended.calls]

    for closed, calls in with_heap(monkeypatch, Pretended, body):
        assert closed == []
        assert calls == [f"free {BASE:#x}", "finalize"]


def test_a_second_heap_takes_the_nvshmem_that_runs(monkeypatch):
    found = with_heap(monkeypatch, lambda rank: Pretended(rank, running=2), lambda _, p: p.calls)
    assert found == [["version", "malloc", "clear"]] * 2


@pytest.mark.parametrize(
    ("pretend", "said"),
    [
        (lambda r: Pretended(r, running=2 * r), "runs on some ranks already, but not on rank 0"),
        (lambda r: Pretended(r, running=2, size=4), "2 of 4|in NVSHMEM already"),
        (lambda r: Pretended(r, running=2, as_rank=1 - r), "in NVSHMEM already"),
        (lambda r: Pretended(r, room=10), "NVSHMEM has no 0.0 MiB left in its heap"),
        (lambda r: Pretended(r, deaf=(1,)), "rank 0 cannot reach rank 1 "),
    ],
)
def test_what_cannot_be_had_is_an_error_on_all_ranks(monkeypatch, pretend, said):
    found = with_heap(monkeypatch, pretend, lambda heap, _: "a heap")
    for text in found:
        assert text.startswith("EpmoeError")
        assert re.search(said, text), text


def test_without_the_package_the_extra_is_named():
    if nvshmem.importlib.util.find_spec("nvshmem") is not None:
        pytest.skip("nvshmem4py is installed here")
    with pytest.raises(EpmoeError, match=r"the extra epmoe\[nvshmem\] is not installed"):
        nvshmem._modules()
    assert nvshmem.why_not()
