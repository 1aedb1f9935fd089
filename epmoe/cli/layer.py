"""epmoe bench layer: whole forwards on GPUs, beside peers of the same run and the floor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from epmoe.cli import contest
from epmoe.cli.contest import Drawn, Entry
from epmoe.cli.machine import machine
from epmoe.cli.race import LIMIT_S, RULES
from epmoe.cli.ranks import on_ranks
from epmoe.cli.roofline import floor
from epmoe.cli.share import share, warning
from epmoe.cli.standings import lines_of, plot, print_tables
from epmoe.cli.tables import show_json
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.shapes import SHAPES, shape

ROWS = "16,128,512,2048,8192"
DETAIL = f"""\
What is timed, on every rank: one whole forward, from the caller's rows, ids and router weights to
the caller's output.
  split             epmoe: stage, pull, two grouped GEMMs, push, reduce as separate launches
  fused             epmoe: the same in one launch, as every call of MoE does it
  nccl, grouped_mm  torch: sort, all_to_all_single of counts and of rows, sort by expert,
                    torch._grouped_mm, activation, torch._grouped_mm, all of it back, weighted sum
{RULES}
Outputs are compared before: split's and fused's are the same bits, the peer's are within
{contest.APART:.0%} (relative; its router weights are bf16).  Split's launches are then timed one by
one, back to back, in turns of their own: ids are int32 and the output exists before they begin.

The floor is the longest of arithmetic, memory and NVLink time for uniform routing, with each row
sent once to each rank, at 650 TFLOP/s, 4.3 TB/s and 380 GB/s, plus 12 us.  Large GEMMs run up to a
quarter faster, so a line may lie below its floor.  --skew S draws experts with weights 1 / n^S (0
is uniform); the floor stays that of uniform routing.
Every rank holds experts / ranks of the experts: a run on 2 or 4 GPUs is not the 8-GPU layer.

--load-of N runs, on R ranks, a layer with experts * R / N experts (as many as choices at least):
every rank holds as many experts and gets as many rows as a rank of N.  IT IS NOT THE LAYER ON N
GPUs: (R-1)/R of the choices cross NVLink instead of (N-1)/N, a row visits at most R ranks (with
dsv3 it goes to 4.6 others of 8, to 1 of 2), a round waits for R ranks, and --skew has fewer experts
to draw from.  Floor and peers are those of the layer as it is run.  The shapes are called "dsv3
load-of-N" in all that is printed or written; JSON and CSV have load_of (the number of ranks if this
is off) and experts, and JSON a warning, which is printed over the tables."""


def add(parts: Any) -> None:
    """Declare the verb among the parts of ``bench``."""
    parser = parts.add_parser(
        "layer",
        help="whole forwards on GPUs, beside NCCL with grouped GEMMs and the floor",
        description="Whole forwards on GPUs, beside NCCL with grouped GEMMs and the floor.",
        epilog=DETAIL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", default="qwen3-30b", help=f"all, or some with commas: {', '.join(SHAPES)}"
    )
    parser.add_argument("--rows", default=ROWS, help=f"rows of each rank ({ROWS})")
    parser.add_argument(
        "--load-of",
        type=int,
        metavar="N",
        help="fewer experts, so that each rank holds and computes what one of N ranks would; no "
        "N-GPU figure, see below (the number of ranks: the whole layer)",
    )
    parser.add_argument("--format", default="bf16", choices=("bf16",), help="of weights and rows")
    parser.add_argument("--skew", type=float, default=0.0, help="of the routing (0: uniform)")
    parser.add_argument("--heap", default="cuda", choices=("cuda", "nvshmem"))
    parser.add_argument("--without", default="", choices=("", "fused"), help="leave one out")
    parser.add_argument("--rounds", type=int, default=30, help="counted, at least 30 (30)")
    parser.add_argument("--ranks", type=int, help="ranks to start if no launcher did (one a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, routing, weights (0)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="the report as JSON (- or none: here)"
    )
    parser.add_argument("--csv", metavar="FILE", help="a line for each contestant and row count")
    parser.add_argument("--plot", metavar="FILE", help="times over rows as a picture (matplotlib)")


def main(args: argparse.Namespace) -> int:
    """0 if all contestants gave the same answer; no speed is a failure."""
    names = _names(args.shape)
    rows = _numbers(args.rows)
    if args.rounds < 30:
        raise ValueError(f"--rounds must be at least 30, got {args.rounds}")
    if args.skew < 0:
        raise ValueError(f"--skew must be at least 0, got {args.skew}")
    _writable(args)

    def body(group: Group) -> int:
        of = group.size if args.load_of is None else args.load_of
        said = warning([shape(name, max_rows=1) for name in names], group.size, of)
        with contest.ready(group):
            report = _report(group, args) | {"load_of": of, "warning": said, "entries": []}
            for name in names:
                for entry in _entries(group, name, of, rows, args):
                    report["entries"].append(entry)
                    if group.rank == 0:
                        _keep(report, args)
        if group.rank == 0:
            _publish(report, args)
        return 0

    return on_ranks(args.ranks, contest.gpus(), body)


def _entries(
    group: Group, name: str, of: int, rows: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One shape at every number of rows, with the same weights."""

    def for_rows(most: int) -> MoEConfig:
        whole = shape(name, max_rows=most, heap=args.heap, stall_s=20.0, open_s=120.0)
        return share(whole, group.size, of)

    config = for_rows(max(rows))
    with group.guarded("see whether it fits", LIMIT_S):
        contest.check_memory(config, group.size)
        weights = contest.weights(config, group, args.seed)
    for n in rows:
        at = for_rows(n)
        drawn = Drawn.make(at, group, n, skew=args.skew, seed=args.seed)
        entry: Entry = contest.run(at, group, weights, drawn, args.rounds, (args.without,))
        found = floor(at, group.size, n)
        if group.rank == 0 and args.json != "-":
            us = {who: round(times["median"], 1) for who, times in entry.us.items()}
            print(f"{at.name} {n} rows: floor {found.us:.0f}, {us}", flush=True)
        yield {
            "shape": at.name,
            "experts": at.experts,
            "rows": n,
            "floor_us": round(found.us, 1),
            "bound": found.bound,
            "us": entry.us,
            "verbs_us": entry.verbs,
            "apart": entry.apart,
            "busiest": entry.busiest,
            "memory": entry.memory,
        }


def _report(group: Group, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "ranks": group.size,
        "format": args.format,
        "heap": args.heap,
        "skew": args.skew,
        "rounds": args.rounds,
    }


def _keep(report: dict[str, Any], args: argparse.Namespace) -> None:
    """After each entry: whoever is ended by a limit on time keeps what was measured."""
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.csv:
        Path(args.csv).write_text("\n".join(lines_of(report)) + "\n")


def _publish(report: dict[str, Any], args: argparse.Namespace) -> None:
    _keep(report, args)
    if args.json == "-":
        show_json(report)
    else:
        print_tables(report)
    if args.plot:
        plot(report, Path(args.plot))


def _writable(args: argparse.Namespace) -> None:
    """Before anything is measured, not after."""
    for name in ("json", "csv", "plot"):
        path = getattr(args, name)
        if path not in (None, "-") and not Path(path).parent.is_dir():
            raise ValueError(f"--{name} must lie in a folder that exists, got {path!r}")
    if args.plot and find_spec("matplotlib") is None:
        raise EpmoeError("--plot needs matplotlib: pip install matplotlib")


def _names(text: str) -> list[str]:
    if text == "all":
        return list(SHAPES)
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"--shape must name {', '.join(SHAPES)}, got {name!r}")
    return names


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"--rows must be numbers above 0 with commas between, got {text!r}")
    return [int(part) for part in text.split(",")]
