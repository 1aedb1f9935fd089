"""Dispatch and combine alone, by epmoe's verbs and by gloo, in one run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from epmoe.cli.gloo import LIMIT_S, Gloo
from epmoe.comm.group import Group
from epmoe.comm.words import Y
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.formats import DTYPE
from epmoe.kernels.host import HostOps
from epmoe.kernels.ops import forward_head
from epmoe.runtime import Runtime

EPMOE, EPMOE_MOVED, GLOO, GLOO_MOVED = "epmoe", "epmoe, rows moved", "gloo", "gloo, rows moved"
TIMED = ("stage, C", "wait C, plan", "pull", "push, Y", "wait Y", "reduce")


@dataclass(slots=True)
class Times:
    """Seconds of the slowest rank, round by round."""

    rounds: list[float] = field(default_factory=list)

    def described(self) -> dict[str, float]:
        """Median and the tenth and ninetieth percentile, in microseconds."""
        tenths = statistics.quantiles(self.rounds, n=10)
        return {
            "median": 1e6 * statistics.median(self.rounds),
            "p10": 1e6 * tenths[0],
            "p90": 1e6 * tenths[-1],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The same on every rank.  ``verbs`` are medians in microseconds over rounds and ranks;
    ``away_bytes`` of ``payload_bytes`` go to other ranks, on average over the ranks."""

    shape: dict[str, Any]
    times: dict[str, Times]
    verbs: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """epmoe's median over gloo's: for the whole, and for the moving of rows alone."""
        us = {name: times.described()["median"] for name, times in self.times.items()}
        return {"whole": us[EPMOE] / us[GLOO], "rows moved": us[EPMOE_MOVED] / us[GLOO_MOVED]}


class Epmoe:
    """A round without its ffn: the rows that were pulled are pushed back as they are."""

    def __init__(self, config: MoEConfig, group: Group) -> None:
        self._config, self._runtime = config, Runtime.open([config], group)
        self._ops = HostOps(
            config,
            self._runtime.heap,
            self._runtime.placed,
            layer=0,
            lane=0,
            words=self._runtime.host_words(0),
            weights={},
            describe=self._runtime.describe,
        )
        self._runtime.views.append(self._ops.close)
        self.verbs: dict[str, list[float]] = {verb: [] for verb in TIMED}
        self.moved: list[float] = []

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every row back from each of its choices, weighted and summed."""
        ops, config, clock = self._ops, self._config, time.perf_counter
        marks = [clock()]
        with self._runtime.turn(0) as turn:
            round = turn.round
            head = forward_head(config.max_rows)
            ops.stage(x, ids, weights, head, round)
            marks.append(clock())
            plan = ops.wait_plan(round, LIMIT_S)
            marks.append(clock())
            records, _ = ops.pull(plan)
            marks.append(clock())
            y = records.view(DTYPE[config.dtype])[:, : config.hidden]
            ops.push(y, plan, round)
            marks.append(clock())
            self._runtime.host_words(0).wait(Y, round, LIMIT_S)  # reduce then finds all of them
            marks.append(clock())
            out = ops.reduce(ids, weights, None, round, LIMIT_S)
            marks.append(clock())
            turn.round += 1
        self.moved.append(marks[-2] - marks[0])
        for verb, (begun, done) in zip(TIMED, pairwise(marks), strict=True):
            self.verbs[verb].append(done - begun)
        return out

    def close(self) -> None:
        """Leave and unmap."""
        self._runtime.close()


def run(
    group: Group,
    config: MoEConfig,
    *,
    rows: int,
    rounds: int,
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> Report:
    """Collective: contestants take turns, ``rounds`` each.  ``EpmoeError`` if results differ."""
    x, ids, weights = _drawn(config, rows, 1000 * seed + group.rank)
    epmoe, gloo = Epmoe(config, group), Gloo(config, group, rows)
    try:
        bare = gloo.bare(x, ids)
        ours, theirs = epmoe(x, ids, weights), gloo(x, ids, weights)
        with group.guarded("compare the results", LIMIT_S):
            if not torch.equal(ours, theirs):
                raise EpmoeError(f"rank {group.rank}: epmoe and gloo give different results")
        contestants: dict[str, Callable[[], Tensor]] = {
            EPMOE: lambda: epmoe(x, ids, weights),
            GLOO: lambda: gloo(x, ids, weights),
            GLOO_MOVED: bare,
        }
        epmoe.moved.clear()
        mine: dict[str, list[float]] = {name: [] for name in contestants}
        order = list(contestants)
        for round in range(rounds):
            for name in order:
                group.allgather(b"", what="start", limit_s=LIMIT_S)
                started = time.perf_counter()
                contestants[name]()
                mine[name].append(time.perf_counter() - started)
            order.append(order.pop(0))
            tell(round + 1)
        mine[EPMOE_MOVED] = epmoe.moved
        # The first was for the comparison.
        warm, verbs = rounds // 10, {}
        for verb, times in epmoe.verbs.items():
            verbs[verb] = statistics.median(times[1 + warm :])
        owner = ids // config.slots_per_rank(group.size)
        raw = json.dumps([mine, verbs, int((owner != group.rank).sum())]).encode()
        said = [json.loads(one) for one in group.allgather(raw, what="times", limit_s=LIMIT_S)]
    finally:
        epmoe.close()
        gloo.close()
    slowest = {
        name: Times([max(t) for t in zip(*(one[0][name] for one in said), strict=True)][warm:])
        for name in (EPMOE, GLOO, EPMOE_MOVED, GLOO_MOVED)
    }
    each_way = config.hidden * config.itemsize
    return Report(
        {
            "ranks": group.size,
            "rows": rows,
            "hidden": config.hidden,
            "dtype": config.dtype,
            "experts": config.experts,
            "choices": config.choices,
            "rounds": rounds - warm,
            "payload_bytes": ids.numel() * each_way,
            "away_bytes": sum(one[2] for one in said) * each_way // group.size,
        },
        slowest,
        {verb: 1e6 * statistics.median(one[1][verb] for one in said) for verb in verbs},
    )


def _drawn(config: MoEConfig, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, config.hidden, generator=g).to(DTYPE[config.dtype])
    ids = torch.rand(rows, config.experts, generator=g).topk(config.choices).indices
    return x, ids, torch.rand(rows, config.choices, generator=g)
