"""The layer over real processes: exact for every shape, every mistake named where it was made."""

from __future__ import annotations

import atexit
import os
import random
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from faults.harness import CONFIG, Traffic, belongings, left_since
from ranks import ranks
from sim.draw import draw_config, draw_step, slots_of, weights_of
from sim.oracle import expected, same

from epmoe import runtime as runtime_module
from epmoe.comm.group import Group
from epmoe.context import ForwardContext
from epmoe.errors import ConfigMismatch, EpmoeError, PeerLost
from epmoe.moe import MoE

STEPS = 50  # rounds of one config, and more where a step is cut into chunks


@pytest.fixture
def drawn(world, part):
    """Configs, weights, steps and answers: made once, before the ranks are forked."""
    made = []
    for seed in range(part * 8, part * 8 + 8):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        config = draw_config(rng, world, rng.choice([5, 40]))
        weights = weights_of(config, g, world)
        steps = [draw_step(rng, g, [config], world) for _ in range(STEPS)]
        wanted = [expected(step, config, weights) for step in steps]
        made.append((config, weights, steps, wanted))
    return made


@ranks(1, 2, 4)
@pytest.mark.parametrize("part", range(5))
def test_four_hundred_rounds_of_eight_configs_are_exact(rank, group, drawn, part):
    """Five parts on four ranks: 2,000 steps of random shapes, routing and empty ranks."""
    wrong = 0
    for config, weights, steps, wanted in drawn:
        with MoE.open(config, group) as moe:
            moe.load(**slots_of(weights, rank, config.slots_per_rank(group.size)))
            for step, want in zip(steps, wanted, strict=True):
                out = moe(
                    step.x_R[rank], step.ids_R[rank], step.weights_R[rank], context=step.context
                )
                wrong += not same(out, want[rank])
            group.allgather(b"", what="all have their answers", limit_s=20)
    assert wrong == 0


@pytest.fixture(scope="module")
def traffic():
    return Traffic(2)


def batch(rows=3, hidden=64, choices=2, dtype=torch.float32):
    return {
        "x": torch.ones(rows, hidden, dtype=dtype),
        "ids": torch.zeros(rows, choices, dtype=torch.int64),
        "weights": torch.ones(rows, choices),
    }


def with_id(value):
    ids = torch.zeros(3, 2, dtype=torch.int64)
    ids[1, 1] = value
    return ids


T = torch.Tensor
MISTAKES = [
    # argument, what is given for it, the error, what its text must hold
    ("x", None, TypeError, "x must be a torch.Tensor, got NoneType"),
    ("x", [[1.0] * 64] * 3, TypeError, "x must be a torch.Tensor, got list"),
    ("x", torch.ones(3, 64, dtype=torch.float16), TypeError, "x must be torch.float32.*float16"),
    ("x", torch.ones(3, 64, device="meta"), ValueError, "x must be on cpu, got meta"),
    ("x", torch.ones(3, 1, 64), ValueError, "x must have 2 dimensions, got 3"),
    ("x", torch.ones(64), ValueError, "x must have 2 dimensions, got 1"),
    ("x", torch.ones(64, 3).T, ValueError, r"x must be contiguous, got strides \(1, 3\)"),
    ("x", torch.ones(6, 64)[::2], ValueError, r"x must be contiguous, got strides \(128, 1\)"),
    ("x", torch.ones(1, 64).expand(3, 64), ValueError, r"x must be contiguous.*\(0, 1\)"),
    ("x", torch.ones(3, 64, requires_grad=True), ValueError, "x requires grad"),
    ("x", torch.ones(3, 63), ValueError, r"x must have hidden \(64\) columns, got 63"),
    ("x", torch.ones(4, 64), ValueError, r"ids must have shape \(4, 2\).*got \(3, 2\)"),
    ("ids", None, TypeError, "ids must be a torch.Tensor"),
    ("ids", torch.zeros(3, 2), TypeError, "ids must be torch.int32 or torch.int64, got .*float32"),
    ("ids", torch.zeros(3, 2, dtype=torch.int16), TypeError, "ids must be .*got torch.int16"),
    ("ids", torch.zeros(3, 2, dtype=torch.int64, device="meta"), ValueError, "ids must be on cpu"),
    ("ids", torch.zeros(6, dtype=torch.int64), ValueError, "ids must have 2 dimensions, got 1"),
    ("ids", torch.zeros(2, 3, dtype=torch.int64).T, ValueError, "ids must be contiguous"),
    ("ids", torch.zeros(3, 3, dtype=torch.int64), ValueError, r"ids must have shape \(3, 2\)"),
    ("ids", torch.zeros(2, 2, dtype=torch.int64), ValueError, r"ids must have shape \(3, 2\)"),
    ("ids", with_id(12), ValueError, r"ids must be in -1..11, got 12"),
    ("ids", with_id(-2), ValueError, r"ids must be in -1..11, got -2"),
    ("ids", with_id(1 << 40), ValueError, r"ids must be in -1..11, got 1099511627776"),
    ("ids", with_id(-(1 << 31)), ValueError, r"ids must be in -1..11, got -2147483648"),
    ("weights", None, TypeError, "weights must be a torch.Tensor"),
    ("weights", torch.ones(3, 2).double(), TypeError, "weights must be torch.float32, got .*64"),
    ("weights", torch.ones(3, 2).bfloat16(), TypeError, "weights must be torch.float32, got .*bf"),
    ("weights", torch.ones(3, 2, device="meta"), ValueError, "weights must be on cpu, got meta"),
    ("weights", torch.ones(3, 2, 1), ValueError, "weights must have 2 dimensions, got 3"),
    ("weights", torch.ones(2, 3).T, ValueError, "weights must be contiguous"),
    ("weights", torch.ones(3, 1), ValueError, r"weights must have shape \(3, 2\).*got \(3, 1\)"),
    ("weights", torch.ones(3, 2, requires_grad=True), ValueError, "weights requires grad"),
    ("context", {"rows": (3, 3)}, TypeError, "context must be a ForwardContext, got dict"),
    ("context", ForwardContext(rows=(3,)), ValueError, "context.rows must name 2 ranks, got 1"),
    ("context", ForwardContext(rows=(3, 4)), ValueError, r"context.rows\[1\] is 4, but x has 3"),
    ("context", ForwardContext(epoch=9), ValueError, r"context.epoch must be 0 or .*got 9"),
    ("rows", batch(rows=17), ValueError, "x has 17 rows, max_rows is 16"),
]


@ranks(2)
@pytest.mark.parametrize(
    ("argument", "given", "error", "text"),
    MISTAKES,
    ids=[f"{argument}-{n}" for n, (argument, *_) in enumerate(MISTAKES)],
)
def test_a_mistake_is_named_on_its_rank_and_costs_nobody_else_anything(
    rank, group, traffic, argument, given, error, text
):
    step = traffic.steps[0]
    good = (step.x_R[0], step.ids_R[0], step.weights_R[0])
    empty = [t[:0] for t in (step.x_R[1], step.ids_R[1], step.weights_R[1])]
    alone = replace_rank(step, 1, empty)
    want = expected(alone, CONFIG, traffic.weights)[0]
    with traffic.open(group) as moe:
        if rank == 1:
            arguments = batch() | (given if argument == "rows" else {argument: given})
            with pytest.raises(error, match=f"(?s)rank 1: .*{text}"):
                moe(**arguments)
        else:
            assert same(moe(*good), want)
        assert traffic.run(moe, rank, 1)  # and the layer is as good as before
        group.allgather(b"", what="done", limit_s=20)


def replace_rank(step, rank, tensors):
    """The step without context and with another batch on one rank."""
    fields = {}
    for name, tensor in zip(("x_R", "ids_R", "weights_R"), tensors, strict=True):
        fields[name] = [*getattr(step, name)]
        fields[name][rank] = tensor
    return replace(step, context=None, **fields)


@ranks(2)
@pytest.mark.parametrize("lane", [-1, 1, 7])
def test_a_lane_that_does_not_exist(rank, group, traffic, lane):
    with traffic.open(group) as moe:
        with pytest.raises(ValueError, match=rf"lane must be in 0..0, got {lane}"):
            moe(**batch(), lane=lane)
        assert traffic.run(moe, rank, 0)
        group.allgather(b"", what="done", limit_s=20)


LOADS = [
    ("missing", lambda w: w.pop("w2"), ValueError, "load needs w2; wanted are w1, w3, w2"),
    ("extra", lambda w: w.update(w4=w["w1"]), ValueError, "load got w4; wanted are"),
    ("type", lambda w: w.update(w1=[1]), TypeError, "w1 must be a torch.Tensor, got list"),
    ("dtype", lambda w: w.update(w1=w["w1"].half()), TypeError, "w1 must be torch.float32, got"),
    ("slots", lambda w: w.update(w1=w["w1"][:5]), ValueError, r"w1 must have shape \(6, 32, 64\)"),
    ("device", lambda w: w.update(w3=w["w3"].to("meta")), ValueError, "w3 must be on cpu, got me"),
    ("order", lambda w: w.update(w2=w["w2"].mT), ValueError, "w2 must .*contiguous"),
    ("dims", lambda w: w.update(w2=w["w2"][0]), ValueError, "w2 must have 3 dimensions, got 2"),
]


@ranks(2)
@pytest.mark.parametrize(("kind", "spoil", "error", "text"), LOADS, ids=[k for k, *_ in LOADS])
def test_a_wrong_tensor_is_an_error_on_all_ranks(rank, group, traffic, kind, spoil, error, text):
    tensors = slots_of(traffic.weights, rank, 6)
    with traffic.open(group) as moe:
        if rank == 1:
            spoil(tensors)
            with pytest.raises(error, match=text):
                moe.load(**tensors)
        else:
            with pytest.raises(EpmoeError, match=f"rank 1 .*{text}"):
                moe.load(**tensors)
        assert traffic.run(moe, rank, 0)  # the old tensors are still there
        group.allgather(b"", what="done", limit_s=20)


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "default dtype": lambda: Setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: torch.device("meta"),
}


class Setting:
    """A global of torch as a context."""

    def __init__(self, setter, inside, outside):
        self.setter, self.inside, self.outside = setter, inside, outside

    def __enter__(self):
        self.setter(self.inside)

    def __exit__(self, *_):
        self.setter(self.outside)


@ranks(2)
@pytest.mark.parametrize("inside", ["open", "forward"])
@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_change_no_bit(rank, group, traffic, mode, inside):
    if inside == "open":
        with MODES[mode]():
            moe = traffic.open(group)
        right = [traffic.run(moe, rank, n) for n in range(12)]
    else:
        moe = traffic.open(group)
        with MODES[mode]():
            right = [traffic.run(moe, rank, n) for n in range(12)]
    assert all(right)
    group.allgather(b"", what="done", limit_s=20)
    moe.close()


@ranks(2)
def test_layers_of_one_heap_have_its_limits(rank, group):
    with pytest.raises(ValueError, match="stall_s must be equal for layers that share a heap"):
        MoE.open_all([CONFIG, replace(CONFIG, stall_s=0.5)], group)
    group.allgather(b"", what="both were refused", limit_s=20)


@ranks(2)
def test_a_rank_that_cannot_make_its_words_fails_open_for_all(rank, group, monkeypatch):
    if rank == 0:
        monkeypatch.setattr(runtime_module, "Words", None)
    with pytest.raises(TypeError if rank == 0 else EpmoeError) as caught:
        MoE.open(CONFIG, group)
    if rank:
        assert "rank 0" in str(caught.value)
        assert "failed in make the words" in str(caught.value)


@ranks(2, mpi=False)
def test_a_program_that_ends_without_close_tells_its_peers(rank, group, traffic):
    """It may live on for long: MPI's end waits for all ranks."""
    moe = traffic.open(group, stall_s=20.0)
    assert traffic.run(moe, rank, 0)
    if rank == 0:
        atexit._run_exitfuncs()
    else:
        with pytest.raises(PeerLost, match="the program ended without close"):
            traffic.run(moe, rank, 1)
    group.allgather(b"", what="done", limit_s=20)
    moe.close()


@ranks(2)
def test_a_wrong_lane_is_an_empty_batch_where_there_is_one(rank, group, traffic):
    moe = traffic.open(group)
    x, ids = torch.ones(3, CONFIG.hidden), torch.zeros(3, CONFIG.choices, dtype=torch.int64)
    batch, wanted = (x, ids, torch.ones(3, CONFIG.choices)), None
    for lane in (0, 1, None, 0.5):
        if rank == 0 and lane != 0:
            with pytest.raises(ValueError, match=f"rank 0: lane must be in 0..0, got {lane}"):
                moe(*batch, lane=lane)
        else:
            out = moe(*batch)
            wanted = out if wanted is None else wanted
            assert torch.equal(out, wanted)
        group.allgather(b"", what="next", limit_s=20)
    moe.close()


@ranks(2)
def test_forwards_may_alternate_between_inference_mode_and_none(rank, group, traffic):
    moe = traffic.open(group)
    for n in range(6):
        with torch.inference_mode(n % 2 == 0):
            assert traffic.run(moe, rank, n)
    group.allgather(b"", what="done", limit_s=20)
    moe.close()


@ranks(2)
def test_weights_that_require_grad_leave_no_graph_behind(rank, group):
    traffic = Traffic(2, config=replace(CONFIG, shared_inner=8))
    with MoE.open(traffic.config, group) as moe:
        tensors = slots_of(traffic.weights, rank, 6)
        with torch.no_grad():
            moe.load(**{name: torch.nn.Parameter(w) for name, w in tensors.items()})
        assert all(traffic.run(moe, rank, n) for n in range(12))
        step = traffic.steps[0]
        out = moe(step.x_R[rank], step.ids_R[rank], step.weights_R[rank], context=step.context)
        assert not out.requires_grad
        group.allgather(b"", what="done", limit_s=20)


@ranks(2)
def test_the_same_input_gives_the_same_bits_a_hundred_times(rank, group, traffic):
    with traffic.open(group) as moe:
        assert all(traffic.run(moe, rank, 3) for _ in range(100))
        group.allgather(b"", what="done", limit_s=20)


@ranks(2)
def test_a_forward_before_load_says_so(rank, group):
    with MoE.open(CONFIG, group) as moe, pytest.raises(EpmoeError, match="call load first|raised"):
        moe(**batch())


@ranks(2)
def test_ranks_in_different_layers_raise_mismatch_on_both(rank, group, traffic):
    pair = MoE.open_all([CONFIG, replace(CONFIG, name="second")], group)
    for moe in pair:
        moe.load(**slots_of(traffic.weights, rank, 6))
    with pytest.raises(ConfigMismatch, match=r"layer is \d on rank"):
        pair[rank](**batch())
    pair[0].close()


@ranks(2)
def test_two_lanes_run_at_once_and_a_busy_lane_says_so(rank, group, traffic):
    two = replace(CONFIG, lanes=2)
    wrong = []
    with MoE.open(two, group) as moe:
        moe.load(**slots_of(traffic.weights, rank, 6))

        def stream(lane):
            for number in range(60):
                step = traffic.steps[(number + lane) % 12]
                out = moe(
                    step.x_R[rank],
                    step.ids_R[rank],
                    step.weights_R[rank],
                    context=step.context,
                    lane=lane,
                )
                want = traffic.wanted[(number + lane) % 12][rank]
                if not same(out, want):
                    wrong.append((lane, number))

        threads = [threading.Thread(target=stream, args=(lane,)) for lane in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        moe._runtime.lanes[1].busy.acquire()
        with pytest.raises(EpmoeError, match="lane 1 is in round .* already"):
            moe(**batch(), lane=1)
        group.allgather(b"", what="done", limit_s=20)
    assert wrong == []


@ranks(2)
def test_closed_means_closed(rank, group, traffic):
    moe = traffic.open(group)
    group.allgather(b"", what="both are here", limit_s=20)
    moe.close()
    moe.close()
    for use in (moe.check, lambda: moe(**batch()), lambda: moe.load(w1=torch.ones(1))):
        with pytest.raises(EpmoeError, match=f"rank {rank}: this MoE is closed"):
            use()


@ranks(2)
def test_a_close_in_another_thread_ends_a_wait(rank, group, traffic):
    moe = traffic.open(group)
    if rank == 1:
        threading.Timer(0.05, moe.close).start()
        with pytest.raises(EpmoeError, match="closed by another thread in round 1 of lane 0"):
            moe(**batch())
        group.allgather(b"", what="closed", limit_s=20)
    else:
        group.allgather(b"", what="closed", limit_s=20)
        with pytest.raises(PeerLost, match="rank 1 .*closed"):
            moe(**batch())
        moe.close()


@ranks(2, mpi=False)
def test_a_forked_child_cannot_take_part_and_harms_nobody(rank, group, traffic):
    with traffic.open(group) as moe:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with moe:
                    moe(**batch())
            except EpmoeError as error:
                code = 0 if "was opened by pid" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert all(traffic.run(moe, rank, n) for n in range(12))
        group.allgather(b"", what="done", limit_s=20)


@ranks(3)
def test_a_rank_that_is_done_may_leave_while_others_finish(rank, group):
    three = Traffic(3)
    with three.open(group) as moe:
        right = [three.run(moe, rank, n) for n in range(20)]
    assert all(right)  # nobody waited for anybody before closing


@ranks(2)
def test_an_error_that_is_kept_keeps_no_slab_mapped(rank, group, traffic, monkeypatch):
    before = belongings()
    moe = traffic.open(group)
    monkeypatch.setattr("epmoe.kernels.host.request", lambda *_: 1 // 0)  # a view is in hand there
    with pytest.raises(ZeroDivisionError) as kept:
        moe(**batch())
    monkeypatch.undo()
    moe.close()
    assert left_since(before) == {}
    assert "stage" in [entry.name for entry in kept.traceback]


def test_a_forward_on_a_gpu_is_a_named_range_that_always_ends(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("end"))

    def run(self, *given):
        said.append("run")
        raise EpmoeError(f"no GPU for {given[-1]}")

    with Group.alone() as group, MoE.open(replace(CONFIG, name="layer 7"), group) as moe:
        monkeypatch.setattr(MoE, "_run", run)
        monkeypatch.setattr(MoE, "_current", lambda self: nullcontext())
        moe._device = torch.device("cuda")
        with pytest.raises(EpmoeError, match="no GPU for 3"):
            moe(**batch(), lane=3)
    assert said == ["epmoe layer 7", "run", "end"]
