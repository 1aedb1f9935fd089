"""Experts move between GPUs: exact bytes and bits, and nobody switches to what did not arrive."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from epmoe import local
from epmoe.comm import cuda

HERE = Path(__file__).parent
MARK = "@@"
CLOSE = 6e-3  # relative error of bf16 rounding at four places against the oracle's

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@functools.cache
def findings(ranks, *names):
    if reason := cuda.why_not():
        pytest.skip(reason)
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    argv = [sys.executable, str(HERE / "migration.py"), *names]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with local.spawn_ranks(ranks, argv, end_others=False, env={"PYTHONPATH": path}) as job:
        return [(outcome.code, outcome.log) for outcome in job.wait(200)]


def found(ranks, body, *names, but=()):
    """What each rank found, those in ``but`` left out."""
    values = []
    for rank, (code, log) in enumerate(findings(ranks, *names)):
        if rank in but:
            continue
        lines = [json.loads(x.removeprefix(MARK)) for x in log.splitlines() if x.startswith(MARK)]
        mine = [line for line in lines if line["body"] == body]
        assert mine, f"rank {rank} ended with {code}:\n{log[-3000:]}"
        assert "value" in mine[0], mine[0]["error"]
        values.append(mine[0]["value"])
    return values


ALL = ("choice", "exact", "several", "damaged")


def test_the_kernel_chooses_the_slots_that_the_host_chooses():
    for one in found(1, "choice", "choice"):
        assert one == {"wrong": 0, "bad": [-2, -2]}


@pytest.mark.parametrize("ranks", [2, 4])
def test_answers_keep_their_bits_before_during_and_after(ranks):
    for one in found(ranks, "exact", *ALL):
        assert (one["differ"], one["wrong"], one["moved"], one["stayed"]) == (0, 0, 12, True)
        assert one["worst"] < CLOSE
        assert one["epoch"] > 12  # some went in steps
        assert one["counted"] > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_that_move_at_once_take_turns_in_the_freight_region(ranks):
    for one in found(ranks, "several", *ALL):
        assert (one["differ"], one["wrong"]) == (0, 0)
        assert min(one["epochs"]) >= 6


def test_a_damaged_slot_is_noticed_and_the_old_placement_stays():
    one, two = found(2, "damaged", *ALL)
    assert one["old"]
    assert two["old"]
    assert "PeerLost: rank 1" in one["said"]
    assert "arrived damaged" in two["said"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_killed_in_the_middle_leaves_what_the_placement_says(ranks):
    for one in found(ranks, "killed", "killed", but=(ranks - 1,)):
        assert one["said"] == f"exited ({ranks - 1},)"
        assert one["right"]
