"""Contestants on the GPUs of all ranks, in turn, from cold caches, started together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from epmoe.comm.group import Group

LIMIT_S = 120.0
COLD = 256 << 20  # bytes read before each turn: four times the L2 cache of an H200
SLEEP = 2_500_000  # clock cycles, 1.3 ms: the host queues all of a turn in the meantime
WARM = 3  # rounds that are not counted

RULES = """\
Each turn: all ranks meet on the host; each queues a read of 256 MiB (the L2 cache holds nothing of
ours afterwards and nothing that must be written back), a sleep of about 1.3 ms in which the host
queues the rest, an all-reduce of one value (ranks leave it within a few us of each other), and the
turn between two CUDA events.  So launches of a contestant that never waits for the host cost no
time; one that must know counts on the host pays for that, as it does in a model.  Contestants
rotate within a round.  A round counts with its slowest rank; a figure is the median of the counted
rounds (three more warm up).  Rows are random normal."""


class Race:
    """Collective to use; needs torch.distributed on NCCL for the common start."""

    def __init__(self, group: Group, *, cold: bool = True) -> None:
        """Without ``cold`` each turn finds the caches as the one before left them."""
        self._group, self._read = group, cold
        self._cold = torch.zeros(COLD // 4, dtype=torch.int32, device="cuda")
        self._one = torch.zeros(1, device="cuda")

    def start(self) -> None:
        """Caches cold or as they are, a sleep, all ranks at the same point of their streams."""
        self._group.allgather(b"", what="start", limit_s=LIMIT_S)
        if self._read:
            self._cold.max()
        torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
        self.align()

    def align(self) -> None:
        """All ranks' streams reach this point before any goes on."""
        dist.all_reduce(self._one)

    def run(
        self, contestants: Mapping[str, Callable[[], object]], rounds: int
    ) -> dict[str, list[float]]:
        """Microseconds of the slowest rank for each contestant and counted round."""
        return self.parts({name: ((name, call),) for name, call in contestants.items()}, rounds)

    def parts(
        self, contestants: Mapping[str, tuple[tuple[str, Callable[[], object]], ...]], rounds: int
    ) -> dict[str, list[float]]:
        """As ``run``, with the parts of each contestant timed one by one, back to back."""
        mine: dict[str, list[float]] = {}
        order = list(contestants)
        for _ in range(WARM + rounds):
            for contestant in order:
                parts = contestants[contestant]
                marks = [_mark() for _ in range(len(parts) + 1)]
                self.start()
                marks[0].record()
                for (_, call), mark in zip(parts, marks[1:], strict=True):
                    call()
                    mark.record()
                torch.cuda.synchronize()
                for (name, _), begun, done in zip(parts, marks, marks[1:], strict=False):
                    mine.setdefault(name, []).append(1e3 * begun.elapsed_time(done))
            order.append(order.pop(0))
        raw = json.dumps(mine).encode()
        said = self._group.allgather(raw, what="times", limit_s=LIMIT_S)
        everyone = [json.loads(one) for one in said]
        return {
            name: [max(t) for t in zip(*(one[name] for one in everyone), strict=True)][WARM:]
            for name in mine
        }


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def described(us: list[float]) -> dict[str, float]:
    """Median, the tenth and the ninetieth percentile.

    >>> described([3.0, 1.0, 2.0])["median"]
    2.0
    """
    tenths = statistics.quantiles(us, n=10)
    found = {"median": statistics.median(us), "p10": tenths[0], "p90": tenths[-1]}
    return {name: round(value, 2) for name, value in found.items()}
