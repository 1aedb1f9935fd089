"""``open`` is all or nothing: whatever is wrong on one rank, all raise within a second."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from dataclasses import fields, replace

import pytest
from faults.harness import CONFIG, Traffic, belongings, left_since, shmem, start
from ranks import ranks

from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.errors import ConfigMismatch, EpmoeError, PeerLost
from epmoe.moe import MoE

OTHER = {
    "experts": 24,
    "choices": 1,
    "hidden": 32,
    "inner": 64,
    "max_rows": 17,
    "slots": 13,  # on three ranks this one could not even be laid out
    "dtype": "bf16",
    "format": "fp8",
    "activations_in": "format",
    "activation": "geglu",
    "bias": True,
    "clamp": 7.0,
    "weight_in": "fc2",
    "shared_inner": 8,
    "freight": 1 << 21,
    "lanes": 2,
    "heap": "cuda",
    "stall_s": 21.0,
    "open_s": 21.0,
    "name": "another",
}


@ranks(1, 2, 3, mpi=False)
def test_a_field_that_differs_is_named_with_both_values_on_all_ranks(rank, group):
    odd = group.size - 1
    for field in fields(MoEConfig):
        value = OTHER[field.name]  # a new field needs a line in OTHER
        mine = replace(CONFIG, **{field.name: value}) if rank == odd else CONFIG
        began = time.monotonic()
        if group.size == 1:
            if field.name not in ("heap",):
                MoE.open(mine, group).close()
            continue
        with pytest.raises(ConfigMismatch) as caught:
            MoE.open(mine, group)
        assert time.monotonic() - began < 1
        text = str(caught.value)
        assert f" {field.name} is {getattr(CONFIG, field.name)!r} on rank 0" in text
        assert f"and {value!r} on rank {odd}" in text
    MoE.open(CONFIG, group).close()  # the group is as good as before


@ranks(2, mpi=False)
def test_different_numbers_of_layers_are_named(rank, group):
    with pytest.raises(ConfigMismatch, match="layers is 1 on rank 0"):
        MoE.open_all([CONFIG] * (1 + rank), group)
    with pytest.raises(ConfigMismatch, match="layers is 1 on rank 0"):
        MoE.open_all([CONFIG][rank:], group)
    with pytest.raises(ValueError, match="at least one layer"):
        MoE.open_all([], group)


@ranks(2, mpi=False)
def test_layers_in_different_order_are_told_apart_by_name(rank, group):
    names = ["a", "b"][:: 1 - 2 * rank]
    with pytest.raises(ConfigMismatch, match="layer 0 name is 'a' on rank 0"):
        MoE.open_all([replace(CONFIG, name=name) for name in names], group)


@ranks(3, mpi=False)
def test_slots_that_do_not_divide_are_refused_on_all_ranks_before_memory_is_taken(rank, group):
    before = belongings()
    with pytest.raises(ValueError, match=r"slots \(13\) must be a multiple"):
        MoE.open(replace(CONFIG, slots=13), group)
    assert left_since(before) == {}


@ranks(3, mpi=False)
def test_no_memory_on_one_rank_is_an_error_on_all_and_the_next_open_works(rank, group):
    before = belongings()
    began = time.monotonic()
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    with pytest.raises(EpmoeError, match="rank 1.*no memory for a slab"):
        MoE.open(CONFIG, group)
    assert time.monotonic() - began < 1
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_since(before) == {}
    MoE.open(CONFIG, group).close()


@ranks(3, mpi=False)
def test_a_heap_larger_than_memory_is_refused_with_both_sizes(rank, group):
    with pytest.raises(EpmoeError, match=r"all slabs together need .* MiB and .* MiB"):
        MoE.open(replace(CONFIG, hidden=1 << 20, max_rows=1 << 20), group)


@ranks(3, mpi=False)
def test_no_descriptors_on_one_rank_are_an_error_on_all(rank, group):
    began = time.monotonic()
    if rank == 1:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
    try:
        with pytest.raises(EpmoeError) as caught:
            MoE.open(CONFIG, group)
    finally:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert time.monotonic() - began < 1
    assert "descriptors" in str(caught.value) or "open files" in str(caught.value), caught.value


def killed_at(n, ranks=3):
    """Rank 1 kills itself before its n-th exchange; what the others say, or None if it lives."""

    def body(rank):
        traffic = Traffic(ranks, steps=1)
        with Group.from_env():
            pass
        before = belongings()
        report = {"error": None}
        with Group.from_env() as group:
            real, calls = group._exchange, []

            def counted(*args, **kwargs):
                calls.append(1)
                if rank == 1 and len(calls) == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            group._exchange = counted
            try:
                moe = traffic.open(group)
                moe.close()
                del moe
            except PeerLost as error:
                report = {"error": str(error), "how": error.how, "ranks": list(error.ranks)}
                report["at"] = time.monotonic()
        return report | {"left": left_since(before)}

    with start(ranks, body) as job:
        outcomes = job.wait(30)
    if outcomes[1].ok:
        return None
    return [
        (o.result, o.result.get("at", 0) - outcomes[1].ended_s) for o in outcomes if o.rank != 1
    ]


def test_a_kill_in_every_phase_of_open_and_load():
    for n in range(1, 20):
        said = killed_at(n)
        if said is None:
            break
        for report, delay in said:
            assert report["left"] == {}, (n, report)
            assert report["error"], (n, report)
            assert (report["how"], report["ranks"]) == ("exited", [1]), (n, report)
            assert delay < 1, (n, report)
    assert 5 < n < 19, "phases: configs, slab made, descriptors, mapped, loaded"


@ranks(2, limit_s=100, mpi=False)
def test_fifty_opens_leave_nothing(rank, group):
    config = replace(CONFIG, max_rows=4096)  # 7 MiB a slab: fifty of them would show
    MoE.open(config, group).close()
    before, memory = belongings(), shmem()
    for _ in range(50):
        MoE.open(config, group).close()
    assert left_since(before) == {}
    assert shmem() - memory < 100


@ranks(1, mpi=False)
def test_limits_a_thousand_times_longer_than_anybody_waits_are_limits(rank, group):
    MoE.open(replace(CONFIG, open_s=1e6, stall_s=1e6), group).close()
    for name in ("open_s", "stall_s"):
        with pytest.raises(ValueError, match=f"{name} must be at most"):
            replace(CONFIG, **{name: math.inf})
