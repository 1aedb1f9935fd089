"""Dispatch and combine alone: epmoe's verbs, and what a user of torch.distributed writes for it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.formats import DTYPE
from epmoe.kernels.host import HostOps
from epmoe.kernels.ops import VERBS
from epmoe.runtime import Runtime

LIMIT_S = 60.0
NAMES = ("epmoe", "gloo all-to-all", "gloo, whole")


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
    """The same on every rank.  ``verbs`` are medians in microseconds over rounds and ranks."""

    shape: dict[str, Any]
    times: dict[str, Times]
    verbs: dict[str, float]

    @property
    def ratio(self) -> float:
        """epmoe's median over that of gloo's bare all-to-all."""
        ours, theirs = (self.times[name].described()["median"] for name in NAMES[:2])
        return ours / theirs


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
            words=self._runtime.lanes[0].words,
            weights={},
            describe=self._runtime.describe,
        )
        self._runtime.views.append(self._ops.close)
        self.verbs: dict[str, list[float]] = {}

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every row back from each of its choices, weighted and summed."""
        ops, config = self._ops, self._config
        with self._runtime.turn(0) as turn:
            round = turn.round
            head = (0, VERBS.index("forward"), config.max_rows, 0, 1, 0, 0, 0)
            with self._clock("stage, C"):
                ops.stage(x, ids, weights, head, round)
            with self._clock("wait C, plan"):
                plan = ops.wait_plan(round, LIMIT_S)
            with self._clock("pull"):
                records, _ = ops.pull(plan)
            y = records.view(DTYPE[config.dtype])[:, : config.hidden]
            with self._clock("push, Y"):
                ops.push(y, plan, round)
            with self._clock("wait Y, reduce"):
                out = ops.reduce(ids, weights, None, round, LIMIT_S)
            turn.round += 1
        return out

    @contextmanager
    def _clock(self, verb: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.verbs.setdefault(verb, []).append(time.perf_counter() - started)

    def close(self) -> None:
        """Leave and unmap."""
        self._runtime.close()


class Gloo:
    """The same by all_to_all_single, as its user has to: sort, counts, rows, results, sum."""

    def __init__(self, config: MoEConfig, group: Group) -> None:
        self._ranks, self._each = group.size, config.slots_per_rank(group.size)
        serve = group.rank == 0
        store = _store(0, serve=True) if serve else None
        port = str(store.port).encode() if store else b""
        port = group.allgather(port, what="port of the store", limit_s=LIMIT_S)[0]
        store = store or _store(int(port), serve=False)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)

    def sort(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells by expert, the rows in that order, and how many go to each expert."""
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        return order, x[order // ids.shape[1]], torch.bincount(flat, minlength=self._experts)

    @property
    def _experts(self) -> int:
        return self._ranks * self._each

    def counts(self, counts: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        to, fro = (c.view(self._ranks, self._each).sum(1).tolist() for c in (counts, theirs))
        return to, fro

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every row back from each of its choices, weighted and summed."""
        order, rows, counts = self.sort(x, ids)
        to, fro = self.counts(counts)
        came = rows.new_empty(sum(fro), rows.shape[1])
        dist.all_to_all_single(came, rows, fro, to)
        back = torch.empty_like(rows)
        dist.all_to_all_single(back, came, to, fro)
        cells = torch.empty_like(back)
        cells[order] = back
        cells = cells.view(*ids.shape, -1)
        out = torch.zeros(x.shape)
        for k in range(ids.shape[1]):
            out += weights[:, k, None] * cells[:, k].float()
        return out.to(x.dtype)

    def bare(self, x: Tensor, ids: Tensor) -> Callable[[], Tensor]:
        """The three all-to-alls alone, everything else done before."""
        _, rows, counts = self.sort(x, ids)
        to, fro = self.counts(counts)
        came, back = rows.new_empty(sum(fro), rows.shape[1]), torch.empty_like(rows)

        def exchange() -> Tensor:
            theirs = torch.empty_like(counts)
            dist.all_to_all_single(theirs, counts)
            dist.all_to_all_single(came, rows, fro, to)
            dist.all_to_all_single(back, came, to, fro)
            return back

        return exchange

    def close(self) -> None:
        """The process group was made here."""
        dist.destroy_process_group()


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
    epmoe, gloo = Epmoe(config, group), Gloo(config, group)
    try:
        bare = gloo.bare(x, ids)
        ours, theirs = epmoe(x, ids, weights), gloo(x, ids, weights)
        with group.guarded("compare the results", LIMIT_S):
            if not torch.equal(ours, theirs):
                raise EpmoeError(f"rank {group.rank}: epmoe and gloo give different results")
        contestants: list[Callable[[], Tensor]] = [
            lambda: epmoe(x, ids, weights),
            bare,
            lambda: gloo(x, ids, weights),
        ]
        mine: list[list[float]] = [[], [], []]
        for round in range(rounds):
            for turn in range(3):
                which = (round + turn) % 3
                group.allgather(b"", what="start", limit_s=LIMIT_S)
                started = time.perf_counter()
                contestants[which]()
                mine[which].append(time.perf_counter() - started)
            tell(round + 1)
        verbs = {verb: statistics.median(times) for verb, times in epmoe.verbs.items()}
        raw = json.dumps([mine, verbs]).encode()
        said = [json.loads(one) for one in group.allgather(raw, what="times", limit_s=LIMIT_S)]
    finally:
        epmoe.close()
        gloo.close()
    warm = rounds // 10
    slowest = [[max(t) for t in zip(*(s[0][i] for s in said), strict=True)] for i in range(3)]
    payload = rows * config.choices * config.hidden * config.itemsize
    owner = ids // config.slots_per_rank(group.size)
    away = int((owner != group.rank).sum()) * config.hidden * config.itemsize
    shape = {"ranks": group.size, "rows": rows, "hidden": config.hidden, "dtype": config.dtype}
    return Report(
        shape
        | {"experts": config.experts, "choices": config.choices, "rounds": rounds - warm}
        | {"payload_bytes": payload, "away_bytes": away},
        {name: Times(times[warm:]) for name, times in zip(NAMES, slowest, strict=True)},
        {verb: 1e6 * statistics.median(s[1][verb] for s in said) for verb in verbs},
    )


def _drawn(config: MoEConfig, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, config.hidden, generator=g).to(DTYPE[config.dtype])
    ids = torch.rand(rows, config.experts, generator=g).topk(config.choices).indices
    return x, ids, torch.rand(rows, config.choices, generator=g)


def _store(port: int, *, serve: bool) -> Any:
    """Where gloo's ranks of this machine meet; port 0 takes a free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    return TCPStore("127.0.0.1", port, is_master=serve, wait_for_workers=False)
