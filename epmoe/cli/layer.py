"""epmoe bench layer: whole forwards on GPUs, beside peers of the same run and the floor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from epmoe.cli import contest
from epmoe.cli.contest import Drawn, Entry
from epmoe.cli.machine import machine
from epmoe.cli.race import LIMIT_S, RULES
from epmoe.cli.ranks import on_ranks
from epmoe.cli.roofline import floor
from epmoe.cli.tables import show, show_json
from epmoe.comm.group import Group
from epmoe.shapes import SHAPES, shape

ROWS = "16,128,512,2048,8192"
DETAIL = f"""\
What is timed, on every rank: one whole forward, from the caller's rows, ids and router weights to
the caller's output.
  split             epmoe: stage, pull, two grouped GEMMs, push, reduce as separate launches
  fused             epmoe: the same in one launch, where this version has it
  nccl, grouped_mm  torch: sort, all_to_all_single of counts and of rows, sort by expert,
                    torch._grouped_mm, activation, torch._grouped_mm, all of it back, weighted sum
{RULES}

The floor is the longest of arithmetic, memory and NVLink time for uniform routing, with each row
sent once to each rank, at the best rates measured on H200s, plus 12 us.  --skew S draws experts
with weights 1 / n^S (0 is uniform); the floor stays that of uniform routing.
Every rank holds experts / ranks of the experts: a run on 2 or 4 GPUs is not the 8-GPU layer."""


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
        "--shape", default="qwen3-30b", help=f"one or more, with commas: {', '.join(SHAPES)}"
    )
    parser.add_argument("--rows", default=ROWS, help=f"rows of each rank ({ROWS})")
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

    def body(group: Group) -> int:
        report = _report(group, args)
        with contest.ready(group):
            for name in names:
                for entry in _entries(group, name, rows, args):
                    report["entries"].append(entry)
        if group.rank == 0:
            _publish(report, args)
        return 0

    return on_ranks(args.ranks, contest.gpus(), body)


def _entries(
    group: Group, name: str, rows: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One shape at every number of rows, with the same weights."""
    config = shape(name, max_rows=max(rows), heap=args.heap, stall_s=20.0, open_s=120.0)
    with group.guarded("see whether it fits", LIMIT_S):
        contest.check_memory(config, group.size)
        weights = contest.weights(config, group, args.seed)
    for n in rows:
        at = shape(name, max_rows=n, heap=args.heap, stall_s=20.0, open_s=120.0)
        drawn = Drawn.make(at, group, n, skew=args.skew, seed=args.seed)
        entry: Entry = contest.run(at, group, weights, drawn, args.rounds, (args.without,))
        found = floor(at, group.size, n)
        if group.rank == 0 and args.json != "-":
            us = {who: round(times["median"], 1) for who, times in entry.us.items()}
            print(f"{name} {n} rows: floor {found.us:.0f}, {us}", flush=True)
        yield {
            "shape": name,
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
        "entries": [],
    }


def _publish(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json == "-":
        show_json(report)
    else:
        print_tables(report)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.csv:
        Path(args.csv).write_text("\n".join(lines_of(report)) + "\n")
    if args.plot:
        plot(report, Path(args.plot))


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as CSV: one line for each shape, number of rows and contestant."""
    yield "shape,rows,ranks,format,skew,contestant,median_us,p10_us,p90_us,floor_us"
    for e in report["entries"]:
        for who, us in e["us"].items():
            front = (e["shape"], e["rows"], report["ranks"], report["format"], report["skew"])
            name = who.replace(",", " +")
            yield ",".join(
                map(str, (*front, name, us["median"], us["p10"], us["p90"], e["floor_us"]))
            )


def print_tables(report: Mapping[str, Any]) -> None:
    """What it ran on; times beside floor and peer; where the split path's time goes."""
    print(f"  on {report['ranks']} x {report['gpu']}, {', '.join(report['machine'].values())}")
    contestants = list(dict.fromkeys(who for e in report["entries"] for who in e["us"]))
    ours = [who for who in contestants if who in contest.OURS]
    peers = [who for who in contestants if who not in contest.OURS]

    def cells(e: Mapping[str, Any]) -> tuple[str, ...]:
        median = {who: us["median"] for who, us in e["us"].items()}
        best = min(median[who] for who in ours)
        rival = min((median[who] for who in peers), default=float("nan"))
        return (
            e["shape"],
            f"{e['rows']:,}",
            f"{e['floor_us']:,.0f}",
            *(f"{median[who]:,.0f}" for who in contestants),
            f"{best / rival:.2f}",
            f"{best / e['floor_us']:.2f}",
        )

    show(
        f"one forward, {report['format']}, skew {report['skew']}, us, slowest rank, median of "
        f"{report['rounds']}",
        ("shape", ">rows", ">floor", *(f">{who}" for who in contestants), ">to peer", ">to floor"),
        [cells(e) for e in report["entries"]],
    )
    verbs = list(report["entries"][0]["verbs_us"])
    show(
        "split, verb by verb, us",
        ("shape", ">rows", *(f">{verb}" for verb in verbs)),
        [
            (e["shape"], f"{e['rows']:,}", *(f"{e['verbs_us'][v]['median']:,.0f}" for v in verbs))
            for e in report["entries"]
        ],
    )


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Times over rows per rank, both logarithmic; one field for each shape."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(e["shape"] for e in report["entries"]))
    figure, fields = pyplot.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False)
    for field, name in zip(fields[0], names, strict=True):
        entries = [e for e in report["entries"] if e["shape"] == name]
        rows = [e["rows"] for e in entries]
        for who in entries[0]["us"]:
            field.plot(rows, [e["us"][who]["median"] for e in entries], "o-", label=who)
        field.plot(rows, [e["floor_us"] for e in entries], "k:", label="floor")
        field.set(xscale="log", yscale="log", title=name, xlabel="rows per rank", ylabel="us")
        field.legend(fontsize="small")
    figure.suptitle(f"{report['ranks']} x {report['gpu']}, {report['format']}, {report['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"--shape must name {', '.join(SHAPES)}, got {name!r}")
    return names


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"--rows must be numbers above 0 with commas between, got {text!r}")
    return [int(part) for part in text.split(",")]
