"""epmoe trace: one round on GPUs, span by span, as a file for ui.perfetto.dev."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmoe.cli import contest
from epmoe.cli.contest import Drawn
from epmoe.cli.machine import machine
from epmoe.cli.race import LIMIT_S, Race
from epmoe.cli.ranks import on_ranks
from epmoe.cli.share import share, warning
from epmoe.cli.tables import show, show_json, size
from epmoe.cli.timeline import Timeline, Told, by_rank, by_role, timeline, write
from epmoe.comm.group import Group
from epmoe.comm.words import Words
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.fused import FusedOps
from epmoe.kernels.ops import forward_head
from epmoe.kernels.trace import decode
from epmoe.moe import MoE
from epmoe.shapes import SHAPES, shape

DETAIL = """\
The kernel is compiled a second time, with time stamps: one thread of each role of each CTA notes
when a span of its time ended.  First both kernels run some rounds in turn, as epmoe bench layer
times them (cold caches, all ranks started together); their answers must be the same bits, and the
two medians say what the notes cost.  Then one more round is traced.

In the file a rank is a process and a role of a CTA a thread.  Open it in ui.perfetto.dev or
chrome://tracing; a name that ends in .gz is written packed, which Perfetto opens as well.

Time: an SM's clock is laid beside its GPU's timer by the readings that the roles of a CTA take when
they begin and end.  There is none in between, where the clock may change its pace: in the middle of
a long round spans may be drawn some microseconds off.

Timers of different GPUs are not promised to agree.  So ranks are drawn such that all leave wait_c
at the same moment: the last word C goes to all of them at once, and each leaves when it has come.
They then should leave wait_y together as well; how far they are apart is printed, and no order of
events of two ranks within that distance means anything."""


def add(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "trace",
        help="one round on GPUs as a time line of every role, for ui.perfetto.dev",
        description="One round on GPUs as a time line of every role of every CTA.",
        epilog=DETAIL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="qwen3-30b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=int, default=128, help="of each rank (128)")
    parser.add_argument(
        "--load-of", type=int, metavar="N", help="as of epmoe bench layer: no N-GPU round"
    )
    parser.add_argument("--skew", type=float, default=0.0, help="of the routing (0: uniform)")
    parser.add_argument("--heap", default="cuda", choices=("cuda", "nvshmem"))
    parser.add_argument(
        "--warm", action="store_true", help="caches as the round before left them, not cold"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="timed before, of either kernel (10)"
    )
    parser.add_argument("--ranks", type=int, help="ranks to start if no launcher did (one a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, routing, weights (0)")
    parser.add_argument("--out", default="trace.json", metavar="FILE", help="(trace.json)")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")


def main(args: argparse.Namespace) -> int:
    """0 if the round was traced and written."""
    out = Path(args.out)
    if args.shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {args.shape!r}")
    if args.skew < 0:
        raise ValueError(f"--skew must be at least 0, got {args.skew}")
    for name in ("rows", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out must lie in a folder that exists, got {args.out!r}")

    def body(group: Group) -> int:
        of = group.size if args.load_of is None else args.load_of
        whole = shape(args.shape, max_rows=args.rows, heap=args.heap, stall_s=20.0, open_s=120.0)
        config, about = share(whole, group.size, of), warning([whole], group.size, of)
        with contest.ready(group):
            mine, us = _traced(group, config, args)
        said = group.allgather(mine.packed(), what="spans", limit_s=LIMIT_S)
        if group.rank == 0:
            line = timeline([Told.unpacked(one) for one in said])
            report = _report(line, us, config, args) | {"load_of": of, "warning": about}
            report["bytes"] = write(out, line, report)
            if args.json:
                show_json(report)
            else:
                print_tables(report)
        return 0

    return on_ranks(args.ranks, contest.gpus(), body)


def _traced(
    group: Group, config: MoEConfig, args: argparse.Namespace
) -> tuple[Told, dict[str, float]]:
    """Collective: one round, and the median times of rounds without and with notes."""
    with group.guarded("see whether it fits", LIMIT_S):
        contest.check_memory(config, group.size)
        held = contest.weights(config, group, args.seed)
        drawn = Drawn.make(config, group, args.rows, skew=args.skew, seed=args.seed)
    with MoE.open(config, group) as moe:
        with group.guarded("make both kernels", LIMIT_S):
            plain, noting = (_fused(moe, config, held, trace=trace) for trace in (False, True))
        rounds: dict[str, Callable[[], Tensor]] = {
            "plain": partial(_round, plain, drawn),
            "noted": partial(_round, noting, drawn),
        }
        answers = [call() for call in rounds.values()]
        moe.check()
        with group.guarded("compare the answers", LIMIT_S):
            if not torch.equal(*answers):
                raise EpmoeError(f"rank {group.rank}: a round with notes gives other bits")
        race = Race(group, cold=not args.warm)
        us = {name: statistics.median(all) for name, all in race.run(rounds, args.rounds).items()}
        noting.notes.zero_()
        rounds["plain"]()  # clearing the notes has emptied the caches
        race.start()
        rounds["noted"]()
        moe.check()
        return Told(torch.cuda.get_device_name(), decode(noting.notes, noting.grid)), us


def _fused(moe: MoE, config: MoEConfig, held: Mapping[str, Tensor], *, trace: bool) -> FusedOps:
    words = moe._runtime.lanes[0].words
    if isinstance(words, Words):
        raise EpmoeError(f"config.heap must be of GPU memory, got {config.heap}")
    placed = moe._runtime.placed
    made = FusedOps(config, placed, layer=0, lane=0, words=words, trace=trace)
    made.adopt(held)
    return made


def _round(fused: FusedOps, drawn: Drawn) -> Tensor:
    out = torch.empty_like(drawn.x)
    head = forward_head(fused.config.max_rows)
    fused.round(drawn.x, drawn.ids.to(torch.int32), drawn.weights, head, out)
    return out


def _report(
    line: Timeline, us: Mapping[str, float], config: MoEConfig, args: argparse.Namespace
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "shape": config.name,
        "experts": config.experts,
        "rows": args.rows,
        "ranks": len(line.ranks),
        "skew": args.skew,
        "heap": args.heap,
        "caches": "warm" if args.warm else "cold",
        "out": args.out,
        "round_us": {name: round(value, 2) for name, value in us.items()},
        "aligned_by": "wait_c" if line.apart is not None else "nothing",
        "apart_us": None if line.apart is None else line.apart / 1e3,
        "by_rank": by_rank(line),
        "by_role": by_role(line),
    }


def print_tables(report: Mapping[str, Any]) -> None:
    """What it ran on, what the notes cost; when each rank did what, and each role."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}"

    us, ranks = report["round_us"], report["by_rank"]
    print(f"  on {report['ranks']} x {ranks[0]['gpu']}, {', '.join(report['machine'].values())}")
    print(
        f"  {report['shape']}, {report['rows']} rows, skew {report['skew']}, {report['caches']} "
        f"caches: a round takes {us['plain']:,.1f} us, with notes {us['noted']:,.1f}"
    )
    for said in report["warning"]:
        print(f"  {said}")
    if report["apart_us"] is None:
        print("  the ranks share no event: each has its own time, from its own first span on")
    elif report["ranks"] > 1:
        print(f"  ranks are aligned where they leave wait_c, to about {report['apart_us']:,.1f} us")
    for one in ranks:
        if one["full"]:
            print(f"  rank {one['rank']}: {one['full']} roles ran out of notes; their end lacks")
    show(
        "us of each rank: it begins, its first CTA is through wait_c and wait_y, it ends",
        (">rank", ">begins", ">wait_c", ">wait_y", ">ends", ">spans"),
        [
            (
                str(one["rank"]),
                *(number(one[name]) for name in ("begins", "wait_c", "wait_y", "ends")),
                f"{one['spans']:,}",
            )
            for one in ranks
        ],
    )
    show(
        "each role's spans: times and us of one CTA that has it, first begin, last end",
        ("role", "span", "", ">CTAs", ">times", ">us", ">from", ">to"),
        [
            (
                one["role"].replace("_", " "),
                one["span"],
                "waits" if one["waits"] else "",
                str(one["ctas"]),
                f"{one['times']:,.1f}",
                *(number(one[name]) for name in ("us", "from", "to")),
            )
            for one in report["by_role"]
        ],
    )
    print(f"  {size(report['bytes'])} in {report['out']}: open it in ui.perfetto.dev")
