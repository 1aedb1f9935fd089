"""The fused round by cut and by CTAs that pull: where the figures of kernels/sizes.py come from.

    launch/torchrun.sh 4 python3 benchmarks/cuts.py qwen3-30b:128:SOME,SOME@32 dsv3:512

A case is shape:rows of each rank:ways.  A way is ``auto`` (what the round chooses), ``split`` (six
launches) or the name of a cut, with ``@N`` for N CTAs that pull; left out: split,auto.  Each rank
has the load of one of 8 (``--load-of``).  Ways of a case take turns, cold, started together
(cli/race.py); they must give the same bits, or nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from epmoe import MoE, MoEConfig
from epmoe.cli.contest import Drawn, gpus, ready, weights
from epmoe.cli.race import LIMIT_S, Race, described
from epmoe.cli.ranks import on_ranks
from epmoe.cli.share import share
from epmoe.comm.group import Group
from epmoe.comm.layout import layout
from epmoe.kernels import sizes
from epmoe.kernels.cuda import CudaOps, laid_out
from epmoe.kernels.cuda import compiled as split_kernels
from epmoe.kernels.fused import FusedOps, compiled
from epmoe.kernels.ops import forward_head
from epmoe.shapes import shape

CUTS = {name: getattr(sizes, name) for name in ("FEW", "SOME", "MANY")}


@dataclass(frozen=True)
class Case:
    """One line of the result."""

    shape: str
    rows: int
    ways: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Case:
        """``shape:rows[:ways]``; ``ValueError`` if it is not."""
        parts = text.split(":")
        if len(parts) not in (2, 3) or not parts[1].isdigit():
            raise ValueError(f"a case must be shape:rows[:ways], got {text!r}")
        ways = tuple((parts[2] if len(parts) == 3 else "split,auto").split(","))
        for way in ways:
            how(way)
        return cls(parts[0], int(parts[1]), ways)

    def config(self, ranks: int, of: int) -> MoEConfig:
        """The layer that ``ranks`` ranks run."""
        return share(shape(self.shape, max_rows=self.rows, heap="cuda", stall_s=10.0), ranks, of)


def how(way: str) -> dict[str, Any] | None:
    """What FusedOps is told; None for the split round."""
    name, _, pullers = way.partition("@")
    if name not in CUTS and name not in ("auto", "split"):
        raise ValueError(f"a way must be auto, split or one of {', '.join(CUTS)}, got {way!r}")
    if name == "split":
        return None
    known: dict[str, Any] = {"cut": CUTS[name]} if name in CUTS else {}
    return known | ({"pullers": int(pullers)} if pullers else {})


def build(config: MoEConfig, ranks: int, way: str) -> None:
    """Fill the file cache: ranks that compile one after the other would take minutes."""
    placed, told = layout([config], ranks), how(way)
    if told is None:
        split_kernels(config, ranks, placed, 0, 0)
        return
    among = (told["cut"],) if "cut" in told else sizes.cuts(config, ranks)
    for cut in among:
        compiled(config, ranks, placed, 0, 0, **told | {"cut": cut}, among=among)


def timed(group: Group, race: Race, case: Case, of: int, rounds: int) -> dict[str, Any]:
    """Collective: one case."""
    config = case.config(group.size, of)
    held = laid_out(config, weights(config, group, 0))
    drawn = Drawn.make(config, group, case.rows, skew=0.0, seed=0)
    slots, head = drawn.ids.to(torch.int32), forward_head(case.rows)
    with MoE.open(config, group) as moe:
        runtime = moe._runtime
        words: Any = runtime.lanes[0].words
        pools: dict[object, torch.Tensor] = {}
        runs: dict[str, Callable[[], object]] = {}
        outs = {way: torch.empty_like(drawn.x) for way in case.ways}
        for way, out in outs.items():
            told, where = how(way), {"layer": 0, "lane": 0, "words": words}
            ops: CudaOps | FusedOps
            if told is None:
                ops = CudaOps(config, runtime.placed, **where)
            else:
                ops = FusedOps(config, runtime.placed, pools=pools, **where, **told)
            ops.adopt(held)
            runs[way] = partial(ops.round, drawn.x, slots, drawn.weights, head, out)
            runs[way]()
        torch.cuda.synchronize()
        words.check()
        first = outs[case.ways[0]]
        same = all(torch.equal(first, out) for out in outs.values())
        said = group.allgather(bytes([same]), what="same bits", limit_s=LIMIT_S)
        us = race.run(runs, rounds) if all(one == b"\x01" for one in said) else {}
        words.check()
    return {
        "shape": case.shape,
        "rows": case.rows,
        "same_bits": bool(us),
        "us": {way: described(times) for way, times in us.items()},
    }


def main() -> int:
    """0 if all ways of every case gave the same bits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="+", type=Case.parse)
    parser.add_argument("--load-of", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, help="ranks to start if no launcher did (one a GPU)")
    parser.add_argument("--build", action="store_true", help="fill the cache for --ranks; no GPU")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    def body(group: Group) -> int:
        found = []
        with ready(group):
            race = Race(group)
            for case in asked.cases:
                found.append(timed(group, race, case, asked.load_of, asked.rounds))
                torch.cuda.empty_cache()
                if group.rank == 0:
                    one = found[-1]
                    us = {way: tenths["median"] for way, tenths in one["us"].items()}
                    print(one["shape"], one["rows"], us or "DIFFERENT BITS", flush=True)
        if group.rank == 0 and asked.json:
            report = {"ranks": group.size, "load_of": asked.load_of, "entries": found}
            asked.json.write_text(json.dumps(report, indent=1))
        return 0 if all(one["same_bits"] for one in found) else 1

    if not asked.build:
        return on_ranks(asked.ranks, gpus(), body)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [
            pool.submit(build, case.config(asked.ranks, asked.load_of), asked.ranks, way)
            for case in asked.cases
            for way in case.ways
        ]
        for job in jobs:
            job.result()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
