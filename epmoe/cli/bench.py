"""epmoe bench: how fast a part of the layer is, beside a peer in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from epmoe.cli import layer, moving, transport
from epmoe.cli.machine import machine
from epmoe.cli.ranks import on_ranks
from epmoe.cli.tables import Steps, show, show_json, size
from epmoe.comm.group import Group
from epmoe.config import HEAPS, MoEConfig

RANKS = 4
DETAIL = """\
What is timed, per round, on every rank:
  epmoe             stage, C, wait, plan, pull, push, Y, wait, reduce: a round's verbs, no ffn
  gloo              the same by all_to_all_single, as a careful user writes it: sort by expert,
                    counts, rows, results, back into the order of the choices, weighted sum in fp32
  epmoe, rows moved of the first, until all results lie in this rank's slab (all but reduce)
  gloo, rows moved  the three all_to_all_single alone (counts, rows, results): rows were sorted and
                    memory was made before the clock started
Same rows, same experts (uniform, distinct per row), same processes.  They take turns within a
round, in an order that rotates.  Before each turn all ranks meet; then each rank's own clock
(perf_counter) runs until its result is there.  A round counts with its slowest rank; the figure is
the median over the rounds.  Before the first round the results of epmoe and of gloo are compared
with torch.equal.  The first tenth of the rounds warms up and is not counted.

With --heap cuda or nvshmem, on GPUs: dispatch and combine alone, a launch each, ids in and sums
out, beside NCCL's all_to_all_single of the same rows, sorted and counted before the clock starts
and without the weighted sum.  Our dispatch sends a row once to each rank that wants it, NCCL once
a choice; GB/s are of the bytes that each sends.  How GPUs are timed: `epmoe bench layer --help`."""


def add(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("bench", help="time a part of the layer beside a peer")
    parts = parser.add_subparsers(dest="part", required=True)
    parser = parts.add_parser(
        "transport",
        help="dispatch and combine alone, beside torch.distributed's all-to-all on gloo",
        description="Dispatch and combine alone, beside torch.distributed's all-to-all on gloo.",
        epilog=DETAIL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, text in (
        ("rows", 512, "rows of each rank"),
        ("hidden", 1024, "values of a row"),
        ("experts", 32, "experts on all ranks together"),
        ("choices", 4, "experts of a row"),
        ("rounds", 200, "rounds of each contestant"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", default="bf16", help="of rows and results: bf16 or fp32 (bf16)")
    parser.add_argument("--ranks", type=int, help=f"ranks to start if no launcher did ({RANKS})")
    parser.add_argument("--seed", type=int, default=0, help="of rows and choices (0)")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--heap", default="host", choices=HEAPS, help="GPUs: cuda, nvshmem (host)")
    layer.add(parts)


def main(args: argparse.Namespace) -> int:
    """0 if both gave the same bits; no speed is a failure."""
    if args.part == "layer":
        return layer.main(args)
    if args.rounds < 10:
        raise ValueError(f"--rounds must be at least 10, got {args.rounds}")
    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {args.ranks}")
    if args.heap != "host":
        return moving.main(args)
    config = MoEConfig(
        experts=args.experts,
        choices=args.choices,
        hidden=args.hidden,
        inner=1,  # no ffn runs
        max_rows=max(args.rows, 1),
        dtype=args.dtype,
        open_s=60.0,
        name="transport",
    )

    def body(group: Group) -> int:
        first = group.rank == 0
        with Steps("round", args.rounds, silent=not first or args.json) as steps:
            report = transport.run(
                group,
                config,
                rows=args.rows,
                rounds=args.rounds,
                seed=args.seed,
                tell=lambda done: steps.reach(done, "epmoe and gloo in turn"),
            )
        if first:
            print_json(report) if args.json else print_table(report)
        return 0

    return on_ranks(args.ranks, RANKS, body)


def print_json(report: transport.Report) -> None:
    """Shape, machine, times in microseconds."""
    show_json(
        report.shape
        | {
            "machine": machine(),
            "us": {name: times.described() for name, times in report.times.items()},
            "verbs_us": report.verbs,
            "ratios": report.ratios,
        }
    )


def print_table(report: transport.Report) -> None:
    """What it ran on, the contestants, then where epmoe's time goes."""
    shape: Mapping[str, Any] = report.shape
    print(f"  on {', '.join(str(fact) for fact in machine().values())}")
    print(
        f"  {shape['ranks']} ranks, {shape['rows']} rows x hidden {shape['hidden']} "
        f"{shape['dtype']}, top-{shape['choices']} of {shape['experts']}; each way "
        f"{size(shape['payload_bytes'])} a rank, {size(shape['away_bytes'])} of it to others"
    )
    us = {name: times.described() for name, times in report.times.items()}
    show(
        f"dispatch + combine, us, slowest rank of each of {shape['rounds']} rounds",
        ("", ">median", ">p10", ">p90"),
        [(name, *(f"{t[key]:,.0f}" for key in ("median", "p10", "p90"))) for name, t in us.items()],
    )
    show(
        "epmoe / gloo",
        ("", ""),
        [(name, f"{ratio:.2f}") for name, ratio in report.ratios.items()],
    )
    show(
        "epmoe's verbs, us, median of rounds and ranks",
        ("", ">us"),
        [(name, f"{value:,.0f}") for name, value in report.verbs.items()],
    )
