"""epmoe doctor: what this machine can do, and why not."""

from __future__ import annotations

import argparse
import os
from typing import Any

from epmoe.cli import probes
from epmoe.cli.ranks import first_rank
from epmoe.cli.tables import show, show_json, size
from epmoe.comm.layout import layout, table
from epmoe.config import DTYPES, FORMATS, HEAPS, MoEConfig
from epmoe.kernels.sizes import private_bytes, refusal
from epmoe.shapes import SHAPES, shape

DETAIL = """\
Never fails for what it finds: a question that cannot be answered is answered by the reason.  The
GPU driver is asked by another process, which may break or hang.
Exit status 0 if the heap named by --heap (without it: any heap) can be had here, 1 if not.

--layout prints where everything lies in a slab, by the function that every rank and every kernel
takes its offsets from:   epmoe doctor --layout dsv3 --ranks 8 --max-rows 4096
                          epmoe doctor --layout --experts 32 --choices 4 --hidden 1024"""
FIELDS = ("experts", "choices", "hidden", "inner", "max_rows", "slots", "lanes", "dtype", "format")
ROWS = 4096


def add(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine can do, and why not",
        description="What this machine can do, and why not.",
        epilog=DETAIL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--heap", choices=HEAPS, help="the heap that the exit status is about")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")
    slab = parser.add_argument_group("the slab's table instead")
    slab.add_argument(
        "--layout", nargs="?", const="", metavar="SHAPE", help=f"of {', '.join(SHAPES)}, or of:"
    )
    slab.add_argument("--ranks", type=int, default=8, help="ranks (8)")
    slab.add_argument("--max-rows", type=int, default=ROWS, help=f"of a rank and round ({ROWS})")
    for name in ("experts", "choices", "hidden", "inner", "slots", "lanes"):
        slab.add_argument(f"--{name}", type=int, help=f"the config's {name}")
    slab.add_argument("--dtype", choices=DTYPES, help="the config's dtype")
    slab.add_argument("--format", choices=FORMATS, help="the config's format")


def main(args: argparse.Namespace) -> int:
    """The exit status."""
    if not first_rank(os.environ):
        return 0
    if args.layout is not None:
        return show_layout(config_of(args), args.ranks, as_json=args.json)
    found = probes.everything()
    if args.json:
        show_json(found)
    else:
        print_tables(found)
    heaps = found["heaps"]
    wanted = [args.heap] if args.heap else list(heaps)
    return 0 if any(not heaps[heap] for heap in wanted) else 1


def config_of(args: argparse.Namespace) -> MoEConfig:
    """The named shape, completed or replaced by the flags."""
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.layout:
        return shape(args.layout, **given)
    if missing := [name for name in ("experts", "choices", "hidden") if name not in given]:
        raise ValueError(f"--layout needs a shape's name or --{', --'.join(missing)}")
    return MoEConfig(**{"inner": given["hidden"]} | given)


def show_layout(config: MoEConfig, ranks: int, *, as_json: bool) -> int:
    """Every region of the slab, its sum, and the sum over all ranks."""
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}")
    config.slots_per_rank(ranks)  # refuses what open would refuse
    regions, total = table([config], ranks), layout([config], ranks).total
    private = private_bytes(config, ranks) if refusal(config, ranks) is None else None
    if as_json:
        names = ("region", "at", "shape", "bytes")
        show_json(
            {
                "config": config.described(),
                "ranks": ranks,
                "regions": [dict(zip(names, region, strict=True)) for region in regions],
                "bytes_per_rank": total,
                "bytes_all_ranks": total * ranks,
                "private_bytes_on_gpu": private,
            }
        )
        return 0
    show(
        f"slab of {config.name}: hidden {config.hidden}, top-{config.choices} of {config.experts}, "
        f"{config.max_rows} rows of each of {ranks} ranks",
        ("region", ">at", "shape", ">bytes", ""),
        [(name, f"{at:,}", text, f"{n:,}", size(n)) for name, at, text, n in regions],
    )
    free = probes.asked(probes.free_memory)
    print(
        f"  {size(total)} per rank, {size(total * ranks)} for all; here {free} of memory are free"
    )
    if private is not None:
        print(f"  on a GPU a rank keeps {size(private)} beside it, whatever is routed")
    return 0


def print_tables(found: dict[str, Any]) -> None:
    """One table for each section, the heaps last."""
    for section, facts in found.items():
        if section != "heaps":
            show(section, ("", ""), [(name, _text(fact)) for name, fact in facts.items()])
    show(
        "heaps",
        ("heap", "can be had", "why not"),
        [(heap, "no" if reason else "yes", reason) for heap, reason in found["heaps"].items()],
    )


def _text(fact: Any) -> str:
    return "\n".join(map(str, fact)) if isinstance(fact, list) else str(fact)
