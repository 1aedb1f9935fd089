"""Experts change places while rounds go on: every answer exact, nothing mixed, nothing left."""

import mmap
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from ranks import ranks
from sim.cases import draw_step, expected, weights_of

from epmoe import (
    ConfigMismatch,
    EpmoeError,
    Group,
    MoE,
    MoEConfig,
    PeerLost,
    Placement,
    local,
)
from epmoe.kernels import moving

EXACT = MoEConfig(
    experts=8,
    slots=12,
    choices=2,
    hidden=64,
    inner=32,
    max_rows=16,
    dtype="fp32",
    activation="relu2",  # small integers stay integers: a replica's batch may be cut in any way
    bias=True,
    freight=8192,
    stall_s=5.0,
    open_s=20.0,
)


def integer_weights(config, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {n: t.float().round().clamp(-1, 1) for n, t in weights_of(config, g).items()}


def integer_step(rng, g, config, size):
    step = draw_step(rng, g, [config], size)
    step.x_R = [x.nan_to_num(0.0, 1.0, -1.0).round().clamp(-1, 1) for x in step.x_R]
    step.weights_R = [(w * 4).nan_to_num(0.0, 4.0, -4.0).round() for w in step.weights_R]
    return step


def held(weights, placement, rank):
    """Copies of what this rank's slots hold: a migration writes into them."""
    return {n: w[list(placement.experts_on(rank))].clone() for n, w in weights.items()}


def shuffled(rng, config, size):
    slots = [*range(config.experts)]
    slots += [rng.randrange(config.experts) for _ in range(config.places - config.experts)]
    rng.shuffle(slots)
    return Placement.of(slots, experts=config.experts, ranks=size)


def run(moe, weights, size, rounds, rng, g, between=lambda i: None):
    """Rounds of drawn traffic; how many differ from the oracle."""
    wrong = 0
    for i in range(rounds):
        between(i)
        step = integer_step(rng, g, moe.config, size)
        rank = moe._runtime.group.rank
        y = moe(step.x_R[rank], step.ids_R[rank], step.weights_R[rank], context=step.context)
        wrong += not torch.equal(y, expected(step, moe.config, weights)[rank])
    return wrong


@ranks(1, 2, 4)
def test_answers_are_exact_before_during_and_after(rank, group):
    rng, g = random.Random(3), torch.Generator().manual_seed(3)
    weights = integer_weights(EXACT)
    with MoE.open(EXACT, group) as moe:
        moe.load(**held(weights, moe.placement, rank))
        addresses = {n: t.data_ptr() for n, t in moe._weights.items()}
        wanted = []

        def between(i):
            for name, slots in held(weights, moe.placement, rank).items():
                assert torch.equal(moe._weights[name], slots), (i, name)  # also between two steps
            if i % 60 == 5 and not moe.moving:
                wanted.append(shuffled(rng, EXACT, group.size))
                moe.place(wanted[-1], budget=[None, 4096, 512][i // 60 % 3], verify=i % 2 == 0)

        assert run(moe, weights, group.size, 240, rng, g, between) == 0
        assert moe.epoch >= 3
        assert moe.placement in wanted
        for name, slots in held(weights, moe.placement, rank).items():
            assert torch.equal(moe._weights[name], slots), name
        assert {n: t.data_ptr() for n, t in moe._weights.items()} == addresses


@ranks(1, 3)
def test_layers_of_one_heap_move_at_the_same_time(rank, group):
    config = replace(EXACT, slots=9)
    rng, g = random.Random(4), torch.Generator().manual_seed(4)
    weights = [integer_weights(config, seed) for seed in (1, 2)]
    layers = MoE.open_all([config, replace(config, freight=1000, name="other")], group)
    with layers[0]:
        for moe, own in zip(layers, weights, strict=True):
            moe.load(**held(own, moe.placement, rank))
        for turn in range(4):
            for moe in layers:
                moe.place(shuffled(rng, config, group.size), budget=400, verify=turn == 1)
            while any(moe.moving for moe in layers):
                n = rng.randrange(2)
                assert run(layers[n], weights[n], group.size, 1, rng, g) == 0
            for moe, own in zip(layers, weights, strict=True):
                for name, slots in held(own, moe.placement, rank).items():
                    assert torch.equal(moe._weights[name], slots), name


@ranks(2)
def test_tensors_that_were_loaded_between_two_moves_are_those_that_move(rank, group):
    rng = random.Random(6)
    with MoE.open(EXACT, group) as moe:
        for seed in (1, 2):
            weights = integer_weights(EXACT, seed)
            moe.load(**held(weights, moe.placement, rank))
            moe.place(shuffled(rng, EXACT, group.size))
            for name, slots in held(weights, moe.placement, rank).items():
                assert torch.equal(moe._weights[name], slots), name


@ranks(4)
def test_all_ranks_count_the_same_loads(rank, group):
    config = EXACT
    weights = integer_weights(config)
    with MoE.open(config, group) as moe:
        moe.load(**held(weights, moe.placement, rank))
        chosen = torch.zeros(config.experts, dtype=torch.float64)
        for i in range(20):
            g = torch.Generator().manual_seed(i)
            ids_R = [torch.randint(-1, config.experts, (7 + r, 2), generator=g) for r in range(4)]
            moe(torch.zeros(7 + rank, 64), ids_R[rank], torch.ones(7 + rank, 2))
            for ids in ids_R:
                chosen += torch.bincount(ids[ids >= 0], minlength=config.experts)
        assert torch.equal(moe.loads(), chosen)


@ranks(2)
def test_a_damaged_slot_is_noticed_and_the_old_placement_stays(rank, group):
    weights = integer_weights(EXACT)
    with MoE.open(EXACT, group) as moe:
        moe.load(**held(weights, moe.placement, rank))
        before, slots = moe.placement, {n: t.clone() for n, t in moe._weights.items()}
        if rank == 1:
            fetch = moving.HostCarrier.fetch

            def damaged(self, rank, place, into):
                fetch(self, rank, place, into)
                into[-1] ^= 1

            moving.HostCarrier.fetch = damaged
        try:
            with pytest.raises(EpmoeError, match="arrived damaged|raised"):
                moe.place(shuffled(random.Random(1), EXACT, 2), verify=True)
        finally:
            if rank == 1:
                moving.HostCarrier.fetch = fetch
        assert moe.placement == before
        assert all(torch.equal(moe._weights[n], t) for n, t in slots.items())


@ranks(2)
def test_what_cannot_be_placed_is_refused_on_all_ranks(rank, group):
    small = Placement.linear(8, 8, 2)
    with MoE.open(EXACT, group) as moe:
        moe.load(**held(integer_weights(EXACT), moe.placement, rank))
        with pytest.raises(ValueError, match="placement must have 12 slots, got 8"):
            moe.place(small)
        with pytest.raises(
            ValueError, match=r"budget must be in 16\.\.4096 \(half of freight\), got 5000"
        ):
            moe.place(moe.placement, budget=5000)
        with pytest.raises((TypeError, EpmoeError), match="must be a Placement"):
            moe.place(moe.placement if rank else "elsewhere")
        other = shuffled(random.Random(rank), EXACT, 2)
        with pytest.raises(ConfigMismatch, match="placement differs"):
            moe.place(other)
        assert not moe.moving


@ranks(2)
def test_while_experts_move_no_others_are_loaded(rank, group):
    with MoE.open(EXACT, group) as moe:
        weights = held(integer_weights(EXACT), moe.placement, rank)
        moe.load(**weights)
        moe.place(shuffled(random.Random(3), EXACT, 2), budget=1 << 10)
        with pytest.raises(EpmoeError, match="is moving experts: load again when `moving` is"):
            moe.load(**weights)
        assert moe.moving
        group.allgather(b"", what="done", limit_s=20)


@ranks(2)
def test_a_placement_asked_for_in_inference_mode_comes_outside_of_it(rank, group):
    with MoE.open(EXACT, group) as moe:
        moe.load(**held(integer_weights(EXACT), moe.placement, rank))
        wanted = shuffled(random.Random(3), EXACT, 2)
        with torch.inference_mode():
            moe.place(wanted, budget=1 << 12)
        nothing = torch.zeros(0, EXACT.hidden), torch.zeros(0, EXACT.choices, dtype=torch.int64)
        while moe.moving:
            moe(*nothing, torch.zeros(0, EXACT.choices))
        assert moe.placement == wanted
        for name, slots in held(integer_weights(EXACT), wanted, rank).items():
            assert torch.equal(moe._weights[name], slots), name
        group.allgather(b"", what="done", limit_s=20)


def killed_while_moving(seed):
    """One schedule: a rank is killed, or fails, at a random moment of a migration."""
    rng = random.Random(seed)
    size, fails = 3, rng.random() < 0.5
    victim, delay = rng.randrange(size), rng.random() * 0.03
    config = MoEConfig(**{f: getattr(EXACT, f) for f in EXACT.__slots__} | {"slots": 9})
    weights = integer_weights(config)
    loaded = mmap.mmap(-1, size)  # shared with the forks: who may be killed from now on

    def body(rank):
        draws, g = random.Random(seed), torch.Generator().manual_seed(seed)
        with Group.from_env() as group, MoE.open(config, group) as moe:
            moe.load(**held(weights, moe.placement, rank))
            wrong, returned = 0, 0
            loaded[rank] = 1
            if fails and rank == victim:
                strike(moe, int(delay * 1000))
            try:
                for i in range(400):
                    if i % 10 == 5 and not moe.moving:
                        moe.place(shuffled(draws, config, size), budget=2048)
                    wrong += run(moe, weights, size, 1, draws, g)
                    returned += 1
            except (PeerLost, Struck) as error:
                mixed = any(
                    not torch.equal(moe._weights[n], t)
                    for n, t in held(weights, moe.placement, rank).items()
                )
                lost = list(getattr(error, "ranks", (rank,)))
                return [wrong, mixed, lost, returned]
            return [wrong, False, None, returned]

    with local.fork_ranks(size, body, end_others=False) as job:
        if not fails:
            until = time.monotonic() + 20
            while loaded[:] != b"\1" * size and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(job.pids[victim], signal.SIGKILL)
        outcomes = job.wait(30)
    for outcome in outcomes:
        if outcome.rank == victim and not fails:
            continue
        assert outcome.ok, (seed, outcome.rank, outcome.error, outcome.log)
        wrong, mixed, lost, _ = outcome.result
        assert wrong == 0, (seed, outcome)
        assert not mixed, (seed, outcome)
        assert lost in ([victim], None), (seed, outcome)
        assert lost or not fails, (seed, outcome)


class Struck(Exception):
    """The planted fault."""


def strike(moe, at):
    """Let this rank fail in its ``at``-th parcel of freight."""
    left = [at]
    place = moe.place

    def placed(*args, **kwargs):
        place(*args, **kwargs)
        take = moe._placing.migration._take

        def struck(parcel):
            left[0] -= 1
            if left[0] < 0:
                raise Struck
            take(parcel)

        moe._placing.migration._take = struck

    moe.place = placed


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_dies_or_fails_leaves_no_mixed_placement(seed):
    killed_while_moving(seed)


@pytest.mark.night
@pytest.mark.parametrize("seed", range(20, 220))
def test_200_schedules_leave_no_mixed_placement(seed):
    killed_while_moving(seed)
