"""Ranks on GPUs are killed, one in each schedule; what the others saw, and how soon, as JSON:

python tests/gpu/kills.py --ranks 2 --schedules 100 [--within 110] [--json FILE]

Processes start many at a time, since a CUDA context takes longer than a schedule; then one schedule
after the other has its turn on each set of GPUs: two rounds that wait on one GPU starve each other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from dying import BY_LAUNCHER, OVER, READY, RUNNING, Board, Schedule, Traffic, rank_of

from epmoe import local
from epmoe.cli.contest import gpus
from epmoe.comm.layout import layout
from epmoe.kernels.choose import compiled as chooser
from epmoe.kernels.fused import compiled
from epmoe.kernels.sizes import cuts

CLOSE = 6e-3  # test_round.py
LATEST_S = 1.0  # from the kill to a survivor's return
START_S = 90.0  # for all processes of a batch
LONGEST_S = 30.0  # of one schedule


class Played:
    """A schedule's processes, its turn, and the verdict."""

    def __init__(self, schedule, traffic):
        self.schedule, self.board = schedule, Board(len(schedule.gpus))
        self.job = local.fork_ranks(
            len(schedule.gpus),
            lambda rank: rank_of(schedule, traffic, self.board, rank),
            end_others=False,
        )
        self.found = None

    def ready(self):
        """True once its turn may come: all ranks wait for it, or one has ended before."""
        return min(self.board.states()) >= READY or self.ended() > 0

    def ended(self):
        return sum(outcome.code is not None for outcome in self.job.outcomes)

    def turn(self):
        """Yields while it waits: turns on different GPUs go on side by side."""
        schedule, board, ranks = self.schedule, self.board, len(self.schedule.gpus)
        until = time.monotonic() + LONGEST_S
        board[Board.GO] = 1
        if schedule.kind in BY_LAUNCHER:
            state = OVER if schedule.kind == "closing" else RUNNING
            mine = Board.STATE + schedule.victim
            while board[mine] < state and not self.ended() and time.monotonic() < until:
                yield
            longest = {"closing": 0.004, "inside": 0.05}.get(schedule.kind, 0.03)
            struck = time.monotonic() + random.Random(schedule.seed + 1).random() * longest
            while time.monotonic() < struck:
                yield
            board.kill(self.job.pids[schedule.victim])
        while self.ended() < ranks and time.monotonic() < until:
            yield
        self.found = self.verdict(self.job.wait(0.1 if self.ended() < ranks else 5.0))

    def verdict(self, outcomes):
        """What each survivor saw, and what of it is wrong."""
        schedule, killed = self.schedule, self.board[Board.KILLED]
        end = outcomes[schedule.victim].ended_s
        found = {"seed": schedule.seed, "kind": schedule.kind, "gpus": schedule.gpus, "wrong": []}
        found |= {"victim": schedule.victim, "s": [], "s_since_end": [], "outs": Counter()}
        if outcomes[schedule.victim].code != -signal.SIGKILL:
            found["wrong"].append(f"victim ended with {outcomes[schedule.victim].code}")
            found["wrong"].append(outcomes[schedule.victim].log[-2000:])
        for one in outcomes:
            if one.rank == schedule.victim:
                continue
            if one.code != 0 or not one.result:
                found["wrong"].append(f"rank {one.rank} ended with {one.code}: {one.log[-2000:]}")
                continue
            said = one.result
            since = max(0.0, (said["returned"] - killed) / 1e9)
            found["s"].append(since)
            found["s_since_end"].append(said["returned"] / 1e9 - end)
            found["outs"].update(said["outs"])
            hows = ("exited", "closed") if schedule.kind == "closing" else ("exited",)
            named = said["error"] == "PeerLost" and said["ranks"] == [schedule.victim]
            faults = {
                "slow": since > LATEST_S or said["closing_s"] > LATEST_S,
                "named": not named or said["how"] not in hows,
                "outputs": bool(said["bad"]),
                "context": not said["multiplies"] or not said["anew"] < CLOSE,
            }
            if any(faults.values()):
                which = [name for name, fault in faults.items() if fault]
                found["wrong"].append(f"rank {one.rank}: {which}: {said}")
        return found


def batch(schedules, traffic, until):
    """All processes start, then each set of GPUs takes its turns."""
    begun, every = time.monotonic(), []
    try:
        every += (Played(schedule, traffic) for schedule in schedules)
        while not all(played.ready() for played in every):
            if time.monotonic() > min(begun + START_S, until):
                break
            time.sleep(0.01)
        started = time.monotonic() - begun
        sets = dict.fromkeys(schedule.gpus for schedule in schedules)
        turns = [turns_of([p for p in every if p.schedule.gpus == one], until) for one in sets]
        while turns:
            turns = [turn for turn in turns if next(turn, turn) is not turn]
            time.sleep(0.0002)
    finally:
        for played in every:
            played.job.close()
    return started, [played.found for played in every if played.found]


def turns_of(several, until):
    """One after the other; one whose processes are not there by now has its turn and is wrong."""
    for played in several:
        if time.monotonic() > until:
            return
        yield from played.turn()


def compile_all(config, ranks):
    """Fill the file cache, so that no process compiles in its turn."""
    placed, among = layout([config], ranks), cuts(config, ranks)
    for cut in among:
        compiled(config, ranks, placed, 0, 0, cut=cut, among=among)
    chooser(config, torch.int64, 1)
    chooser(config, torch.int32, 1)


def summary(asked, found, seconds):
    """The report; times in milliseconds from the kill to a survivor's return."""

    def spread(values):
        ms = sorted(1e3 * v for v in values)
        if not ms:
            return {}
        last = ms[min(len(ms) - 1, int(0.99 * len(ms)))]
        return {
            name: round(v, 2)
            for name, v in (("p50", statistics.median(ms)), ("p99", last), ("max", ms[-1]))
        }

    kinds = dict.fromkeys(one["kind"] for one in found)
    return {
        "ranks": asked.ranks,
        "heap": asked.heap,
        "schedules": len(found),
        "asked": asked.schedules,
        "wrong": sum(bool(one["wrong"]) for one in found),
        "ms": spread([s for one in found for s in one["s"]]),
        "ms_since_the_process_ended": spread([s for one in found for s in one["s_since_end"]]),
        "rounds": dict(sum((Counter(one["outs"]) for one in found), Counter())),
        "kinds": {
            kind: {"schedules": sum(one["kind"] == kind for one in found)}
            | spread([s for one in found if one["kind"] == kind for s in one["s"]])
            for kind in kinds
        },
        "seconds": seconds,
        "what": [one["wrong"] for one in found if one["wrong"]][:5],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--heap", default="cuda", choices=("cuda", "nvshmem", "host"))
    parser.add_argument("--gpus", help="of one set, as in 0,1; else as many sets as fit")
    parser.add_argument("--ahead", type=int, default=12, help="schedules started at a time, a set")
    parser.add_argument("--within", type=float, default=110.0, help="seconds; what is done counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    begun, ranks = time.monotonic(), asked.ranks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if asked.gpus or asked.heap == "host":
        sets = [tuple(map(int, (asked.gpus or ",".join("0" * ranks)).split(",")))]
    else:
        count = gpus()
        sets = [tuple(range(n, n + ranks)) for n in range(0, count - ranks + 1, ranks)]
    if not sets or len(sets[0]) != ranks:
        sys.exit(f"--ranks must be the GPUs of a set, got {ranks} and {sets}")
    traffic, found, seconds = Traffic(ranks, asked.heap), [], {}
    todo = [
        Schedule.of(asked.seed + n // len(sets), asked.heap, sets[n % len(sets)])
        for n in range(asked.schedules)
    ]
    if asked.heap != "host":
        with ProcessPoolExecutor(4, get_context("spawn")) as pool:
            wanted = {(one.config, ranks) for one in todo} | {(traffic.alone, 1)}
            for job in [pool.submit(compile_all, *each) for each in wanted]:
                job.result()
    seconds["compile"] = round(time.monotonic() - begun, 1)
    until, per = begun + asked.within, asked.ahead * len(sets)
    try:
        for first in range(0, len(todo), per):
            took = time.monotonic()
            started, more = batch(todo[first : first + per], traffic, until)
            found += more
            took = time.monotonic() - took
            seconds.setdefault("batches", []).append([round(started, 1), round(took, 1)])
            if asked.json:
                part = asked.json.with_suffix(".part")
                part.write_text(json.dumps({**summary(asked, found, seconds), "each": found}))
                os.replace(part, asked.json)
            if time.monotonic() + took > until:
                break
    finally:
        seconds["all"] = round(time.monotonic() - begun, 1)
        sys.stdout.write(json.dumps(summary(asked, found, seconds), indent=1) + "\n")
        sys.stdout.flush()
    sys.exit(any(one["wrong"] for one in found) or not found)


if __name__ == "__main__":
    main()
