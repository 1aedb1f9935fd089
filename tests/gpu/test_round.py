"""Rounds on GPUs: one body, 1, 2 and 4 ranks as this machine's GPUs allow, over both heaps."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epmoe import local
from epmoe.comm import cuda, nvshmem

HERE = Path(__file__).parent
IMPORTS = {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
MARK = "@@"  # bodies.py
ALL = (
    *("heap", "too_large", "answers", "chunks", "graphs", "two_layers", "refused", "bad_ids"),
    *("bits", "delays", "hogged", "apart", "modes"),
)
NO_ROUND = ("heap", "too_large", "opened")  # ranks may share a GPU
CLOSE = 6e-3  # relative error of bf16 rounding at four places against the oracle's, measured 3e-3

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
both_heaps = pytest.mark.parametrize("heap", ["cuda", "nvshmem"])
ranks_1_2_4 = pytest.mark.parametrize("ranks", [1, 2, 4])


@functools.cache
def findings(heap, ranks, names=ALL):
    """``[rank][body]`` → what it found; one start of the ranks for all bodies."""
    reason = {"cuda": cuda.why_not, "nvshmem": nvshmem.why_not}[heap]()
    if reason:
        pytest.skip(f"no {heap} heap: {reason}")
    if torch.cuda.device_count() < ranks and names != NO_ROUND:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    argv = [sys.executable, str(HERE / "bodies.py"), heap, *names]
    with local.spawn_ranks(ranks, argv, end_others=False, env=IMPORTS) as job:
        outcomes = job.wait(300)
    return outcomes, [
        {
            f["body"]: f
            for line in outcome.log.splitlines()
            if line.startswith(MARK)
            for f in [json.loads(line.removeprefix(MARK))]
        }
        for outcome in outcomes
    ]


def succeeds(script, *argv):
    """Runs a script of this folder; fails with what it said last."""
    if reason := cuda.why_not():
        pytest.skip(f"no cuda heap: {reason}")
    done = subprocess.run(
        [sys.executable, str(HERE / script), *argv],
        env=os.environ | IMPORTS,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def found(heap, ranks, body, names=ALL):
    """The findings of one body, by rank; fails with what a rank said instead."""
    outcomes, findings_R = findings(heap, ranks, names)
    values = []
    for outcome, findings_of in zip(outcomes, findings_R, strict=True):
        one = findings_of.get(body, {"error": f"ended with {outcome.code}\n{outcome.log[-3000:]}"})
        if "error" in one:
            pytest.fail(f"rank {outcome.rank}: {one['error']}", pytrace=False)
        values.append(one["value"])
    return values


@both_heaps
@ranks_1_2_4
def test_a_slab_is_the_same_bytes_from_every_rank(heap, ranks):
    same_bytes(ranks, found(heap, ranks, "heap"))


def same_bytes(ranks, found_R):
    for rank, one in enumerate(found_R):
        assert one["zeros"]
        assert one["columns"] == [r + 1 for r in range(ranks)]
        assert one["read"] == [10 * ((rank - 1) % ranks) + i for i in range(8)]
        assert (one["length"], one["aligned"], one["generation"]) == ((1 << 20) + 200, True, 3)


@both_heaps
@ranks_1_2_4
def test_a_heap_that_does_not_fit_is_refused_by_name_on_all_ranks(heap, ranks):
    for said in found(heap, ranks, "too_large"):
        assert said.startswith("EpmoeError")
        assert "4194304.0 MiB" in said


def test_eight_processes_open_slabs_and_layers_on_the_gpus_there_are():
    same_bytes(8, found("cuda", 8, "heap", NO_ROUND))
    for said in found("cuda", 8, "too_large", NO_ROUND):
        assert "4194304.0 MiB" in said
    for rank, one in enumerate(found("cuda", 8, "opened", NO_ROUND)):
        assert one == [8, rank, 2]


@both_heaps
@ranks_1_2_4
@pytest.mark.parametrize("shape", ["swiglu", "gpt_oss", "fc2", "relu2", "shared"])
def test_answers_are_the_oracles_and_the_same_bits_again(heap, ranks, shape):
    for one in found(heap, ranks, "answers"):
        worst, differ = one[shape]
        assert worst < CLOSE
        assert differ == 0


@both_heaps
@ranks_1_2_4
def test_more_rows_than_fit_go_in_chunks_and_are_all_counted(heap, ranks):
    for one in found(heap, ranks, "chunks"):
        assert one["chunks"] == 3
        assert one["error"] < CLOSE
        assert one["loads"] == one["rows"]


@both_heaps
@ranks_1_2_4
def test_a_graph_replays_an_odd_number_of_times_with_new_inputs(heap, ranks):
    assert max(found(heap, ranks, "graphs")) < CLOSE


@both_heaps
@pytest.mark.night
@ranks_1_2_4
def test_torch_compile_keeps_a_forward_and_replays_it_in_its_graphs(heap, ranks):
    assert found(heap, ranks, "compiled", ("compiled",)) == [6] * ranks


@both_heaps
@ranks_1_2_4
def test_two_layers_take_turns_on_one_heap(heap, ranks):
    assert max(found(heap, ranks, "two_layers")) < CLOSE


@both_heaps
@ranks_1_2_4
def test_a_refused_batch_costs_the_others_nothing(heap, ranks):
    said, *errors = found(heap, ranks, "refused")
    assert "rank 0" in said
    assert "x" in said
    assert max(errors, default=0.0) < CLOSE


@both_heaps
@ranks_1_2_4
def test_the_callers_defaults_and_current_device_change_no_bit(heap, ranks):
    for one in found(heap, ranks, "modes"):
        assert one == {"device": True, "dtype": True, "elsewhere": True}


@both_heaps
@ranks_1_2_4
def test_dispatch_and_combine_alone_move_every_row_between_forwards(heap, ranks):
    for one in found(heap, ranks, "apart"):
        assert one == [[12, 0], [12, 0]]


@both_heaps
@ranks_1_2_4
def test_an_id_that_names_no_expert_is_told_by_check(heap, ranks):
    for rank, (worst, said) in enumerate(found(heap, ranks, "bad_ids")):
        assert worst < CLOSE
        assert ("1 choices so far were outside -1..15" in said) == (rank == 0)


@both_heaps
@ranks_1_2_4
def test_delays_and_a_busy_gpu_change_no_bit(heap, ranks):
    assert found(heap, ranks, "delays") == [0] * ranks


@both_heaps
@ranks_1_2_4
def test_a_stranger_who_holds_sms_makes_rounds_wait_and_no_longer_than_the_limit(heap, ranks):
    for one in found(heap, ranks, "hogged"):
        how, nan, spent = one.pop("for long")
        assert (how, nan) == ("stopped", True)
        assert spent < 0.15, "he ends after 0.2 s, the limit is 0.05"
        assert one.pop("often")[0] == 300
        assert len(one) == 4, "one SM, half, all but one, all"
        for held, (exact, spent) in one.items():
            assert exact == 3, held
            assert spent < 0.5, f"he holds {held} SMs for 0.06 s"


@both_heaps
@pytest.mark.night
@pytest.mark.timeout(900)
@ranks_1_2_4
def test_ten_thousand_rounds_change_no_bit(heap, ranks):
    assert found(heap, ranks, "night_delays", ("night_delays",)) == [0] * ranks


@both_heaps
@ranks_1_2_4
def test_lanes_overlap_on_one_rank_and_are_refused_on_several(heap, ranks):
    """A round fills a GPU: lanes that two ranks begin in different order wait for each other."""
    for one in found(heap, ranks, "lanes", ("lanes",)):
        assert one == 200 if ranks == 1 else "lanes must be 1" in one


def test_ranks_and_heaps_change_no_bit():
    seen = {}
    for heap, why_not in (("cuda", cuda.why_not), ("nvshmem", nvshmem.why_not)):
        for ranks in (1, 2, 4):
            if not why_not() and ranks <= torch.cuda.device_count():
                seen[heap, ranks] = found(heap, ranks, "bits")[0]
    if len(seen) < 2:
        pytest.skip("one heap on one GPU: nothing to compare")
    assert len(set(seen.values())) == 1, seen


def test_rounds_of_eight_ranks_that_share_the_gpus_change_no_bit():
    """And name a rank that never comes; more ranks than GPUs, in one process."""
    succeeds("neighbours.py", "--ranks", "8")


def test_layers_of_any_shape_are_what_one_rank_and_fp32_say():
    succeeds("any_shape.py", "--layers", "12")


@both_heaps
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", ["killed", "killed_apart"])
def test_a_killed_rank_leaves_nan_and_a_named_error_and_living_contexts(heap, ranks, way):
    outcomes, findings_R = findings(heap, ranks, (way,))
    assert outcomes[-1].code == -9
    for outcome, one in list(zip(outcomes, findings_R, strict=True))[:-1]:
        assert "value" in one.get(way, {}), outcome.log[-3000:]
        value = one[way]["value"]
        assert value["how"] == f"exited ({ranks - 1},)"
        assert value["spent"] < 1.0
        assert value["nan"]
        assert value["alive"] == 8.0


@both_heaps
@pytest.mark.night
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_killed_at_any_moment_is_named_within_a_second(heap, ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    argv = ["--ranks", str(ranks), "--heap", heap, "--schedules", "24", "--within", "300"]
    succeeds("kills.py", *argv, "--json", str(tmp_path / "found.json"))
    said = json.loads((tmp_path / "found.json").read_text())
    assert (said["schedules"], said["wrong"]) == (24, 0)
    assert said["ms"]["max"] < 1000
