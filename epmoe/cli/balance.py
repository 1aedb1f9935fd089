"""epmoe balance: what a better placement would bring for given loads, and what it would move."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epmoe.cli import heatmap, loadfile
from epmoe.cli.tables import show, show_json, size
from epmoe.sched.balance import loads_by_rank, max_over_mean, plan
from epmoe.sched.moves import bytes_RR, moves
from epmoe.sched.placement import Placement
from epmoe.sched.published import check_shape, published
from epmoe.sched.search import Floats

DETAIL = f"""\
{loadfile.FORMATS}

The placement in force is the file's, or one slot after the other if it has none.  Compared with it
are the published DeepSeek planner, which starts from nothing, and epmoe's, which starts from the
placement in force (--fresh: from nothing) and stops where published ends, or at --enough.  max/mean
is the load of the fullest rank over that of the mean rank: a round waits for the fullest.  Wire is
what crosses from rank to rank: slots that move, times --slot-bytes; busiest is the most that one
rank sends or gets.
Exit status 0, or 2 if the loads cannot be read or planned."""


def add(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "balance",
        help="plan a placement of experts for given loads and show what it would bring",
        description=__doc__,
        epilog=DETAIL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("loads", metavar="LOADS", help="csv, npz, npy, json, or - for stdin")
    parser.add_argument("--ranks", type=int, help="ranks (the file's, if it says)")
    parser.add_argument("--slots", type=int, help="slots of all ranks (the file's, or the experts)")
    parser.add_argument("--enough", type=float, help="stop moving at this max/mean (published's)")
    parser.add_argument("--fresh", action="store_true", help="plan as if nothing were in force")
    parser.add_argument("--groups", type=int, default=1, help="expert groups, if hierarchical (1)")
    parser.add_argument("--hosts", type=int, default=1, help="hosts, if hierarchical (1)")
    parser.add_argument("--slot-bytes", type=int, default=0, help="bytes of one expert's tensors")
    parser.add_argument("--layers", action="store_true", help="a line for every layer too")
    parser.add_argument("--plot", metavar="PNG", help="write a heat map of the load of every rank")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way to place the experts of all layers, seen from the placement in force."""

    name: str
    placements: tuple[Placement, ...]
    ratios: tuple[float, ...]  # max/mean of every layer
    moved: tuple[int, ...]  # slots that change, by layer
    wire_bytes: int  # from rank to rank, all layers
    busiest_bytes: int  # the most that one rank sends or receives
    seconds: float  # planning

    @property
    def most_replicas(self) -> int:
        """Of any expert of any layer."""
        return max(int(placement.counts_E.max()) for placement in self.placements)


def main(args: argparse.Namespace) -> int:
    """0, or 2 if the loads cannot be read or planned."""
    try:
        given = loadfile.read(args.loads)
        now = in_force(given, args.ranks, args.slots)
        outcomes = compare(
            given.loads_NE,
            now,
            enough=args.enough,
            fresh=args.fresh,
            groups=args.groups,
            hosts=args.hosts,
            slot_bytes=args.slot_bytes,
        )
        if args.plot:
            draw(args.plot, given.loads_NE, outcomes)
    except (ValueError, OSError) as error:
        print(f"epmoe balance: {error}", file=sys.stderr)
        return 2
    if args.json:
        show_json(report(outcomes))
    else:
        print_tables(outcomes, args)
    return 0


def in_force(
    given: loadfile.LoadFile, ranks: int | None, slots: int | None
) -> tuple[Placement, ...]:
    """The file's placement, or the linear one; what the command line says must agree with it."""
    layers, experts = len(given.loads_NE), given.loads_NE.shape[1]
    if ranks is None:
        if given.ranks is None:
            raise ValueError("--ranks is needed: the file does not say how many there are")
        ranks = given.ranks
    if given.expert_NS is None:
        slots = experts if slots is None else slots
        check_shape(experts, slots, ranks)
        return (Placement.linear(experts, slots, ranks),) * layers
    if slots not in (None, given.expert_NS.shape[1]):
        raise ValueError(
            f"--slots must be as many as in the file's placement ({given.expert_NS.shape[1]}), "
            f"got {slots}"
        )
    return tuple(Placement.of(row, experts=experts, ranks=ranks) for row in given.expert_NS)


def compare(
    loads_NE: Floats,
    now: tuple[Placement, ...],
    *,
    enough: float | None = None,
    fresh: bool = False,
    groups: int = 1,
    hosts: int = 1,
    slot_bytes: int = 0,
) -> list[Outcome]:
    """In force, published and ours, in this order."""
    shape: dict[str, int] = {
        "slots": now[0].slots,
        "ranks": now[0].ranks,
        "groups": groups,
        "hosts": hosts,
    }
    start = time.perf_counter()
    theirs = published(loads_NE, **shape)
    middle = time.perf_counter()
    ours = plan(loads_NE, current=None if fresh else now, enough=enough, **shape)
    end = time.perf_counter()
    return [
        outcome("in force", loads_NE, now, now, slot_bytes, 0.0),
        outcome("published", loads_NE, now, theirs, slot_bytes, middle - start),
        outcome("epmoe", loads_NE, now, ours, slot_bytes, end - middle),
    ]


def outcome(
    name: str,
    loads_NE: Floats,
    now: Sequence[Placement],
    then: tuple[Placement, ...],
    slot_bytes: int,
    seconds: float,
) -> Outcome:
    """What it means to go from ``now`` to ``then``."""
    found = [moves(old, new) for old, new in zip(now, then, strict=True)]
    wire_RR = bytes_RR(itertools.chain(*found), then[0], slot_bytes)
    wire_RR.fill_diagonal_(0)  # copies inside a rank
    return Outcome(
        name=name,
        placements=then,
        ratios=tuple(max_over_mean(loads_NE, then)),
        moved=tuple(map(len, found)),
        wire_bytes=int(wire_RR.sum()),
        busiest_bytes=int(max(wire_RR.sum(0).max(), wire_RR.sum(1).max())),
        seconds=seconds,
    )


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What ``--json`` prints."""
    first = outcomes[0].placements[0]
    return {
        "layers": len(outcomes[0].placements),
        "experts": first.experts,
        "slots": first.slots,
        "ranks": first.ranks,
        "placements": {
            one.name: {
                "max_over_mean": list(one.ratios),
                "moved_slots": list(one.moved),
                "wire_bytes": one.wire_bytes,
                "busiest_bytes": one.busiest_bytes,
                "most_replicas": one.most_replicas,
                "seconds": one.seconds,
                "placement": [list(placement.expert_of_S) for placement in one.placements],
            }
            for one in outcomes
        },
    }


def print_tables(outcomes: Sequence[Outcome], args: argparse.Namespace) -> None:
    """The summary, and with ``--layers`` a line for every layer."""
    first, layers = outcomes[0].placements[0], len(outcomes[0].placements)
    show(
        f"{layers} layer{'s' * (layers > 1)} of {first.experts} experts in {first.slots} slots "
        f"on {first.ranks} ranks",
        ("", ">max/mean", ">worst layer", ">slots moved", ">wire", ">busiest", ">replicas", ">ms"),
        [
            (
                one.name,
                f"{sum(one.ratios) / layers:.4f}",
                f"{max(one.ratios):.4f}",
                f"{sum(one.moved)} of {layers * first.slots}",
                size(one.wire_bytes) if args.slot_bytes else "-",
                size(one.busiest_bytes) if args.slot_bytes else "-",
                f"<= {one.most_replicas}",
                f"{one.seconds * 1e3:.0f}" if one.seconds else "",
            )
            for one in outcomes
        ],
    )
    if args.layers:
        show(
            "max/mean, and slots moved, of every layer",
            (">layer", *(f">{one.name}" for one in outcomes)),
            [
                (str(n), *(f"{one.ratios[n]:.4f} {one.moved[n]:6d}" for one in outcomes))
                for n in range(layers)
            ],
        )
    if args.plot:
        print(f"heat map: {args.plot}")


def draw(path: str, loads_NE: Floats, outcomes: Sequence[Outcome]) -> None:
    """The load of every rank over the mean, before and after."""
    shares = {}
    for one in outcomes:
        loads_NR = loads_by_rank(loads_NE, one.placements)
        shares[one.name] = loads_NR / loads_NR.mean(1, keepdims=True)
    heatmap.write(path, shares)
