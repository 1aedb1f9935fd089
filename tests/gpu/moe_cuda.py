"""The public layer on a CUDA heap, one rank a GPU: answers, graphs, chunks, bad ids, a killed rank.

python tests/gpu/moe_cuda.py 2
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from epmoe import ForwardContext, Group, MoE, MoEConfig, PeerLost, local, reference_moe
from epmoe.sched.chunks import plan_chunks

CONFIG = MoEConfig(
    experts=32,
    choices=4,
    hidden=512,
    inner=256,
    max_rows=64,
    shared_inner=128,
    heap="cuda",
    stall_s=5.0,
    open_s=60.0,
)


def say(group, *what):
    sys.stdout.write(f"[{group.rank}] " + " ".join(map(str, what)) + "\n")
    sys.stdout.flush()


def drawn(config, seed=5, scale=0.05):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * scale).bfloat16()

    E, H, inner, S = config.experts, config.hidden, config.inner, config.shared_inner
    w = {"w1": draw(E, inner, H), "w3": draw(E, inner, H), "w2": draw(E, H, inner)}
    return w | {"shared_w1": draw(S, H), "shared_w3": draw(S, H), "shared_w2": draw(H, S)}


def batches(config, rows_R, seed):
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in rows_R:
        ids = torch.randint(-1, config.experts, (n, config.choices), generator=g)
        x = torch.randn(n, config.hidden, generator=g).bfloat16()
        out.append((x, ids, torch.rand(n, config.choices, generator=g)))
    return out


def error(have, want):
    have, want = have.cpu().float(), want.float()
    if not want.numel():
        return 0.0
    return float((have - want).norm() / want.norm())


def answers(group, moe, weights):
    worst = 0.0
    for seed in range(10):
        rows_R = [(seed * 7 + 13 * r) % 65 if seed % 4 != r else 0 for r in range(group.size)]
        batch = batches(moe.config, rows_R, seed)
        want = reference_moe(*map(list, zip(*batch, strict=True)), weights, moe.config)
        y = moe(*(t.cuda() for t in batch[group.rank]))
        moe.check()
        worst = max(worst, error(y, want[group.rank]))
    say(group, "answers", worst)
    rows_R = [150, *[20] * (group.size - 1)]
    batch = batches(moe.config, rows_R, 99)
    y = moe(*(t.cuda() for t in batch[group.rank]), context=ForwardContext(rows=tuple(rows_R)))
    chunks, want = plan_chunks(rows_R, moe.config.max_rows), []
    for c in range(chunks.count):
        spans = [chunks.span(c, r) for r in range(group.size)]
        cut = [[b[i][s] for b, s in zip(batch, spans, strict=True)] for i in range(3)]
        want.append(reference_moe(*cut, weights, moe.config)[group.rank])
    say(group, "chunks", chunks.count, error(y, torch.cat(want)))
    say(group, "loads", moe.loads().sum().item())


def graphs(group, moe, weights):
    """An odd number of replays with other inputs in the same tensors."""
    x, ids, w = (t.cuda() for t in batches(moe.config, [16] * group.size, 1)[group.rank])
    moe(x, ids, w)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = moe(x, ids, w)
    worst = 0.0
    for seed in range(7):
        batch = batches(moe.config, [16] * group.size, seed)
        for mine, new in zip((x, ids, w), batch[group.rank], strict=True):
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        want = reference_moe(*map(list, zip(*batch, strict=True)), weights, moe.config)
        worst = max(worst, error(y, want[group.rank]))
    moe.check()
    say(group, "graphs", worst)


def host_cost(group, moe):
    x, ids, w = (t.cuda() for t in batches(moe.config, [16] * group.size, 1)[group.rank])
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(200):
        moe(x, ids, w)
    launched = (time.perf_counter() - started) / 200
    torch.cuda.synchronize()
    say(group, f"eager forward: {launched * 1e6:.0f} us to launch")


def bad_ids(group, moe):
    x, ids, w = (t.cuda() for t in batches(moe.config, [4] * group.size, 1)[group.rank])
    if group.rank == 0:
        ids[0, 0] = 10**6
    moe(x, ids, w)
    torch.cuda.synchronize()
    try:
        moe.check()
        say(group, "bad ids: nothing")
    except ValueError as found:
        say(group, "bad ids:", found)


def killed(group, moe):
    x, ids, w = (t.cuda() for t in batches(moe.config, [16] * group.size, 1)[group.rank])
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    y = moe(x, ids, w)
    torch.cuda.synchronize()
    spent = time.monotonic() - started
    try:
        moe.check()
    except PeerLost as lost:
        nan = bool(y.isnan().all())
        say(group, f"killed: {lost.how} {lost.ranks} after {spent:.3f} s, NaN {nan}", str(lost))
    say(group, "context", float(torch.ones(8, device="cuda").sum()))


def main():
    with Group.from_env() as group:
        torch.cuda.set_device(group.local_rank)
        torch.set_num_threads(8)
        weights, local_slots = drawn(CONFIG), CONFIG.experts // group.size
        mine = slice(group.rank * local_slots, (group.rank + 1) * local_slots)
        with MoE.open(CONFIG, group) as moe:
            moe.load(**{n: (w if "shared" in n else w[mine]).cuda() for n, w in weights.items()})
            answers(group, moe, weights)
            graphs(group, moe, weights)
            host_cost(group, moe)
            if group.rank > 0:
                bad_ids(group, moe)
                killed(group, moe)
            else:
                bad_ids(group, moe)
                moe._rounds[0].ops.tallies[3] = 0
                killed(group, moe)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        argv = [sys.executable, __file__]
        with local.spawn_ranks(int(sys.argv[1]), argv, end_others=False) as job:
            for outcome in job.wait(150):
                sys.stdout.write(f"rank {outcome.rank} ended with {outcome.code}\n{outcome.log}")
    else:
        main()
