"""epmoe demo --drift: hot experts wander from rank to rank, and a balancer follows them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Self

import torch
from rich.live import Live
from rich.text import Text
from torch import Tensor

from epmoe.balancer import Balancer, BalanceRule
from epmoe.cli.ranks import on_ranks
from epmoe.cli.tables import console, show, show_json
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.moe import MoE
from epmoe.reference import reference_moe
from epmoe.sched.placement import choose_slots

RANKS = 4
ZIPF = 1.2  # the r-th most wanted expert is wanted r ** -1.2 times as often as the first
WANDER = 80  # steps after which every rank of fame moves on to the next expert
WINDOW = 20  # steps of one point of the lines
BARS = "▁▂▃▄▅▆▇█"
RULE = BalanceRule(interval=5, window=20, threshold=1.05, gain=0.02, budget=1 << 16)


@dataclass(slots=True)
class Course:
    """What became of one of the two layers, on all ranks."""

    ratios: list[float] = field(default_factory=list)  # max/mean of every window
    placements: int = 0  # that the balancer asked for
    changes: int = 0  # forwards before which slots changed
    wrong: int = 0  # results that differ in at least one bit

    @property
    def last_half(self) -> float:
        """The mean of max/mean over the second half of the run."""
        half = self.ratios[len(self.ratios) // 2 :]
        return sum(half) / len(half)


def main(args: argparse.Namespace) -> int:
    """0 if every result was right."""
    steps = max(args.rounds // 2 // WINDOW, 2) * WINDOW  # a step is a round of each layer

    def body(group: Group) -> int:
        first = group.rank == 0
        with Lines(steps, silent=not first or args.json) as lines:
            courses = run(group, steps=steps, seed=args.seed, tell=lines.reach)
        if first:
            report(courses, group.size, steps, as_json=args.json)
        return int(any(course.wrong for course in courses))

    return on_ranks(args.ranks, RANKS, body)


def config_of(ranks: int) -> MoEConfig:
    """Small whole numbers stay whole in it, so replicas and moves can be checked bit for bit."""
    return MoEConfig(
        experts=8 * ranks,
        slots=10 * ranks,
        choices=2,
        hidden=64,
        inner=32,
        max_rows=64,
        dtype="fp32",
        activation="relu2",
        freight=1 << 18,
        open_s=60.0,
        name="drift",
    )


def wanted_E(experts: int, step: int) -> Tensor:
    """How much every expert is wanted: neighbours are hot together, and so is their rank."""
    fame = 1 / torch.arange(1, experts + 1, dtype=torch.float64) ** ZIPF
    return fame.roll(experts // 4 + step // WANDER)


def batch(config: MoEConfig, seed: int, step: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's rows of one step, drawn alike wherever it is asked for."""
    g = torch.Generator().manual_seed((seed * 100_003 + step) * 64 + rank)
    rows, experts = config.max_rows, config.experts
    chances = wanted_E(experts, step).expand(rows, experts)
    ids = torch.multinomial(chances, config.choices, generator=g)
    x = torch.randint(-1, 2, (rows, config.hidden), generator=g).float()
    return x, ids, torch.ones(rows, config.choices)


def run(
    group: Group,
    *,
    steps: int,
    seed: int = 0,
    tell: Callable[[int, list[Course]], None] = lambda done, courses: None,
) -> list[Course]:
    """Collective: the same traffic through a layer left alone and through a balanced one."""
    config, ranks = config_of(group.size), group.size
    g = torch.Generator().manual_seed(seed)
    shapes = {"w1": (config.inner, config.hidden), "w2": (config.hidden, config.inner)}
    weights = {
        n: torch.randint(-1, 2, (config.experts, *s), generator=g).float()
        for n, s in shapes.items()
    }
    courses, rows_LR, wrong_L = [Course(), Course()], torch.zeros(2, ranks), [0, 0]
    layers = MoE.open_all([config, config], group)
    with layers[0]:
        for moe in layers:
            held = list(moe.placement.experts_on(group.rank))
            moe.load(**{n: w[held] for n, w in weights.items()})  # a copy: experts are written here
        balancer = Balancer(layers[1:], RULE)
        for step in range(steps):
            x, ids, ones = batch(config, seed, step, group.rank)
            want = reference_moe([x], [ids], [ones], weights, config)[0]
            for n, moe in enumerate(layers):
                wrong_L[n] += not torch.equal(moe(x, ids, ones), want)
                slots = choose_slots(ids, moe.placement, rank=group.rank).flatten()
                rows_LR[n] += torch.bincount(slots // moe.placement.slots_per_rank, minlength=ranks)
            balancer.step()
            if (step + 1) % WINDOW == 0:
                close_window(group, courses, rows_LR, wrong_L)
                courses[1].placements, courses[1].changes = balancer.moved, layers[1].epoch
                tell(step + 1, courses)
                rows_LR.zero_()
    return courses


def close_window(group: Group, courses: list[Course], rows_LR: Tensor, wrong_L: list[int]) -> None:
    """Add what every rank sent in this window, and what it found wrong since the beginning."""
    said = json.dumps([rows_LR.tolist(), wrong_L]).encode()
    answers = [json.loads(a) for a in group.allgather(said, what="rows", limit_s=60.0)]
    for n, course in enumerate(courses):
        rows_R = torch.tensor([answer[0][n] for answer in answers]).sum(0)
        course.ratios.append(float(rows_R.max() / rows_R.mean()))
        course.wrong = sum(answer[1][n] for answer in answers)


def spark(ratios: list[float], top: float) -> str:
    """A bar for every window, from 1.0 to ``top``.

    >>> spark([1.0, 2.0, 3.0], 3.0)
    '▁▅█'
    """
    span = max(top - 1.0, 1e-9)
    last = len(BARS) - 1
    return "".join(BARS[min(last, round((r - 1.0) / span * last + 0.01))] for r in ratios)


class Lines:
    """Both lines as they grow on a terminal; elsewhere a line at every tenth of the way."""

    def __init__(self, steps: int, *, silent: bool) -> None:
        self._steps, self._tenth, self._silent = steps, 0, silent
        self._live: Live | None = None
        if not silent and sys.stderr.isatty():
            self._live = Live(console=console(sys.stderr), transient=True, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def reach(self, done: int, courses: list[Course]) -> None:
        """``done`` steps are done."""
        without, balanced = courses
        now = f"{without.ratios[-1]:.2f} without, {balanced.ratios[-1]:.2f} with balancer"
        if self._live:
            top = max(without.ratios + balanced.ratios)
            self._live.update(
                Text(
                    f"step {done}/{self._steps}   max/mean {now}\n"
                    f"without   {spark(without.ratios, top)}\n"
                    f"balanced  {spark(balanced.ratios, top)}"
                )
            )
        elif not self._silent and 10 * done // self._steps > self._tenth:
            self._tenth = 10 * done // self._steps
            print(f"step {done}/{self._steps}: max/mean {now}", file=sys.stderr, flush=True)


def report(courses: list[Course], ranks: int, steps: int, *, as_json: bool) -> None:
    """The end of both lines, and what it took."""
    names = ("without", "balancer")
    if as_json:
        facts = {
            n: asdict(c) | {"last_half": c.last_half} for n, c in zip(names, courses, strict=True)
        }
        show_json({"ranks": ranks, "steps": steps, "results": 2 * steps * ranks} | facts)
        return
    top = max(max(course.ratios) for course in courses)
    show(
        f"epmoe demo --drift: {ranks} ranks, {steps} steps, hot experts wander every {WANDER}",
        ("", ">max/mean, last half", ">worst", ">placements", ">wrong", "1.0 to the worst"),
        [
            (
                name,
                f"{course.last_half:.3f}",
                f"{max(course.ratios):.3f}",
                f"{course.placements}",
                f"{course.wrong} of {steps * ranks}",
                spark(course.ratios, top),
            )
            for name, course in zip(names, courses, strict=True)
        ],
    )
