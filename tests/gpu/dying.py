"""What each rank does in a schedule of kills.py: rounds until it dies or names the dead."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from dataclasses import dataclass, replace

import torch
from bodies import SMALL, batches, drawn, error, load, oracle

from epmoe import EpmoeError, Group, MoE
from epmoe.config import MoEConfig
from epmoe.reference import reference_moe

LARGE = MoEConfig(  # rounds of milliseconds: a kill nearly always meets a kernel at work
    experts=16, choices=4, hidden=4096, inner=4096, max_rows=4096, stall_s=10.0, open_s=60.0
)
# early: after the others have launched; between: before; late: just after its own launch; queued:
# its launch still waits for its turn; inside: in the middle of long rounds; replay: rounds are
# graphs; closing: while it leaves on purpose; anywhere: whenever.
KINDS = ("early", "between", "late", "queued", "inside", "replay", "closing", "anywhere")
BY_LAUNCHER = ("inside", "replay", "closing", "anywhere")  # from outside, by the clock
ON_HOST = ("early", "between", "closing", "anywhere")  # those that mean something without a GPU
READY, RUNNING, OVER = 1, 2, 3
SETS = 3  # batches that take turns: a stale answer is another batch's
PATIENCE_S = 240.0  # of a rank that waits for its turn


class Board:
    """Numbers that launcher and ranks of a schedule all see: the turn, the kill, a state each."""

    GO, KILLED, STATE = 0, 1, 2

    def __init__(self, ranks):
        self.memory, self.ranks = mmap.mmap(-1, 8 * (2 + ranks)), ranks

    def __getitem__(self, at):
        return struct.unpack_from("q", self.memory, 8 * at)[0]

    def __setitem__(self, at, value):
        struct.pack_into("q", self.memory, 8 * at, value)

    def states(self):
        return [self[self.STATE + rank] for rank in range(self.ranks)]

    def kill(self, pid):
        self[self.KILLED] = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Schedule:
    """One kill: whose, of which kind, on which GPUs; everything random follows from the seed."""

    seed: int
    kind: str
    heap: str
    gpus: tuple[int, ...]
    victim: int

    @classmethod
    def of(cls, seed, heap, gpus):
        kinds = ON_HOST if heap == "host" else KINDS
        own = 100 * seed + gpus[0]  # two sets of GPUs do not play the same
        victim = random.Random(own).randrange(len(gpus))
        return cls(own, kinds[seed % len(kinds)], heap, gpus, victim)

    @property
    def config(self):
        return replace(LARGE if self.kind == "inside" else SMALL, heap=self.heap)


class Traffic:
    """Batches of the small layer and what the oracle says of them; made once, before any fork."""

    def __init__(self, ranks, heap):
        self.alone = replace(SMALL, heap=heap, name="alone")
        self.weights = drawn(SMALL)
        self.each = []
        for seed in range(SETS):
            rows_R = [random.Random(seed).randrange(1, SMALL.max_rows) for _ in range(ranks)]
            batch_R = batches(SMALL, rows_R, seed)
            self.each.append((batch_R, oracle(SMALL, self.weights, batch_R)))
        self.one = batches(self.alone, [40], 77)[0]
        self.answer = reference_moe(*([part] for part in self.one), self.weights, self.alone)[0]


class Machine:
    """The device a rank computes on, so that the same schedule runs on host memory too."""

    def __init__(self, heap, gpu):
        self.name = "cpu" if heap == "host" else f"cuda:{gpu}"
        self.gpu = heap != "host"
        if self.gpu:
            torch.cuda.set_device(gpu)
        self.square = torch.randn(512, 512).bfloat16().to(self.name)
        self.product = self.square @ self.square

    def wait(self):
        if self.gpu:
            torch.cuda.synchronize()

    def multiplies(self):
        return torch.equal(self.square @ self.square, self.product)


class Rank:
    """One rank of a schedule, from its open layer to its last word."""

    def __init__(self, schedule, traffic, board, group):
        self.schedule, self.traffic, self.board, self.group = schedule, traffic, board, group
        self.rng = random.Random(1000 * schedule.seed + group.rank)
        self.machine = Machine(schedule.heap, schedule.gpus[group.rank])
        self.moe = MoE.open(schedule.config, group)
        self.outs, self.wanted, self.bad, self.number = [], [], [], 0
        if schedule.kind == "inside":
            self._large()
        else:
            self._small()
        self.machine.wait()

    def _small(self):
        if self.machine.gpu:
            load(self.moe, self.group, self.traffic.weights)
        else:
            each = SMALL.slots_per_rank(self.group.size)
            mine = slice(self.group.rank * each, (self.group.rank + 1) * each)
            self.moe.load(**{name: w[mine] for name, w in self.traffic.weights.items()})
        self.batches = [
            tuple(part.to(self.machine.name) for part in batch_R[self.group.rank])
            for batch_R, _ in self.traffic.each
        ]

    def _large(self):
        slots = LARGE.slots_per_rank(self.group.size)
        g = torch.Generator(device="cuda").manual_seed(self.group.rank)

        def draw(*shape):
            return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16) * 0.02

        wide, tall = (slots, LARGE.inner, LARGE.hidden), (slots, LARGE.hidden, LARGE.inner)
        self.moe.load(w1=draw(*wide), w3=draw(*wide), w2=draw(*tall))
        self.batches = []
        for _ in range(SETS):
            score = torch.rand(LARGE.max_rows, LARGE.experts, generator=g, device="cuda")
            ids = score.topk(LARGE.choices).indices
            weights = torch.rand(ids.shape, generator=g, device="cuda")
            self.batches.append((draw(LARGE.max_rows, LARGE.hidden), ids, weights))

    def first(self):
        """A round of every batch while all live: by the oracle, and what later rounds must give."""
        for number, batch in enumerate(self.batches):
            y = self.moe(*batch)
            self.moe.check()
            self.wanted.append(y)
            if not torch.isfinite(y).all():
                self.bad.append(f"first round of batch {number} is not finite")
            elif self.schedule.kind != "inside":
                want = self.traffic.each[number][1][self.group.rank]
                if error(y, want) > 6e-3:
                    self.bad.append(f"first round of batch {number} is {error(y, want)} off")

    def captured(self):
        """The three batches as one graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [self.moe(*batch) for batch in self.batches]
        return graph, ys

    def rounds(self, graph):
        """A few rounds on their way, then all of them judged; raises what the layer raises."""
        queued = []
        try:
            if graph:
                for y in graph[1]:
                    y.fill_(7.0)
                queued += enumerate(graph[1])
                graph[0].replay()
            for _ in range(0 if graph else self.rng.choice([1, 1, 4])):
                at = self.number % SETS
                self.number += 1
                torch.full_like(self.batches[at][0], 7.0)  # the next output lies on these
                queued.append((at, self.moe(*self.batches[at])))
                if self.schedule.kind == "late" and self.dies(12):
                    time.sleep(self.rng.random() * 2e-4)
                    self.board.kill(os.getpid())
            self.machine.wait()
            self.returned = time.monotonic_ns()
            self.moe.check()
        except EpmoeError:
            self.machine.wait()
            self.returned = time.monotonic_ns()
            raise
        finally:
            self.machine.wait()
            for at, y in queued:
                self.judge(at, y)

    def judge(self, at, y):
        """Exact, or NaN in every place and then for ever."""
        if torch.equal(y, self.wanted[at]):
            said = "exact"
        else:
            said = "nan" if y.isnan().all() else "neither"
        if said == "neither" or (said == "exact" and "nan" in self.outs):
            self.bad.append(f"round {len(self.outs)} after {self.outs[-2:]} is {said}")
        self.outs.append(said)

    def dies(self, least):
        """True for the victim, once, at a random round from ``least`` on."""
        return (
            self.group.rank == self.schedule.victim
            and self.number >= least + self.schedule.seed % 7
        )

    def before_a_round(self):
        """Whoever dies by its own hand, or is late."""
        kind, rng = self.schedule.kind, self.rng
        if kind in ("early", "between", "queued", "closing") and self.dies(9):
            if kind == "early":
                time.sleep(0.002 + 0.003 * rng.random())
            elif kind == "queued":
                torch.cuda._sleep(2_000_000_000)  # a second
                self.moe(*self.batches[self.number % SETS])
                time.sleep(0.001 + 0.03 * rng.random())
            elif kind == "closing":
                self.board[Board.STATE + self.group.rank] = OVER
                self.moe.close()
                time.sleep(60)
            self.board.kill(os.getpid())
        if kind == "between" or rng.random() < 0.1:
            time.sleep(rng.random() * 0.01)

    def survive(self):
        """Rounds until one raises; then something right in the same context."""
        report = {"error": None, "ranks": [], "how": "", "text": ""}
        graph = self.captured() if self.schedule.kind == "replay" else None
        self.board[Board.STATE + self.group.rank] = RUNNING
        until = time.monotonic() + 20
        try:
            while time.monotonic() < until:
                self.before_a_round()
                self.rounds(graph)
        except EpmoeError as said:
            report |= {"error": type(said).__name__, "text": str(said)}
            report |= {"ranks": list(getattr(said, "ranks", ())), "how": getattr(said, "how", "")}
        closing = time.monotonic()
        self.moe.close()
        report["closing_s"] = time.monotonic() - closing
        report["multiplies"] = self.machine.multiplies()
        report["anew"] = self.anew()
        outs = {name: self.outs.count(name) for name in ("exact", "nan", "neither")}
        return report | {"returned": self.returned, "bad": self.bad[:3], "outs": outs}

    def anew(self):
        """How far a layer of one rank, opened now, is from its known answer."""
        traffic = self.traffic
        with Group.alone() as group, MoE.open(traffic.alone, group) as moe:
            moe.load(**{name: w.to(self.machine.name) for name, w in traffic.weights.items()})
            y = moe(*(part.to(self.machine.name) for part in traffic.one))
            moe.check()
            return error(y, traffic.answer)


def rank_of(schedule, traffic, board, rank):
    """The whole of a rank, in a process of its own; a survivor's report."""
    torch.set_num_threads(1)
    with Group.from_env() as group:
        mine = Rank(schedule, traffic, board, group)
        board[Board.STATE + rank] = READY
        until = time.monotonic() + PATIENCE_S
        while not board[Board.GO]:
            if time.monotonic() > until:
                raise TimeoutError(f"schedule {schedule.seed} never had its turn")
            time.sleep(0.001)
        mine.first()
        return mine.survive()
