"""The split verbs on N GPUs against the oracle on the CPU, and their times.  One rank a GPU:

launch/torchrun.sh 2 python tests/gpu/split_round.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import torch

from epmoe import Group, MoEConfig, local, reference_moe
from epmoe.comm.cuda import CudaHeap
from epmoe.comm.device_words import DeviceWords
from epmoe.comm.layout import layout
from epmoe.errors import PeerLost
from epmoe.kernels.cuda import CudaOps
from epmoe.kernels.ops import HEAD_FIELDS


class Report:
    def __init__(self, rank):
        self.rank = rank

    def append(self, line):
        sys.stdout.write(f"[{self.rank}] {line}\n")
        sys.stdout.flush()


def opened(config, group):
    placed = layout([config], group.size)
    heap = CudaHeap(group, placed.total, generation=1, limit_s=60)
    words = DeviceWords(
        heap,
        placed,
        0,
        watch=group.watch,
        describe=lambda r: str(group.peers[r]),
        state_of=lambda r: group.watch.state_of(group.peers[r]),
        head_fields=HEAD_FIELDS,
        limit_s=20,
    )
    with group.guarded("words", 60):
        ops = CudaOps(config, placed, layer=0, lane=0, words=words)
        torch.cuda.synchronize()
    return heap, words, ops


def drawn(config, seed, scale=0.05):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * scale).bfloat16()

    E, H, inner = config.experts, config.hidden, config.inner
    w = {"w1": draw(E, inner, H), "w2": draw(E, H, inner)}
    if config.gated:
        w["w3"] = draw(E, inner, H)
    if config.bias:
        w |= {"b1": draw(E, inner), "b2": draw(E, H)}
        if config.gated:
            w["b3"] = draw(E, inner)
    return w


def batch(config, rows, kind, g):
    x = torch.randn(rows, config.hidden, generator=g).bfloat16()
    ids = torch.randint(0, config.experts, (rows, config.choices), generator=g)
    if kind == "one":
        ids[:] = 0
    if kind == "masked":
        ids[torch.rand(ids.shape, generator=g) < 0.4] = -1
    return x, ids, torch.rand(rows, config.choices, generator=g)


def check(group, config, rounds, report):
    heap, words, ops = opened(config, group)
    weights, R = drawn(config, 5), group.size
    mine = slice(group.rank * config.slots_per_rank(R), (group.rank + 1) * config.slots_per_rank(R))
    ops.adopt({n: w[mine].cuda() for n, w in weights.items()})
    rng, worst, again = random.Random(1), 0.0, 0
    for i in range(rounds):
        g = torch.Generator().manual_seed(i)
        rows_R = [rng.choice([0, 1, config.max_rows // 2, config.max_rows]) for _ in range(R)]
        kind = rng.choice(["any", "one", "masked"])
        drawn_R = [batch(config, n, kind, g) for n in rows_R]
        want = reference_moe(*map(list, zip(*drawn_R, strict=True)), weights, config)[group.rank]
        x, ids, w = (t.cuda() for t in drawn_R[group.rank])
        bits = []
        for _ in range(2):  # the same twice: the same bits, whatever the delays
            if rng.random() < 0.5 and (rng.randrange(R) == group.rank):
                torch.cuda._sleep(rng.randrange(2_000_000))
            out = torch.full_like(x, float("nan"))
            head = (0, 0, config.max_rows, 0, 1, 0, 0, 0)
            ops.round(x, ids.int(), w, head, out)
            bits.append(out)
        torch.cuda.synchronize()
        words.check()
        again += not torch.equal(*bits)
        have, want = bits[0].cpu().float(), want.float()
        error = float((have - want).norm() / want.norm().clamp(min=1e-9)) if want.numel() else 0.0
        worst = max(worst, error if error == error else 9.0)
    report.append([str(config.activation), config.hidden, rounds, worst, again])
    group.allgather(b"", what="done", limit_s=60)
    heap.close()


def times(group, config, rows, report):
    heap, words, ops = opened(config, group)
    ops.rows.normal_()
    ops.results.normal_()
    g = torch.Generator().manual_seed(group.rank)
    x, ids, w = (t.cuda() for t in batch(config, rows, "any", g))
    slots, out = ids.int(), torch.empty_like(x)
    head = (0, 0, config.max_rows, 0, 1, 0, 0, 0)
    names = ("stage", "pull", "push", "reduce")
    spent = {n: [] for n in names}
    for i in range(30):
        group.allgather(b"", what="start", limit_s=60)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
        torch.cuda._sleep(200_000)
        marks[0].record()
        ops.stage(x, slots, w, head)
        marks[1].record()
        ops.pull()
        marks[2].record()
        ops.push()
        marks[3].record()
        ops.reduce(slots, w, None, out)
        marks[4].record()
        torch.cuda.synchronize()
        words.check()
        if i > 5:
            for n, a, b in zip(names, marks, marks[1:], strict=False):
                spent[n].append(a.elapsed_time(b) * 1e3)
    mine = {n: sorted(t)[len(t) // 2] for n, t in spent.items()}
    everyone = group.allgather(json.dumps(mine).encode(), what="times", limit_s=60)
    slowest = {n: max(json.loads(e)[n] for e in everyone) for n in names}
    moved = rows * config.choices * (group.size - 1) / group.size * config.hidden * 2
    report.append(
        [
            config.hidden,
            rows,
            {n: round(t, 1) for n, t in slowest.items()},
            "GB/s pull, push",
            round(moved / slowest["pull"] / 1e3),
            round(moved / slowest["push"] / 1e3),
        ]
    )
    heap.close()


def killed(group, config, report):
    """The last rank dies between rounds; the others' kernels leave and the context lives."""
    heap, words, ops = opened(config, group)
    weights = drawn(config, 5)
    local = config.slots_per_rank(group.size)
    ops.adopt({n: w[:local].cuda() for n, w in weights.items()})
    x, ids, w = (t.cuda() for t in batch(config, 16, "any", torch.Generator().manual_seed(1)))
    out, head = torch.zeros_like(x), (0, 0, config.max_rows, 0, 1, 0, 0, 0)
    ops.round(x, ids.int(), w, head, out)
    torch.cuda.synchronize()
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    ops.round(x, ids.int(), w, head, out)
    torch.cuda.synchronize()
    spent = time.monotonic() - started
    try:
        words.check()
        said = "nothing"
    except PeerLost as error:
        said = f"{error.how} {error.ranks}"
    alive = float(torch.ones(8, device="cuda").sum())
    report.append(["killed", said, round(spent, 3), bool(out.isnan().all()), alive])


def main():
    with Group.from_env() as group:
        torch.cuda.set_device(group.local_rank)
        torch.set_num_threads(8)
        report = Report(group.rank)
        base = {"experts": 16, "choices": 4, "max_rows": 64, "heap": "cuda"}
        for more in (
            {"hidden": 256, "inner": 128},
            {"hidden": 2880, "inner": 2880, "activation": "gpt_oss", "bias": True, "clamp": 7.0},
            {"hidden": 1024, "inner": 512, "weight_in": "fc2", "max_rows": 300},
        ):
            check(group, MoEConfig(**(base | more)), 12, report)
        for rows in (16, 128, 1024, 4096):
            big = MoEConfig(
                experts=32 * group.size,
                choices=8,
                hidden=7168,
                inner=64,
                max_rows=rows,
                heap="cuda",
            )
            times(group, big, rows, report)
        killed(group, MoEConfig(**base, hidden=256, inner=128), report)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        argv = [sys.executable, __file__]
        with local.spawn_ranks(int(sys.argv[1]), argv, end_others=False) as job:
            for outcome in job.wait(150):
                sys.stdout.write(f"rank {outcome.rank} ended with {outcome.code}\n{outcome.log}")
    else:
        main()
