"""Routing on one GPU: the kernel beside the same router in eager torch, in one run.

    PYTHONPATH=. python3 benchmarks/route.py --json results.json

Kernel: a graph of many launches, each on its own logits (together larger than the L2 cache), time
of a replay divided by launches, median of the replays; the gap between two dependent launches is
in it, so the row count 1 shows the floor of any kernel timed this way.  Eager: the same rotation,
one call after the other, CUDA events around the loop (what a caller of torch pays); captured: those
torch kernels in a graph (what the GPU alone pays).  Before timing, ids, slots, counts and weights
are compared with ``sched.route`` on the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from epmoe.kernels.route import launch, outputs
from epmoe.sched.placement import Placement
from epmoe.sched.route import Router, route

DEEPSEEK = Router(choices=8, score="sigmoid", groups=8, keep=4, renormalise=True, scale=2.5)
NEMOTRON = Router(choices=22, score="sigmoid", renormalise=True, scale=5.0)
QWEN3 = Router(choices=8, renormalise=True)
CASES = [  # name, router, experts, dtype, rows, bar in microseconds
    ("noaux_tc 8/4", DEEPSEEK, 256, torch.float32, 1, None),
    ("noaux_tc 8/4", DEEPSEEK, 256, torch.float32, 128, 6.0),
    ("noaux_tc 8/4", DEEPSEEK, 256, torch.float32, 1024, None),
    ("noaux_tc 8/4", DEEPSEEK, 256, torch.float32, 4096, 15.0),
    ("noaux_tc 8/4", DEEPSEEK, 256, torch.bfloat16, 128, 6.0),
    ("noaux_tc 8/4", DEEPSEEK, 256, torch.bfloat16, 4096, 15.0),
    ("sigmoid + bias", NEMOTRON, 512, torch.float32, 4096, None),
    ("softmax", QWEN3, 128, torch.bfloat16, 4096, None),
]
COLD = 128 << 20  # bytes of logits in one rotation; the L2 of an H200 has 60 MB
MOST_LAUNCHES = 512


def eager(
    x: Tensor, router: Router, bias: Tensor | None, table: Tensor, counts: Tensor, loads: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The router as models write it in torch, plus slots and counts."""
    rows, experts = x.shape
    score = x.float().sigmoid() if router.score == "sigmoid" else x.float().softmax(-1)
    by = score if bias is None else score + bias
    if router.groups > 1:
        worth = by.view(rows, router.groups, -1).topk(2, dim=-1).values.sum(-1)
        kept = worth.topk(router.keep, dim=-1, sorted=False).indices
        mask = torch.zeros_like(worth).scatter_(1, kept, 1.0).unsqueeze(-1)
        mask = mask.expand(-1, -1, experts // router.groups).reshape(rows, experts)
        by = by.masked_fill(mask == 0, -torch.inf)
    ids = by.topk(router.choices, dim=-1).indices
    weights = score.gather(1, ids)
    if router.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * router.scale
    flat = ids.reshape(-1)
    loads.scatter_add_(0, flat, torch.ones_like(flat))
    token = torch.arange(rows, device=x.device).unsqueeze(1)
    slots = table[ids, token % counts[ids]]
    return ids.int(), weights, slots


def timed(run: Callable[[], None], calls: int, replays: int) -> dict[str, float]:
    """Microseconds of one of ``calls`` in ``run``: median, tenth and ninetieth percentile."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * replays)]
    for i in range(replays):
        marks[2 * i].record()
        run()
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    took = sorted(marks[2 * i].elapsed_time(marks[2 * i + 1]) * 1e3 / calls for i in range(replays))
    return {
        "median": statistics.median(took),
        "p10": took[replays // 10],
        "p90": took[replays * 9 // 10],
    }


def captured(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def measure(
    name: str, router: Router, experts: int, dtype: torch.dtype, rows: int, bar: float | None
) -> dict[str, object]:
    item = dtype.itemsize
    sets = max(8, min(MOST_LAUNCHES, COLD // (rows * experts * item)))
    draw = torch.Generator(device="cuda").manual_seed(rows)
    x = [
        (torch.randn(rows, experts, device="cuda", generator=draw) * 2).to(dtype)
        for _ in range(sets)
    ]
    biased = router.score == "sigmoid"
    bias = torch.randn(experts, device="cuda", generator=draw) / 10 if biased else None
    place = Placement.linear(experts, experts + 32, 8)
    table, counts = place.replicas_EX.cuda(), place.counts_E.cuda()
    loads = torch.zeros(experts, dtype=torch.int64, device="cuda")
    named = {"bias_E": bias, "replicas_EX": table, "counts_E": counts, "loads_E": loads}
    outs = [outputs(one, router, slots=True) for one in x]

    def ours() -> None:
        for one, out in zip(x, outs, strict=True):
            launch(one, router, out=out, **named)

    def theirs() -> None:
        for one in x:
            eager(one, router, bias, table, counts, loads)

    ours()
    torch.cuda.synchronize()
    loads.zero_()
    launch(x[0], router, out=outs[0], **named)
    host = {n: None if t is None else t.cpu() for n, t in named.items()}
    host["loads_E"] = torch.zeros(experts, dtype=torch.int64)
    want = route(x[0].cpu(), router, **host)
    theirs_ids = eager(x[0], router, bias, table, counts, torch.zeros_like(loads))[0].cpu()
    found = {
        "equal_to_host": torch.equal(outs[0].ids_TK.cpu(), want.ids_TK)
        and torch.equal(outs[0].weights_TK.cpu(), want.weights_TK)
        and torch.equal(outs[0].slots_TK.cpu(), want.slots_TK)
        and torch.equal(loads.cpu(), host["loads_E"]),
        "rows_where_eager_chose_otherwise": int((theirs_ids != want.ids_TK).any(1).sum()),
    }
    kernel = timed(captured(ours).replay, sets, 40)
    torch_eager = timed(theirs, sets, 5)
    torch_graph = timed(captured(theirs).replay, sets, 20)
    return {
        "router": name,
        "rows": rows,
        "experts": experts,
        "choices": router.choices,
        "dtype": str(dtype).removeprefix("torch."),
        "launches": sets,
        "kernel_us": kernel,
        "eager_us": torch_eager,
        "eager_captured_us": torch_graph,
        "bar_us": bar,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--rows", type=int, nargs="*", help="only these row counts")
    told = parser.parse_args()
    device = torch.cuda.get_device_properties(0)
    ran_on = {
        "gpu": device.name,
        "sms": device.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    print(", ".join(f"{k} {v}" for k, v in ran_on.items()))
    heads = (
        "router",
        "dtype",
        "E",
        "K",
        "rows",
        "kernel us",
        "bar",
        "eager us",
        "x",
        "captured",
        "x",
    )
    line = "{:15} {:9} {:>5} {:>3} {:>5} {:>10} {:>5} {:>9} {:>6} {:>9} {:>6}"
    print(line.format(*heads))
    results = []
    for case in CASES:
        if told.rows and case[4] not in told.rows:
            continue
        r = measure(*case)
        results.append(r)
        ours, a, b = (r[n]["median"] for n in ("kernel_us", "eager_us", "eager_captured_us"))
        print(
            line.format(
                r["router"],
                r["dtype"],
                r["experts"],
                r["choices"],
                r["rows"],
                f"{ours:.2f}",
                r["bar_us"] or "",
                f"{a:.1f}",
                f"{a / ours:.1f}",
                f"{b:.1f}",
                f"{b / ours:.1f}",
            )
            + ("" if r["equal_to_host"] else "  NOT EQUAL TO THE HOST"),
            flush=True,
        )
    if told.json:
        told.json.write_text(json.dumps({"ran_on": ran_on, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
