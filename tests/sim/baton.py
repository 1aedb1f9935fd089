"""Threads that run one at a time; the seed alone decides who is next, who dies and who is stopped.

The real host code runs: only ``words.pause`` (the one place a rank gives way) and its clock are
replaced.  Time stands still until nobody can move; then it jumps past the stall limit, so a hang of
the protocol is an error that the verdict sees, as fast as anything else.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from types import SimpleNamespace

from epmoe.comm import words

STEPS = 100_000  # far more than any case needs: one that gets here loops outside of the waits
STALL_S = 30.0  # what the simulated configs say
POLLS = 70  # a wait looks at the clock every 64 turns


class Hang(BaseException):
    """A loop without an end.  Not an Exception: nothing on the way may catch it."""


class Killed(BaseException):
    """This rank's process has ended: nothing of it may run but the way out of its thread."""


class Baton:
    """``threads[i]`` belongs to rank ``rank_of[i]``.

    ``strike = (rank, n, act)`` calls ``act()`` at the n-th pause of that rank outside of waiting.
    """

    def __init__(self, rank_of, seed, strike=None):
        self.rng = random.Random(seed)
        self.rank_of, self.strike = list(rank_of), strike
        self.go = [threading.Semaphore(0) for _ in self.rank_of]
        self.back = threading.Semaphore(0)
        self.live = list(range(len(self.rank_of)))
        self.at, self.steps, self.clock = -1, 0, 1.0
        self.pauses = Counter()  # by rank
        self.polled = Counter()  # by thread, since anybody last did something
        self.news = []  # (step, call): what the watch of some rank learns then
        self.dead, self.frozen = set(), set()

    def pause(self, spins=0):
        me = self.at
        rank = self.rank_of[me]
        if spins:
            self.polled[me] += 1
        else:
            self.polled.clear()
            self.pauses[rank] += 1
            if self.strike and self.strike[:2] == (rank, self.pauses[rank]):
                self.strike[2]()
        self.back.release()
        self.go[me].acquire()
        if rank in self.dead:
            raise Killed
        if self.steps > STEPS:
            raise Hang

    def run(self, bodies):
        """Run every body to its end; thread → what it raised."""
        errors = {}

        def thread(me):
            self.go[me].acquire()
            try:
                if self.rank_of[me] not in self.dead:
                    bodies[me]()
            except BaseException as error:  # the verdict wants all of them
                errors[me] = error
            self.live.remove(me)
            self.polled.clear()
            self.back.release()

        threads = [threading.Thread(target=thread, args=(me,), daemon=True) for me in self.live]
        for one in threads:
            one.start()
        # Two-phase: first whether this run has a slow thread at all, then which it is.
        slow = self.rng.choice([None, *self.live])
        self.share = self.rng.choice([0.1, 0.1, 0.1, 0.03])
        real = words.pause, words.time
        words.pause, words.time = self.pause, SimpleNamespace(monotonic=lambda: self.clock)
        try:
            while self.live:
                self._turn(slow)
        finally:
            words.pause, words.time = real
        for one in threads:
            one.join()
        return errors

    def _turn(self, slow):
        self.steps += 1
        while self.news and self.news[0][0] <= self.steps:
            self.news.pop(0)[1]()
        ready = [t for t in self.live if self.rank_of[t] not in self.frozen]
        if not ready:
            self.frozen.clear()  # the others are done: the stopped rank is continued
            ready = self.live
        if not self.news and all(self.polled[t] >= POLLS for t in ready):
            self.clock += 2 * STALL_S
            self.polled.clear()
        fast = [t for t in ready if t != slow or self.rng.random() < self.share]
        self.at = self.rng.choice(fast or ready)
        self.go[self.at].release()
        self.back.acquire()

    def later(self, call):
        """Let ``call()`` happen at some step from now on, perhaps the next."""
        self.news.append((self.steps + self.rng.choice([0, 0, 5, 40]), call))
        self.news.sort(key=lambda item: item[0])
