"""One seed: a program for every lane of every rank, a fault or none; and the verdict."""

from __future__ import annotations

import random

import torch
from sim.baton import Baton
from sim.draw import (
    Step,
    disagree,
    draw_config,
    draw_ids,
    draw_step,
    slots_of,
    spoil,
    weights_of,
)
from sim.oracle import expected, same
from sim.slabs import layers, load_alone

from epmoe.comm.words import ROUNDS, Y
from epmoe.errors import ConfigMismatch, EpmoeError, Evicted, PeerLost
from epmoe.sched.chunks import plan_chunks

FAULTS = (
    None,
    None,
    None,
    "refuse",
    "refuse",
    "raise",
    "close",
    "kill",
    "kill",
    "stop",
    "disagree",
)
HOW = {"raise": "raised", "close": "closed", "kill": "exited", "stop": "stopped"}
VERBS = ("stage", "wait_plan", "pull", "ffn", "push", "reduce")
MAX_ROWS = 5


class Struck(Exception):
    """The planted fault."""


class Interrupted(BaseException):
    """The planted fault as Ctrl-C plants it."""


class Case:
    """Everything that follows from the seed, and what came of it."""

    def __init__(self, seed, steps=3):
        self.seed, self.rng = seed, random.Random(seed)
        rng, g = self.rng, torch.Generator().manual_seed(seed)
        self.ranks = rng.choice([1, 2, 2, 3, 3, 4])
        self.lanes = rng.choice([1, 1, 1, 2])
        count = rng.choice([1, 1, 2, 3])
        names = [f"layer {i}" for i in range(count)]
        self.configs = [draw_config(rng, self.ranks, MAX_ROWS, n, self.lanes) for n in names]
        self.weights = [weights_of(config, g, self.ranks) for config in self.configs]
        self.programs = [
            [draw_step(rng, g, self.configs, self.ranks) for _ in range(steps)]
            for _ in range(self.lanes)
        ]
        self.fault = rng.choice(FAULTS) if self.ranks > 1 else None
        self.who, self.lane = rng.randrange(self.ranks), rng.randrange(self.lanes)
        self.when = rng.randrange(steps)
        self.first = rng.choice([1, 1, 1, 1 << 20, (1 << 32) - 2])
        self.got, self.errors, self.at = {}, {}, {}
        self.struck = False
        step = self.programs[self.lane][self.when]
        if self.fault == "refuse":
            self.named = spoil(rng, step, self.who, self.configs[step.layer])
        if self.fault == "disagree":
            disagree(rng, step, self.who)

    def run(self):
        """None, or what was wrong."""
        self.moes = layers(self.configs, self.ranks, first=self.first)
        for rank in range(self.ranks):
            for moe, w in zip(self.moes[rank], self.weights, strict=True):
                load_alone(moe, slots_of(w, rank, moe.config.slots_per_rank(self.ranks)))
        self.threads = [(rank, lane) for rank in range(self.ranks) for lane in range(self.lanes)]
        acts = {"kill": self._kill, "stop": self._stop}
        strike = None
        if self.fault in acts:
            strike = (self.who, self.rng.randrange(1, 3 * (4 * self.ranks + 3)), acts[self.fault])
        self.baton = Baton([rank for rank, _ in self.threads], self.seed, strike)
        bodies = [lambda at=at: self._body(*at) for at in self.threads]
        raised = self.baton.run(bodies)
        self.errors = {self.threads[i]: error for i, error in raised.items()}
        wrong = self._judge_errors() or self._judge_results()
        what = f"{self.fault} of rank {self.who}, lane {self.lane}, step {self.when}"
        return wrong and f"seed {self.seed} ({what}): {wrong}"

    def _body(self, rank, lane):
        for number, step in enumerate(self.programs[lane]):
            self.at[rank, lane] = number
            moe = self.moes[rank][step.layer]
            here = (rank, lane, number) == (self.who, self.lane, self.when)
            if here and self.fault == "raise":
                plant(moe, lane, self.rng.choice(VERBS), self.rng.choice([Struck, Interrupted]))
            if here and self.fault == "close":
                moe.close()
                return
            try:
                self.got[rank, lane, number] = moe(
                    step.x_R[rank],
                    step.ids_R[rank],
                    step.weights_R[rank],
                    context=step.context_of(rank),
                    lane=lane,
                )
            except (ValueError, TypeError) as error:
                self.got[rank, lane, number] = error
        if self.lanes == 1 and rank % 2:
            self.moes[rank][0].close()  # others may still be in the round it has just finished

    def _kill(self):
        self.struck, self.paid = True, [self._paid(lane) for lane in range(self.lanes)]
        self.baton.dead.add(self.who)
        runtime = self.moes[self.who][0]._runtime
        runtime.poison = runtime.close = lambda *args: None  # nothing of it runs any more
        for rank in range(self.ranks):
            lost = self.moes[rank][0]._runtime.group.watch.lost
            self.baton.later(lambda lost=lost: lost.update({self.who: "exited"}))

    def _stop(self):
        self.struck, self.paid = True, [self._paid(lane) for lane in range(self.lanes)]
        self.baton.frozen.add(self.who)
        for rank in range(self.ranks):
            watch = self.moes[rank][0]._runtime.group.watch
            watch.state_of = lambda peer: "T" if peer == f"rank {self.who}" else "S"

    def _judge_errors(self):
        if self.fault in (None, "refuse"):
            return f"raised {self.errors}" if self.errors else None
        if self.fault == "disagree":
            odd = {at: e for at, e in self.errors.items() if not isinstance(e, ConfigMismatch)}
            if self.lanes == 1 and (odd or len(self.errors) < self.ranks):
                return f"no ConfigMismatch everywhere: {self.errors}"
            return None
        if self.fault in HOW and (self.struck or self.fault in ("raise", "close")):
            for (rank, lane), error in self.errors.items():
                if rank == self.who:
                    wrong = self._judge_culprit(lane, error)
                else:
                    wrong = self._judge_survivor(error)
                if wrong:
                    return f"rank {rank} lane {lane} raised {error!r}: {wrong}"
            return self._judge_silence()
        return f"raised {self.errors}" if self.errors else None

    def _judge_culprit(self, lane, error):
        match self.fault:
            case "raise" if lane == self.lane:
                return None if isinstance(error, (Struck, Interrupted)) else "not its own error"
            case "kill":
                return None if type(error).__name__ == "Killed" else "a dead rank raises nothing"
            case "stop" if self.lanes == 1:
                return None if isinstance(error, Evicted) else "not Evicted"
        return None if isinstance(error, EpmoeError) else "not an EpmoeError"

    def _judge_survivor(self, error):
        # On two lanes the second to call finds the heap unusable since what the first has seen.
        seen = error if isinstance(error, PeerLost) else error.__cause__
        if not isinstance(seen, PeerLost):
            return "not PeerLost"
        if seen.ranks != (self.who,) or seen.how != HOW[self.fault]:
            return f"blames {seen.ranks} ({seen.how})"
        return None

    def _judge_silence(self):
        """Whoever had more rounds to do must have noticed."""
        if self.lanes > 1:
            return None
        last = len(self.programs[0]) - 1
        at = self.at[self.who, 0] if self.fault in ("kill", "stop") else self.when
        quiet = [r for r in range(self.ranks) if r != self.who and (r, 0) not in self.errors]
        return f"ranks {quiet} noticed nothing" if quiet and at < last else None

    def _judge_results(self):
        for lane, program in enumerate(self.programs):
            for number, step in enumerate(program):
                refused = self.fault == "refuse" and (lane, number) == (self.lane, self.when)
                if wrong := self._judge_step(lane, number, step, refused):
                    return f"lane {lane} step {number}: {wrong}"
        return None

    def _judge_step(self, lane, number, step, refused):
        config = self.configs[step.layer]
        blank = self.who if refused else None
        kept = step if not refused else emptied(step, self.who, config)
        wanted = expected(kept, config, self.weights[step.layer], without=blank)
        for rank, want in enumerate(wanted):
            have = self.got.get((rank, lane, number))
            if refused and rank == self.who:
                if not isinstance(have, (ValueError, TypeError)) or self.named not in str(have):
                    return f"rank {rank}: a bad {self.named} was taken: {have!r}"
            elif have is None:
                culprit = rank == self.who and self.fault in HOW
                if not culprit and self._complete(lane, number):
                    return f"rank {rank} threw the round away: {self.errors.get((rank, lane))!r}"
            elif isinstance(have, BaseException):
                return f"rank {rank} refused it: {have!r}"
            elif not same(have, want):
                return f"rank {rank} differs"
        return None

    def _complete(self, lane, number):
        """True if the culprit gave this round all it owes, so that nobody lacks anything of it."""
        if self.fault == "disagree":
            return self.lanes == 1 and number < self.when
        if self.fault not in HOW or (self.fault in ("kill", "stop") and not self.struck):
            return True
        if self.lanes > 1:
            return False  # a survivor that leaves one lane leaves the other in mid-round
        program = self.programs[lane][: number + 1]
        last = self.first - 1 + sum(rounds_of(s, self.configs[s.layer]) for s in program)
        paid = self.paid[lane] if self.struck else self._paid(lane)
        return (paid - last) % ROUNDS < ROUNDS // 2

    def _paid(self, lane):
        """The last round whose word Y of the culprit is in every mailbox."""
        runtime = self.moes[self.who][0]._runtime
        at = runtime.placed.lanes[lane][0]["words"].at + 8 * (Y * self.ranks + self.who)
        words = [runtime.heap.peer(r)[at : at + 8].view(torch.int64) for r in range(self.ranks)]
        start = self.first - 1
        return start + min(((int(word) >> 32) - start) % ROUNDS for word in words)


def rounds_of(step, config):
    """How many rounds a step takes."""
    rows = step.context.rows if step.context else None
    return plan_chunks(rows, config.max_rows).count if rows else 1


def emptied(step, rank, config):
    """The step with a batch of the right form in place of a refused one; its rows do not count."""
    rows = step.context.rows[rank] if step.context and step.context.rows else 0
    blank = Step(step.layer, list(step.x_R), list(step.ids_R), list(step.weights_R), step.context)
    blank.x_R[rank] = torch.zeros(rows, config.hidden, dtype=step.x_R[rank - 1].dtype)
    blank.ids_R[rank] = torch.full((rows, config.choices), -1)
    blank.weights_R[rank] = torch.zeros(rows, config.choices)
    return blank


def plant(moe, lane, verb, error):
    """Let ``verb`` of a lane raise when it is called next."""

    def struck(*args, **kwargs):
        raise error("out of memory")

    setattr(moe._rounds[lane].ops, verb, struck)


def case(seed, steps=3):
    """Run one seed; None, or what was wrong."""
    return Case(seed, steps).run()


__all__ = ["Case", "case", "draw_ids", "draw_step", "expected", "slots_of", "weights_of"]
