"""epmoe demo: rounds of skewed traffic, every result compared with the oracle."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from epmoe.cli import drift
from epmoe.cli.ranks import on_ranks
from epmoe.cli.tables import Steps, bar, show, show_json, size
from epmoe.cli.traffic import Batch, batch, configs, expected, slots_of, weights_of
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.moe import MoE

TOGETHER = 10  # forwards that are timed as one stretch, then checked
RANKS = 4
DETAIL = """\
Ranks: those of torchrun, mpirun or Slurm if one of them started this process, else --ranks of them
are forked here.  Every rank derives the batches of all ranks from the seed, so it can compute with
reference_moe what it must get back, and compares with torch.equal.  Layers of different kinds
(SwiGLU bf16; gpt-oss with biases; GEGLU fp32 weighted before FC2; ReLU^2 with a shared expert)
share one heap.  rows/s counts the rows of all ranks over the time that the slowest rank spent in
forwards; drawing and checking batches is outside of it.
Exit status 0 if every result was right, 1 if not."""


@dataclass(frozen=True, slots=True)
class Report:
    """What all ranks saw together; ``wrong`` counts results that differ in at least one bit."""

    ranks: int
    layers: int
    seed: int
    forwards: int
    rounds: int
    results: int  # one for each forward and rank
    wrong: int
    rows: int
    seconds: float  # in forwards, on the slowest rank
    moved_bytes: int  # rows and results that went from one rank to another
    load: tuple[int, ...]  # rows that the experts of each rank computed

    @property
    def rows_per_s(self) -> float:
        """Rows of all ranks per second of the slowest rank."""
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Seen:
    """What one rank saw so far."""

    forwards: int = 0
    rounds: int = 0
    wrong: int = 0
    rows: int = 0
    seconds: float = 0.0
    moved_bytes: int = 0
    sent: tuple[int, ...] = ()  # choices of my rows, by the rank whose expert they went to

    def count(self, mine: Batch, config: MoEConfig, rank: int, ranks: int) -> None:
        """Add one forward of mine."""
        ids = mine.ids_R[rank]
        owner = ids[ids >= 0] // config.slots_per_rank(ranks)
        sent = torch.bincount(owner, minlength=ranks).tolist()
        away = sum(sent) - sent[rank]
        self.forwards += 1
        self.rounds += mine.chunks(config.max_rows).count
        self.rows += len(ids)
        self.moved_bytes += 2 * away * config.hidden * config.itemsize  # there and back
        self.sent = tuple(a + b for a, b in zip(self.sent or (0,) * ranks, sent, strict=True))


def add(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "demo",
        help="run a thousand rounds over several ranks and check every result",
        description=__doc__,
        epilog=DETAIL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=1000, help="at least so many (1000)")
    parser.add_argument("--ranks", type=int, help=f"ranks to start if no launcher did ({RANKS})")
    parser.add_argument("--layers", type=int, default=4, help="layers that share the heap (4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--drift", action="store_true", help="wandering hot experts, balanced live")


def main(args: argparse.Namespace) -> int:
    """0 if every result was right."""
    for name in ("rounds", "layers", "ranks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.drift:
        return drift.main(args)

    def body(group: Group) -> int:
        first = group.rank == 0
        with Steps("round", args.rounds, silent=not first or args.json) as steps:
            report = run(
                group, rounds=args.rounds, layers=args.layers, seed=args.seed, tell=steps.reach
            )
        if first:
            (print_json if args.json else print_table)(report)
        return int(report.wrong > 0)

    return on_ranks(args.ranks, RANKS, body)


def run(
    group: Group,
    *,
    rounds: int,
    layers: int,
    seed: int = 0,
    tell: Callable[[int, str], None] = lambda done, note: None,
) -> Report:
    """Collective: forwards until there were at least ``rounds`` rounds; the same report on all."""
    shapes, me, ranks = configs(layers, group.size), group.rank, group.size
    weights = [weights_of(config, seed + layer) for layer, config in enumerate(shapes)]
    moes = MoE.open_all(shapes, group)
    seen, everyone = Seen(), [Seen()]
    with moes[0]:
        for layer, moe in enumerate(moes):
            moe.load(**slots_of(weights[layer], shapes[layer], me, ranks))
        while seen.rounds < rounds:
            numbers = range(seen.forwards, seen.forwards + TOGETHER)
            sent = [batch(shapes, ranks, seed, number) for number in numbers]
            everyone = gather(group, seen)  # also the moment at which all ranks start together
            tell(seen.rounds, f"{sum(s.wrong for s in everyone)} wrong")
            started = time.perf_counter()
            got = [
                moes[b.layer](b.x_R[me], b.ids_R[me], b.weights_R[me], context=b.context)
                for b in sent
            ]
            seen.seconds += time.perf_counter() - started
            for b, y in zip(sent, got, strict=True):
                seen.count(b, shapes[b.layer], me, ranks)
                want = expected(b, shapes[b.layer], weights[b.layer], me)
                seen.wrong += not torch.equal(y, want)
        everyone = gather(group, seen)
    tell(seen.rounds, f"{sum(s.wrong for s in everyone)} wrong")
    return Report(
        ranks=ranks,
        layers=layers,
        seed=seed,
        forwards=seen.forwards,
        rounds=seen.rounds,
        results=sum(s.forwards for s in everyone),
        wrong=sum(s.wrong for s in everyone),
        rows=sum(s.rows for s in everyone),
        seconds=max(s.seconds for s in everyone),
        moved_bytes=sum(s.moved_bytes for s in everyone),
        load=tuple(sum(column) for column in zip(*(s.sent for s in everyone), strict=True)),
    )


def gather(group: Group, seen: Seen) -> list[Seen]:
    """What every rank saw, by rank."""
    said = group.allgather(json.dumps(asdict(seen)).encode(), what="demo's counts", limit_s=60.0)
    return [Seen(**json.loads(one)) for one in said]


def print_json(report: Report) -> None:
    """The report's fields and its rate."""
    show_json(asdict(report) | {"rows_per_s": report.rows_per_s})


def print_table(report: Report) -> None:
    """What happened, then the load of each rank as a bar."""
    facts = [
        ("ranks", f"{report.ranks}"),
        ("rounds", f"{report.rounds} in {report.forwards} forwards of {report.layers} layers"),
        ("results checked", f"{report.results} (torch.equal with reference_moe)"),
        ("wrong", f"{report.wrong}"),
        ("rows/s", f"{report.rows_per_s:,.0f}"),
        ("moved between ranks", size(report.moved_bytes)),
    ]
    show("epmoe demo", ("", ""), facts)
    most, all_rows = max(report.load), sum(report.load)
    loads = [
        (f"{rank}", f"{rows:,}", f"{rows / max(all_rows, 1):.0%}", bar(rows, most))
        for rank, rows in enumerate(report.load)
    ]
    show("load per rank", (">rank", ">expert rows", ">share", ""), loads)
