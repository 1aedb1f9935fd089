"""Dispatch and combine alone on GPUs, beside NCCL's all-to-all of the same rows."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epmoe.cli import contest
from epmoe.cli.contest import Drawn
from epmoe.cli.machine import machine
from epmoe.cli.nccl import Moved
from epmoe.cli.race import LIMIT_S, Race, described
from epmoe.cli.ranks import on_ranks
from epmoe.cli.tables import show, show_json
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.ops import forward_head
from epmoe.kernels.transport import Transport
from epmoe.runtime import Runtime

DISPATCH, COMBINE = "epmoe dispatch", "epmoe combine"
NCCL_DISPATCH, NCCL_COMBINE = "nccl dispatch", "nccl combine"
MEET = "meet"  # ranks wait for one another between dispatch and combine; not reported
WAYS = (DISPATCH, NCCL_DISPATCH, COMBINE, NCCL_COMBINE)


def main(args: argparse.Namespace) -> int:
    """0 if what came back is right; no speed is a failure."""
    config = MoEConfig(
        experts=args.experts,
        choices=args.choices,
        hidden=args.hidden,
        inner=64,  # no expert runs
        max_rows=max(args.rows, 1),
        heap=args.heap,
        stall_s=20.0,
        open_s=120.0,
        name="transport",
    )

    def body(group: Group) -> int:
        with contest.ready(group):
            report = run(group, config, rows=args.rows, rounds=args.rounds, seed=args.seed)
        if group.rank == 0:
            show_json(report) if args.json else print_table(report)
        return 0

    return on_ranks(args.ranks, contest.gpus(), body)


def run(
    group: Group, config: MoEConfig, *, rows: int, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """Collective: both take turns, ``rounds`` each.  ``EpmoeError`` if a row came back wrong."""
    drawn = Drawn.make(config, group, rows, skew=0.0, seed=seed)
    runtime, race = Runtime.open([config], group), Race(group)
    try:
        words = runtime.lanes[0].words
        with group.guarded("compile the kernels", LIMIT_S):
            ours = Transport(config, runtime.placed, layer=0, lane=0, words=words)  # type: ignore[arg-type]
        slots, out = drawn.ids.to(torch.int32), torch.empty_like(drawn.x)
        head = forward_head(config.max_rows)

        def dispatch() -> None:
            ours.dispatch(drawn.x, slots, drawn.weights, head)

        def combine() -> None:
            ours.combine(slots, drawn.weights, out)

        dispatch()
        ours.results.copy_(ours.rows)  # every row goes back as it came
        combine()
        torch.cuda.synchronize()
        words.limit(config.stall_s)  # type: ignore[union-attr]  # from here on nobody is still opening
        runtime.check()
        with group.guarded("compare the rows", LIMIT_S):
            _compare(drawn, out, group.rank)
        moved = Moved(config, group.size, drawn.ids)
        sent = drawn.x[moved.order // config.choices]
        came = moved.there(sent)
        us = race.parts(
            {
                "epmoe": ((DISPATCH, dispatch), (MEET, race.align), (COMBINE, combine)),
                "nccl": (
                    (NCCL_DISPATCH, partial(moved.there, sent)),
                    (MEET, race.align),
                    (NCCL_COMBINE, partial(moved.back, came)),
                ),
            },
            rounds,
        )
        words.check()  # type: ignore[union-attr]
    finally:
        runtime.close()
    sent_bytes = _sent(drawn.ids, config, group)
    return {
        "machine": machine(),
        "gpu": torch.cuda.get_device_name(),
        "ranks": group.size,
        "rows": rows,
        "hidden": config.hidden,
        "experts": config.experts,
        "choices": config.choices,
        "heap": config.heap,
        "rounds": rounds,
        "sent_bytes": sent_bytes,
        "us": {way: described(us[way]) for way in WAYS},
        "gb_per_s": {
            way: round(sent_bytes[way] / described(us[way])["median"] / 1e3, 1) for way in WAYS
        },
    }


def _sent(ids: Tensor, config: MoEConfig, group: Group) -> dict[str, int]:
    """Bytes that leave this rank: our dispatch sends a row once to each rank that wants it."""
    owner, row = ids // config.slots_per_rank(group.size), config.hidden * config.itemsize
    others = [r for r in range(group.size) if r != group.rank]
    choices = int((owner != group.rank).sum()) * row
    once = sum(int((owner == r).any(1).sum()) for r in others) * row
    return {DISPATCH: once, NCCL_DISPATCH: choices, COMBINE: choices, NCCL_COMBINE: choices}


def print_table(report: dict[str, Any]) -> None:
    """Shape, then time and rate of each way."""
    print(f"  on {report['ranks']} x {report['gpu']}, {', '.join(report['machine'].values())}")
    print(
        f"  {report['rows']} rows x hidden {report['hidden']} bf16, top-{report['choices']} of "
        f"{report['experts']}, uniform, {report['heap']} heap"
    )
    show(
        f"us, slowest rank, median of {report['rounds']}; GB/s of what rank 0 sends",
        ("", ">us", ">p10", ">p90", ">GB/s"),
        [
            (way, *(f"{us[k]:,.1f}" for k in ("median", "p10", "p90")), f"{rate:.0f}")
            for way in WAYS
            for us, rate in [(report["us"][way], report["gb_per_s"][way])]
        ],
    )


def _compare(drawn: Drawn, out: Tensor, rank: int) -> None:
    """Router weights sum to 1, so a row is itself again, up to one rounding to bf16."""
    want = drawn.x.float()
    apart = (out.float() - want).abs() - want.abs() / 128  # bf16 keeps 8 bits
    if not float(apart.max()) <= 1e-6:  # NaN is not
        raise EpmoeError(f"rank {rank}: a row came back {float(apart.max()):.2e} away from itself")
