"""What every rank does in the tests of this folder; each body's findings go to stdout as JSON.

One process a GPU runs all bodies it is given, since starting it costs more than most of them:
    PYTHONPATH=. python tests/gpu/bodies.py cuda heap answers graphs
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace

import torch
from hog import Hog
from there_and_back import there_and_back

from epmoe import ForwardContext, Group, MoE, MoEConfig, PeerLost, reference_moe
from epmoe.comm import open_heap
from epmoe.kernels.transport import Transport
from epmoe.sched.chunks import plan_chunks

MARK = "@@"  # of a line that is a finding
SMALL = MoEConfig(
    experts=16, choices=4, hidden=512, inner=256, max_rows=64, stall_s=10.0, open_s=60.0
)
SHAPES = {
    "swiglu": {"hidden": 256, "inner": 128},
    "gpt_oss": {"hidden": 2880, "inner": 2880, "activation": "gpt_oss", "bias": True, "clamp": 7.0},
    "fc2": {"hidden": 1024, "inner": 512, "weight_in": "fc2", "max_rows": 300},
    "relu2": {"hidden": 192, "inner": 320, "activation": "relu2", "bias": True, "choices": 1},
    "shared": {"hidden": 512, "inner": 256, "shared_inner": 128, "activation": "geglu"},
}


def drawn(config, seed=5, scale=0.05):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * scale).bfloat16()

    E, H, inner, S = config.experts, config.hidden, config.inner, config.shared_inner
    w = {"w1": draw(E, inner, H), "w2": draw(E, H, inner)}
    if config.gated:
        w["w3"] = draw(E, inner, H)
    if config.bias:
        w |= {"b1": draw(E, inner), "b2": draw(E, H)}
        w |= {"b3": draw(E, inner)} if config.gated else {}
    if S:
        w |= {"shared_w1": draw(S, H), "shared_w3": draw(S, H), "shared_w2": draw(H, S)}
    return w


def batch(config, rows, g, kind="any"):
    x = torch.randn(rows, config.hidden, generator=g).bfloat16()
    ids = torch.rand(rows, config.experts, generator=g).topk(config.choices).indices
    if kind == "one":
        ids[:] = 0
    elif kind == "none":
        ids[:] = -1
    elif kind == "masked":
        ids[torch.rand(ids.shape, generator=g) < 0.4] = -1
    return x, ids, torch.rand(rows, config.choices, generator=g)


def batches(config, rows_R, seed, kind="any"):
    g = torch.Generator().manual_seed(seed)
    return [batch(config, rows, g, kind) for rows in rows_R]


def oracle(config, weights, batch_R):
    return reference_moe(*map(list, zip(*batch_R, strict=True)), weights, config)


def error(have, want):
    """Relative, in the norm; 9 if anything is NaN."""
    if not want.numel():
        return 0.0
    have, want = have.cpu().float(), want.float()
    found = float((have - want).norm() / want.norm().clamp(min=1e-9))
    return found if found == found else 9.0


def loaded(config, group):
    """The layer of every rank, and all experts' weights for the oracle."""
    moe, weights = MoE.open(config, group), drawn(config)
    load(moe, group, weights)
    return moe, weights


def load(moe, group, weights):
    each = moe.config.slots_per_rank(group.size)
    mine = slice(group.rank * each, (group.rank + 1) * each)
    moe.load(**{n: (w if "shared" in n else w[mine]).cuda() for n, w in weights.items()})


def met(group):
    group.allgather(b"", what="met", limit_s=60)


def heap(group, kind):
    """Bytes of every slab from every rank, by kernels and by the host."""
    size, rank, span = (1 << 20) + 200, group.rank, 256
    made = open_heap(kind, group, size, generation=3, limit_s=60)
    zeros = all(not made.peer(r).any() for r in range(group.size))
    met(group)
    for r in range(group.size):
        made.peer(r)[rank * span : (rank + 1) * span] = rank + 1
    torch.cuda.synchronize()
    met(group)
    columns = made.mine[: group.size * span].view(group.size, span).cpu()
    stream = torch.cuda.Stream()
    tail = torch.arange(8, dtype=torch.uint8) + 10 * rank
    made.write((rank + 1) % group.size, size - 8, tail, stream.cuda_stream)
    stream.synchronize()
    met(group)
    found = {
        "zeros": zeros,
        "columns": [int(c[0]) if c.eq(c[0]).all() else -1 for c in columns],
        "read": list(made.read(rank, size - 8, 8)),
        "length": made.mine.numel(),
        "aligned": all(made.address(r) % 128 == 0 for r in range(group.size)),
        "generation": made.generation,
    }
    met(group)
    made.close()
    made.close()
    return found


def opened(group, kind):
    """A layer with its weights, opened twice; no round."""
    opens = 0
    for _ in range(2):
        moe, _ = loaded(replace(SMALL, heap=kind), group)
        with moe:
            moe.check()
            opens += 1
            met(group)
    return [group.size, group.rank, opens]


@contextmanager
def half_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def modes(group, kind):
    """Opened, called, moved and closed under the caller's defaults, or with another GPU current."""
    config, each = replace(SMALL, heap=kind), SMALL.slots_per_rank(group.size)
    slots = slice(group.rank * each, (group.rank + 1) * each)
    weights = {name: w[slots].cuda() for name, w in drawn(SMALL).items()}
    mine = [t.cuda() for t in batches(config, [40] * group.size, 1)[group.rank]]
    with MoE.open(config, group) as moe:
        moe.load(**weights)
        wanted, found = moe(*mine), {}
        met(group)
    elsewhere = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    for name, mode, early in (
        ("device", torch.device("cuda"), True),
        ("dtype", half_precision(), True),
        ("elsewhere", torch.cuda.device(elsewhere), False),
    ):
        opened = None if early else MoE.open(config, group)
        with mode:
            moe = opened or MoE.open(config, group)
            moe.load(**{name: w.clone() for name, w in weights.items()})  # experts will move
            same = torch.equal(moe(*mine), wanted)
            turned = replace(moe.placement, expert_of_S=moe.placement.expert_of_S[::-1])
            moe.place(turned)
            same &= torch.equal(moe(*mine), wanted)
            moe.check()
            met(group)
            moe.close()
        found[name] = same
    return found


def too_large(group, kind):
    try:
        open_heap(kind, group, 1 << 42, generation=1, limit_s=60)
    except Exception as refused:
        return f"{type(refused).__name__}: {refused}"
    return "a heap of 4 TiB"


def answers(group, kind):
    """Every shape against the oracle; each batch twice with delays, the same bits."""
    found = {}
    for name, fields in SHAPES.items():
        config = replace(SMALL, heap=kind, **fields)
        moe, weights = loaded(config, group)
        with moe:
            worst, differ, rng = 0.0, 0, random.Random(7)
            for seed, traffic in enumerate(["any", "one", "masked", "none", "any", "masked"]):
                most = config.max_rows
                rows_R = [rng.choice([0, 1, most // 2, most]) for _ in range(group.size)]
                batch_R = batches(config, rows_R, seed, traffic)
                want = oracle(config, weights, batch_R)[group.rank]
                mine, bits = [t.cuda() for t in batch_R[group.rank]], []
                for _ in range(2):
                    late = rng.randrange(group.size), rng.randrange(3_000_000)
                    if late[0] == group.rank:
                        torch.cuda._sleep(late[1])
                    bits.append(moe(*mine))
                moe.check()
                differ += not torch.equal(*bits)
                worst = max(worst, error(bits[0], want))
            met(group)
        found[name] = [worst, differ]
    return found


def chunks(group, kind):
    config = replace(SMALL, heap=kind)
    moe, weights = loaded(config, group)
    with moe:
        rows_R = [150, *[20] * (group.size - 1)]
        batch_R = batches(config, rows_R, 99)
        mine = [t.cuda() for t in batch_R[group.rank]]
        y = moe(*mine, context=ForwardContext(rows=tuple(rows_R)))
        moe.check()
        plan, want = plan_chunks(rows_R, config.max_rows), []
        for c in range(plan.count):
            spans = [plan.span(c, r) for r in range(group.size)]
            cut = [tuple(t[s] for t in b) for b, s in zip(batch_R, spans, strict=True)]
            want.append(oracle(config, weights, cut)[group.rank])
        rows = sum(int((b[1] >= 0).sum()) for b in batch_R)
        found = {
            "error": error(y, torch.cat(want)),
            "loads": moe.loads().sum().item(),
            "rows": rows,
        }
        met(group)
    return found | {"chunks": plan.count}


def graphs(group, kind):
    """An odd number of replays, other inputs in the same tensors each time."""
    config = replace(SMALL, heap=kind)
    moe, weights = loaded(config, group)
    with moe:
        mine = [t.cuda() for t in batches(config, [16] * group.size, 1)[group.rank]]
        moe(*mine)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe(*mine)
        worst = 0.0
        for seed in range(7):
            batch_R = batches(config, [16] * group.size, seed)
            for old, new in zip(mine, batch_R[group.rank], strict=True):
                old.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            worst = max(worst, error(y, oracle(config, weights, batch_R)[group.rank]))
        moe.check()
        met(group)
    return worst


def compiled(group, kind):
    """torch.compile keeps the layer whole and replays it as part of its own graphs."""
    moe, _ = loaded(replace(SMALL, heap=kind), group)
    with moe:

        def model(x, ids, weights):
            return moe(x * 2, ids, weights) + 1

        call, equal = torch.compile(model, fullgraph=True, mode="reduce-overhead"), 0
        for seed in range(6):
            mine = [t.cuda() for t in batches(moe.config, [16] * group.size, seed)[group.rank]]
            equal += torch.equal(call(*mine).clone(), model(*mine))
        moe.check()
        met(group)
    torch.compiler.reset()
    return equal


def two_layers(group, kind):
    """Two layers on one heap, taking turns, one with wider rows."""
    first = replace(SMALL, heap=kind, name="first")
    second = replace(SMALL, heap=kind, hidden=1024, inner=128, choices=2, name="second")
    layers, worst = MoE.open_all([first, second], group), 0.0
    with layers[0]:
        weights = [drawn(layer.config, seed=n) for n, layer in enumerate(layers)]
        for layer, w in zip(layers, weights, strict=True):
            load(layer, group, w)
        for seed in range(9):
            layer, w = layers[seed % 2], weights[seed % 2]
            batch_R = batches(
                layer.config, [1 + (5 * seed + r) % 64 for r in range(group.size)], seed
            )
            y = layer(*(t.cuda() for t in batch_R[group.rank]))
            worst = max(worst, error(y, oracle(layer.config, w, batch_R)[group.rank]))
        layers[0].check()
        met(group)
    return worst


def refused(group, kind):
    """A rank whose batch is refused serves the others as if it had brought none."""
    config = replace(SMALL, heap=kind)
    moe, weights = loaded(config, group)
    with moe:
        batch_R = batches(config, [16] * group.size, 3)
        x, ids, w = (t.cuda() for t in batch_R[group.rank])
        if group.rank == 0:
            try:
                moe(x.float(), ids, w)
                return "nothing raised"
            except TypeError as said:
                met(group)
                return str(said)
            finally:
                torch.cuda.synchronize()
        y = moe(x, ids, w)
        moe.check()
        nobody = batches(config, [0], 3)[0]
        want = oracle(config, weights, [nobody, *batch_R[1:]])[group.rank]
        met(group)
    return error(y, want)


def apart(group, kind):
    """Dispatch and combine alone, an exact function of row and slot between them; forwards too."""
    found = []
    for fields in ({}, {"weight_in": "fc2", "hidden": 2880, "choices": 6, "max_rows": 400}):
        config = replace(SMALL, heap=kind, **fields)
        moe, _ = loaded(config, group)
        with moe:
            runtime = moe._runtime
            alone = Transport(config, runtime.placed, layer=0, lane=0, words=runtime.lanes[0].words)
            rng, right, before = random.Random(11), 0, None
            for seed, traffic in enumerate(["any", "one", "masked", "none", "any", "masked"]):
                most = config.max_rows
                rows_R = [rng.choice([0, 1, most // 2, most]) for _ in range(group.size)]
                batch_R = batches(config, rows_R, seed, traffic)
                x, ids, weights = (t.cuda() for t in batch_R[group.rank])
                ids = ids if seed % 2 else ids.int()
                if group.rank == seed % group.size:
                    torch.cuda._sleep(2_000_000)
                asked = torch.cat([ids.flatten() for _, ids, _ in batch_R])
                right += there_and_back(alone, x, ids, weights, asked, group.rank)
                same = batches(config, [most] * group.size, 99)[group.rank]
                after = moe(*(t.cuda() for t in same))
                right += before is None or torch.equal(before, after)
                before = after
            moe.check()
            met(group)
        found.append([right, alone.bad()])
    return found


def bad_ids(group, kind):
    """A choice that names no expert counts as -1 and is told by check."""
    config = replace(SMALL, heap=kind)
    moe, weights = loaded(config, group)
    with moe:
        batch_R = batches(config, [16] * group.size, 4)
        for _, ids, _ in batch_R:
            ids[0, 0] = -1
        x, ids, w = (t.cuda() for t in batch_R[group.rank])
        if group.rank == 0:
            ids[0, 0] = 10**6
        y, said = moe(x, ids, w), ""
        try:
            moe.check()
        except ValueError as told:
            said = str(told)
        found = [error(y, oracle(config, weights, batch_R)[group.rank]), said]
        met(group)
    return found


def bits(group, kind):
    """The same 48 rows on however many ranks; a fingerprint of all their results."""
    config = replace(SMALL, heap=kind, max_rows=48)
    moe, _ = loaded(config, group)
    with moe:
        whole = batches(config, [48], 11)[0]
        each = 48 // group.size
        mine = slice(group.rank * each, (group.rank + 1) * each)
        y = moe(*(t[mine].cuda() for t in whole))
        moe.check()
        raw = y.cpu().view(torch.uint8).numpy().tobytes()
        parts = group.allgather(raw, what="results", limit_s=60)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def delays(group, kind, rounds=300):
    """The same batch again and again while ranks are late in turn and matmuls hog the SMs."""
    config = replace(SMALL, heap=kind)
    moe, _ = loaded(config, group)
    with moe:
        mine = [
            t.cuda() for t in batches(config, [40 + r for r in range(group.size)], 2)[group.rank]
        ]
        first, rng, other, differ = moe(*mine), random.Random(group.rank), torch.cuda.Stream(), 0
        square = torch.randn(4096, 4096, device="cuda").bfloat16()
        equal = torch.zeros((), dtype=torch.int64, device="cuda")
        for n in range(rounds):
            if rng.random() < 0.3:
                torch.cuda._sleep(rng.randrange(400_000))
            if n % 16 == 0:
                with torch.cuda.stream(other):
                    for _ in range(4):
                        square @ square
            equal += (moe(*mine) == first).all()
        moe.check()
        differ = rounds - int(equal)
        met(group)
    return differ


def night_delays(group, kind):
    return delays(group, kind, rounds=10_000)


def hogged(group, kind):
    """Somebody else holds some SMs or all: rounds wait for him, by the limit at most."""
    config, hog, found = replace(SMALL, heap=kind), Hog(), {}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    each = [
        tuple(t.cuda() for t in batches(config, [40 + r for r in range(group.size)], s)[group.rank])
        for s in range(3)
    ]
    moe, _ = loaded(config, group)
    with moe:
        wanted = [moe(*mine) for mine in each]
        for held in (1, sms // 2, sms - 1, sms):
            met(group)
            hog.hold(held, 60.0)
            began = time.monotonic()
            outs = [moe(*mine) for mine in each]
            torch.cuda.current_stream().synchronize()
            spent = time.monotonic() - began
            moe.check()
            found[held] = [sum(map(torch.equal, wanted, outs)), round(spent, 4)]
        met(group)
        rng, equal = random.Random(group.rank), torch.zeros((), dtype=torch.int64, device="cuda")
        for n in range(300):  # he comes and goes while rounds are under way
            if rng.random() < 0.2:
                hog.take(rng.randrange(1, sms + 1), rng.random() * 2)
            equal += (moe(*each[n % 3]) == wanted[n % 3]).all()
        moe.check()
        found["often"] = [int(equal), 0.0]
        met(group)
    moe, _ = loaded(replace(config, stall_s=0.05), group)  # he stays for longer than that
    moe(*each[0])
    torch.cuda.synchronize()
    met(group)
    hog.hold(1, 200.0)
    began, how = time.monotonic(), ""
    y = moe(*each[0])
    torch.cuda.current_stream().synchronize()
    spent = time.monotonic() - began
    try:
        moe.check()
    except PeerLost as lost:
        how = lost.how
    moe.close()
    found["for long"] = [how, bool(y.isnan().all()), round(spent, 4)]
    return found


def lanes(group, kind, rounds=100):
    """Two lanes on two streams of one rank; several ranks refuse them."""
    config = replace(SMALL, heap=kind, lanes=2, stall_s=2.0)
    try:
        moe, _ = loaded(config, group)
    except ValueError as refused:
        return str(refused)
    each = [tuple(t.cuda() for t in batch(config, 40, torch.Generator())) for _ in range(2)]
    equal = torch.zeros(2, dtype=torch.int64, device="cuda")
    with moe:
        wanted = [moe(*mine, lane=lane) for lane, mine in enumerate(each)]
        streams = [torch.cuda.Stream() for _ in each]
        torch.cuda.synchronize()
        for _ in range(rounds):
            for lane, mine in enumerate(each):
                with torch.cuda.stream(streams[lane]):
                    equal[lane] += (moe(*mine, lane=lane) == wanted[lane]).all()
        moe.check()
    return int(equal.sum())


def killed(group, kind):
    """The last rank dies while the others' kernels wait for it; nobody hangs, contexts live."""
    moe, _ = loaded(replace(SMALL, heap=kind), group)

    def late(*mine):
        _a_second()  # the round is queued behind it
        moe(*mine)

    return _last_dies(group, moe, moe, late)


def killed_apart(group, kind):
    """The same, by dispatch and combine alone."""
    moe, _ = loaded(replace(SMALL, heap=kind), group)
    alone = Transport(
        moe.config, moe._runtime.placed, layer=0, lane=0, words=moe._runtime.lanes[0].words
    )

    def rows_back(x, ids, weights, between=lambda: None):
        out = torch.zeros_like(x)
        alone.dispatch(x, ids, weights, (0, 0, moe.config.max_rows, 0, 1, 0, 0, 0))
        alone.results.copy_(alone.rows)
        between()
        alone.combine(ids, weights, out)
        return out

    return _last_dies(group, moe, rows_back, lambda *mine: rows_back(*mine, between=_a_second))


def _a_second():
    torch.cuda._sleep(2_000_000_000)


def _last_dies(group, moe, forward, late):
    """``late``: as ``forward``, with a second on the GPU before others get what they wait for."""
    mine = [t.cuda() for t in batches(moe.config, [16] * group.size, 1)[group.rank]]
    for _ in range(3):
        forward(*mine)
    torch.cuda.synchronize()
    met(group)
    if group.rank == group.size - 1:
        late(*mine)
        threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    y = forward(*mine)
    torch.cuda.synchronize()
    spent, how = time.monotonic() - started, ""
    try:
        moe.check()
    except PeerLost as lost:
        how = f"{lost.how} {lost.ranks}"
    alive = float(torch.ones(8, device="cuda").sum())
    moe.close()
    return {"how": how, "spent": spent, "nan": bool(y.isnan().all()), "alive": alive}


def main():
    kind, *names = sys.argv[1:]
    with Group.from_env() as group:
        torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
        torch.set_num_threads(8)
        for name in names:
            started = time.monotonic()
            try:
                finding = {"value": globals()[name](group, kind)}
            except Exception:
                finding = {"error": traceback.format_exc()}
            finding |= {"body": name, "s": round(time.monotonic() - started, 2)}
            sys.stdout.write(f"{MARK}{json.dumps(finding)}\n")
            sys.stdout.flush()
        if {"killed", "killed_apart"} & set(names):
            os._exit(0)  # a library below may wait for the dead rank when it is unloaded


if __name__ == "__main__":
    main()
