"""Experts that move between GPUs: what every rank does; findings go to stdout as JSON.

PYTHONPATH=. torchrun --nproc-per-node 2 tests/gpu/migration.py exact damaged killed   # or:
PYTHONPATH=. python tests/gpu/migration.py --ranks 2 exact speed > result
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from bodies import MARK, SMALL, batches, drawn, error, met, oracle

from epmoe import EpmoeError, Group, MoE, MoEConfig, PeerLost, Placement, local
from epmoe.kernels import moving
from epmoe.kernels.choose import Chooser
from epmoe.kernels.gemm import interleave
from epmoe.migration import Migration
from epmoe.sched.placement import choose_slots

CONFIG = replace(SMALL, slots=24, heap="cuda", freight=1 << 20)
MIB = 1 << 20


def shuffled(rng, config, size):
    slots = [*range(config.experts)]
    slots += [rng.randrange(config.experts) for _ in range(config.places - config.experts)]
    rng.shuffle(slots)
    return Placement.of(slots, experts=config.experts, ranks=size)


def opened(config, group, weights):
    moe = MoE.open(config, group)
    held = list(moe.placement.experts_on(group.rank))
    moe.load(**{n: w[held].cuda() for n, w in weights.items()})
    return moe


def right(moe, rank, weights):
    """What my slots hold is what the placement says, byte for byte."""
    held = list(moe.placement.experts_on(rank))
    both = interleave(weights["w1"][held], weights["w3"][held])
    found = {n: t.cpu() for n, t in moe._weights.items()}
    return torch.equal(found["w13"], both) and torch.equal(found["w2"], weights["w2"][held])


def choice(group):
    """The slots that the kernel chooses are the host's, for any number of rows."""
    wrong, rng = 0, random.Random(group.rank)
    for experts, slots in ((16, 16), (16, 24), (256, 288), (1000, 1024)):
        config = replace(CONFIG, experts=experts, slots=slots)
        chooser = Chooser(config, Placement.linear(experts, slots, 8), 3)
        for rows in (0, 1, 63, 64, 129, 2000):
            placement = shuffled(rng, config, 8)
            chooser.place(placement)
            ids = torch.randint(-1, experts, (rows, 8))
            for dtype in (torch.int32, torch.int64):
                found = chooser.slots(ids.to(dtype).cuda()).cpu()
                wrong += not torch.equal(found, choose_slots(ids, placement, rank=3).int())
    bad = chooser.slots(torch.tensor([[5, -7, 1000]]).cuda()).tolist()[0]
    return {"wrong": wrong, "bad": bad[1:]}


def exact(group):
    """Rounds before, during and after: the same bits as before, and near the oracle."""
    weights, rank = drawn(CONFIG), group.rank
    rng, seeds = random.Random(3), range(8)
    sent = [batches(CONFIG, [(7 * s + 13 * r) % 65 for r in range(group.size)], s) for s in seeds]
    worst = differ = wrong = moved = counted = 0
    with opened(CONFIG, group, weights) as moe:
        mine = [tuple(t.cuda() for t in b[rank]) for b in sent]
        first = [moe(*b) for b in mine]
        moe.check()
        for b, y in zip(sent, first, strict=True):
            worst = max(worst, error(y, oracle(CONFIG, weights, b)[rank]))
        places = {n: t.data_ptr() for n, t in moe._weights.items()}
        graph, rounds = torch.cuda.CUDAGraph(), len(seeds)
        with torch.cuda.graph(graph):
            replayed = moe(*mine[3])
        for turn in range(12):
            budget = [None, 512 * 1024, 65536, 16384][turn % 4]
            moe.place(shuffled(rng, CONFIG, group.size), budget=budget, verify=turn % 3 == 0)
            while True:
                seed = rng.choice(seeds)
                differ += not torch.equal(moe(*mine[seed]), first[seed])
                rounds += 1
                if not moe.moving:
                    break
            moved += 1
            wrong += not right(moe, rank, weights)
            graph.replay()
            differ += not torch.equal(replayed, first[3])
        moe.check()
        counted = float(moe.loads().sum())
        stayed = places == {n: t.data_ptr() for n, t in moe._weights.items()}
        met(group)
    return {
        "worst": worst,
        "differ": differ,
        "wrong": wrong,
        "moved": moved,
        "rounds": rounds,
        "epoch": moe.epoch,
        "stayed": stayed,
        "counted": counted,
    }


def several(group):
    """Two layers that move at the same time share one freight region; each keeps its bits."""
    weights, rank, rng = drawn(CONFIG), group.rank, random.Random(8)
    mine = tuple(t.cuda() for t in batches(CONFIG, [40] * group.size, 2)[rank])
    differ = wrong = 0
    layers = MoE.open_all([CONFIG, replace(CONFIG, freight=1 << 16, name="other")], group)
    with layers[0]:
        for moe in layers:
            held = list(moe.placement.experts_on(rank))
            moe.load(**{n: w[held].cuda() for n, w in weights.items()})
        first = layers[0](*mine)
        for turn in range(6):
            for moe in layers:
                moe.place(shuffled(rng, CONFIG, group.size), budget=16384, verify=turn == 2)
            while any(moe.moving for moe in layers):
                for moe in rng.choices(layers, k=3):
                    differ += not torch.equal(moe(*mine), first)
            wrong += sum(not right(moe, rank, weights) for moe in layers)
        for moe in layers:
            moe.check()
        met(group)
    return {"differ": differ, "wrong": wrong, "epochs": [moe.epoch for moe in layers]}


def damaged(group):
    """One byte goes wrong on the wire to rank 1: nobody switches, everybody raises."""
    weights, rank = drawn(CONFIG), group.rank
    fetch = moving.CudaCarrier.fetch

    def bent(self, source, place, into):
        fetch(self, source, place, into)
        if rank == 1:
            into[5] ^= 1

    moving.CudaCarrier.fetch = bent
    with opened(CONFIG, group, weights) as moe:
        before = moe.placement
        try:
            moe.place(shuffled(random.Random(1), CONFIG, group.size), verify=True)
            torch.cuda.synchronize()
            moe.check()
            said = "nothing"
        except EpmoeError as found:
            said = f"{type(found).__name__}: {found}"
        old = moe.placement == before and right(moe, rank, weights)
        met(group)
    moving.CudaCarrier.fetch = fetch
    return {"said": said[:300], "old": old}


def killed(group):
    """The last rank is killed in the middle; the others keep what their placement says."""
    weights, rank = drawn(CONFIG), group.rank
    moe = opened(CONFIG, group, weights)
    mine = tuple(t.cuda() for t in batches(CONFIG, [32] * group.size, 1)[rank])
    rng, said = random.Random(5), "nothing"
    try:
        for step in range(400):
            if not moe.moving:
                moe.place(shuffled(rng, CONFIG, group.size), budget=16384)
            if rank == group.size - 1 and step == 150:
                os.kill(os.getpid(), signal.SIGKILL)
            moe(*mine)
        moe.check()
    except PeerLost as lost:
        said = f"{lost.how} {lost.ranks}"
    torch.cuda.synchronize()
    return {"said": said, "right": right(moe, rank, weights), "moving": moe.moving}


def big(experts, freight, **other):
    """DeepSeek-V3's experts: 3 x 7168 x 2048 bf16 are 88 MB."""
    return MoEConfig(
        experts=experts,
        choices=8,
        hidden=7168,
        inner=2048,
        max_rows=64,
        heap="cuda",
        freight=freight,
        **other,
    )


def filled(moe):
    """Random weights made where they lie."""
    config, slots = moe.config, moe.config.places // moe.placement.ranks
    shapes = {"w1": (2048, 7168), "w3": (2048, 7168), "w2": (7168, 2048)}
    tensors = {
        n: torch.empty(slots, *s, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        for n, s in shapes.items()
    }
    moe.load(**tensors)
    return config


def swapped(placement, count):
    """The first ``count`` experts of each rank go to the next one."""
    held, each = list(placement.expert_of_S), placement.slots_per_rank
    new = list(held)
    for slot in range(placement.slots):
        if slot % each < count:
            new[(slot + each) % placement.slots] = held[slot]
    return Placement.of(new, experts=placement.experts, ranks=placement.ranks)


def marked(moe):
    """A few values of every slot, to see that the right ones arrived."""
    return moe._weights["w13"].flatten(1)[:, 12345::1000003].clone()


def speed(group):
    """Eight experts of each rank to the next one, nothing else running."""
    found = {}
    for freight in (64, 128, 256, 384):
        with MoE.open(big(16 * group.size, freight * MIB), group) as moe:
            filled(moe)
            each, bytes_in = 16, 8 * 3 * 7168 * 2048 * 2
            before, lines = marked(moe), []
            timed = {}
            move_all = moe._placing.move_all

            def timing(move_all=move_all, timed=timed):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                started = time.perf_counter()
                move_all()
                end.record()
                end.synchronize()
                timed["host"] = time.perf_counter() - started
                timed["gpu"] = begin.elapsed_time(end) / 1e3

            moe._placing.move_all = timing
            for _ in range(2 * 4):
                wanted = swapped(moe.placement, 8)
                met(group)
                torch.cuda.synchronize()
                started = time.perf_counter()
                moe.place(wanted)
                torch.cuda.synchronize()
                lines.append([timed["gpu"], timed["host"], time.perf_counter() - started])
            moe.check()
            # Eight times round a ring of ranks: back where they were if 8 % size == 0.
            same = 8 % group.size != 0 or torch.equal(marked(moe), before)
            gpu, host, whole = (
                statistics.median(column[1:]) for column in zip(*lines, strict=True)
            )
            found[f"freight {freight} MiB"] = {
                "same": same,
                "slots": each,
                "GB/s": bytes_in / gpu / 1e9,
                "GB/s on the host's clock": bytes_in / host / 1e9,
                "GB/s of the whole call": bytes_in / whole / 1e9,
                "ms": [[round(1e3 * t, 3) for t in line] for line in lines],
            }
            met(group)
    return found


def parts(group):
    """Microseconds from the call of place() to moments inside it, on the host's clock: medians."""
    with MoE.open(big(16 * group.size, 256 * MIB), group) as moe, ExitStack() as patches:
        filled(moe)
        marks = {}
        for owner, name in (
            (Migration, "__init__"),
            (Migration, "load"),
            (moving.CudaCarrier, "shadows"),
            (type(group), "allgather"),
            (type(moe._rounds[0]), "run"),
            (Migration, "switch"),
            (type(moe._rounds[0]), "settled"),
            (type(moe._rounds[0]), "place"),
        ):
            patches.enter_context(patch.object(owner, name, noted(owner, name, marks)))
        found = {}
        for turn in range(9):
            wanted = swapped(moe.placement, 8)
            met(group)
            torch.cuda.synchronize()
            marks.clear()
            started = time.perf_counter()
            moe.place(wanted)
            marks["returned"] = time.perf_counter()
            torch.cuda.synchronize()
            marks["over"] = time.perf_counter()
            for moment, at in marks.items() if turn else ():
                found.setdefault(moment, []).append(1e6 * (at - started))
        moe.check()
        met(group)
    return {moment: round(statistics.median(times)) for moment, times in found.items()}


def noted(owner, name, marks):
    """The method, noting when it first begins, and when it first and last ends."""
    call = getattr(owner, name)

    def method(*args, **kwargs):
        marks.setdefault(f"{name} begins", time.perf_counter())
        result = call(*args, **kwargs)
        marks.setdefault(f"{name} ends", time.perf_counter())
        marks[f"last {name} ends"] = time.perf_counter()
        return result

    return method


def copy(group):
    """What the copy engine does by itself: 64 MiB from the next rank, over and over."""
    with MoE.open(big(8 * group.size, 256 * MIB), group) as moe:
        carrier = moe._carrier()
        (into,), found = carrier.shadows(1, 64 * MIB), {}
        for size in (1, 4, 16, 64):
            for source in (group.rank, (group.rank + 1) % group.size):
                met(group)
                times = []
                for _ in range(10):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    with carrier.fetching():
                        begin.record()
                        for _ in range(8):
                            carrier.fetch(source, 0, into[: size * MIB])
                        end.record()
                    end.synchronize()
                    times.append(begin.elapsed_time(end) / 1e3)
                name = "mine" if source == group.rank else "peer"
                found[f"{size} MiB {name}"] = 8 * size * MIB / statistics.median(times) / 1e9
        met(group)
    return found


def beside(group):
    """Decode rounds alone and with experts on the way, in turns: median GPU time of a round."""
    found = {}
    with MoE.open(big(32 * group.size, 32 * MIB), group) as moe:
        filled(moe)
        mine = tuple(t.cuda() for t in batches(moe.config, [64] * group.size, 1)[group.rank])
        for _ in range(20):
            moe(*mine)
        for budget in (1, 2, 4, 8, 16):
            alone, moving = [], []
            for _ in range(3):
                alone += rounds_ms(group, moe, mine, 60, None)
                moving += rounds_ms(group, moe, mine, 60, budget * MIB)
            found[f"{budget} MiB"] = {
                "alone ms": statistics.median(alone),
                "moving ms": statistics.median(moving),
                "slowdown": statistics.median(moving) / statistics.median(alone) - 1,
                "worst alone ms": max(alone),
                "worst moving ms": max(moving),
                "rounds": len(moving),
            }
        moe.check()
        met(group)
    return found


def rounds_ms(group, moe, mine, most, budget):
    """GPU time of each round from the end of the one before; with a budget, all of them move."""
    met(group)
    if budget is not None:
        moe.place(swapped(moe.placement, 8), budget=budget)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(most + 1)]
    moe(*mine)
    marks[0].record()
    count = 0
    for mark in marks[1:]:
        if budget is not None and moe._placing.migration._empty == 0:
            break
        moe(*mine)
        mark.record()
        count += 1
    while moe.moving:  # to the end, outside of the clock
        moe(*mine)
    torch.cuda.synchronize()
    return [marks[i].elapsed_time(marks[i + 1]) for i in range(count)]


BODIES = (choice, exact, several, damaged, killed, copy, parts, speed, beside)


def main(names):
    with Group.from_env() as group:
        torch.cuda.set_device(group.local_rank)
        torch.set_num_threads(4)
        for body in BODIES:
            if body.__name__ not in names:
                continue
            started = time.monotonic()
            try:
                found = {"value": body(group)}
            except Exception:  # noqa: BLE001
                found = {"error": traceback.format_exc()}
            found |= {"body": body.__name__, "seconds": round(time.monotonic() - started, 1)}
            sys.stdout.write(MARK + json.dumps(found) + "\n")
            sys.stdout.flush()
            if "error" in found:
                return


if __name__ == "__main__":
    if sys.argv[1] == "--ranks":
        argv = [sys.executable, __file__, *sys.argv[3:]]
        with local.spawn_ranks(int(sys.argv[2]), argv, end_others=False) as job:
            for outcome in job.wait(200):
                sys.stdout.write(f"rank {outcome.rank} ended with {outcome.code}\n{outcome.log}\n")
    else:
        main(sys.argv[1:])
