"""What ranks that run a protocol can do next, from any state: its bits, its moves, its checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from model.protocol import Protocol


@dataclass(frozen=True)
class Place:
    """Where a rank stands: before step ``pc``; what it staged last, what it sent to whom."""

    pc: int
    state: str  # runs | done | left | dead
    staged: tuple[int, ...]  # per lane
    sent: tuple[int, ...]  # per neighbour, neighbour 1 first


class Wrong(Exception):
    """A state that the protocol must never reach."""


LANDS = (("copy", "lists"), ("waitC", "C"), ("read", "results"), ("waitY", "Y"))
Move = tuple[int, bool]


class Machine:
    """All moves of the ranks that run ``protocol``.

    A state is one int of one block per rank, rank 0 lowest.  A block is the index of the rank's
    place, the bits that arrived of its channel to neighbour 1, 2, ..., and which words were lacking
    at the last look (used by one mutant only).  Bits of a channel: lists, C, results, Y of round 1,
    the same four of round 2, ..., then the gone word.
    """

    def __init__(self, protocol: Protocol, rounds: int, fault: str) -> None:
        self.protocol, self.rounds, self.fault = protocol, rounds, fault
        self.neighbours = range(1, protocol.ranks)
        self.steps = self._unroll()
        self.width = 4 * rounds + 1
        self.gone = 1 << 4 * rounds
        self.order: dict[int, list[int]] = {k: [] for k in self.neighbours}
        self.places: list[Place] = []
        self.index: dict[Place, int] = {}
        self.running: list[int] = []  # place index of "before step pc"
        self.ends: list[list[tuple[int, int]]] = []  # per pc: (left, dead) at every point in it
        self._walk()
        self.look = 8 + self.width * (protocol.ranks - 1)
        self.size = self.look + protocol.ranks - 1
        self.block = (1 << self.size) - 1
        # What the moves of rank 0 depend on: its block, the others' places, what arrived here.
        self.inbound = 0
        self.near = self.block
        for k in self.neighbours:
            back = (1 << self.width) - 1 << self._at(protocol.ranks - k)
            self.inbound |= back << k * self.size
            self.near |= (back | 255) << k * self.size

    def _at(self, k: int) -> int:
        """The first bit of the channel to neighbour ``k`` in a block."""
        return 8 + self.width * (k - 1)

    # --- the program ---------------------------------------------------------------------------

    def _unroll(self) -> list[list[tuple[str, int]]]:
        steps, program = [], []
        for acts in self.protocol.program:
            each = self.neighbours if "*" in acts[0] else (0,)
            program += [[act.replace("*", str(k)) for act in acts] for k in each]
        for e in range(self.rounds + 2):
            for acts in program:
                step = []
                for act in acts:
                    name, shift = (act[:-2], int(act[-2:])) if act[-2] in "+-" else (act, 0)
                    if 1 <= e + shift <= self.rounds:
                        step.append((name, e + shift))
                if step:
                    steps.append(step)
        return steps

    def _messages(self, act: str, e: int) -> list[int]:
        """The bits that ``act`` sends, in program order: L lists, C both, V results, Y both."""
        first, results = 1 << 4 * (e - 1), []
        if act[0] in "LC":
            return [first, first << 1][: 1 + (act[0] == "C")]
        if self.protocol.rows(e, self.protocol.ranks - int(act[1])):
            results = [first << 2]
        if act[0] == "V" or not (results or self.protocol.serves_all):
            return results
        return [*results, first << 3]

    def _walk(self) -> None:
        """Every place a rank can be in, by running the program once."""
        staged, sent = [0] * self.protocol.lanes, [0 for _ in self.neighbours]

        def place(pc: int, state: str) -> int:
            it = Place(pc, state, tuple(staged), tuple(sent))
            if it not in self.index:
                self.index[it] = len(self.places)
                self.places.append(it)
            return self.index[it]

        for pc, step in enumerate([*self.steps, []]):
            self.running.append(place(pc, "runs" if step else "done"))
            ends = [(place(pc, "left"), place(pc, "dead"))]
            for act, e in step:
                if act == "stage":
                    staged[e % self.protocol.lanes] = e
                for bit in self._messages(act, e) if act[0] in "LCVY" else ():
                    k = int(act[1])
                    if not sent[k - 1] & bit:
                        sent[k - 1] |= bit
                        self.order[k].append(bit)
                        ends.append((place(pc, "left"), place(pc, "dead")))
            self.ends.append(ends[:-1] if len(ends) > 1 else ends)
        if len(self.places) > 255:
            raise ValueError(f"a place has 8 bits, this program has {len(self.places)} places")

    def _finished(self, pc: int, act: str) -> int:
        """The last round for which a rank before step ``pc`` has nothing of ``act`` left to do."""
        left = [e for step in self.steps[pc:] for name, e in step if name.startswith(act)]
        return min(left, default=self.rounds + 1) - 1

    def _before(self, k: int, bit: int) -> int:
        """The bits that must have arrived at neighbour ``k`` before ``bit`` can."""
        kind = (bit.bit_length() - 1) % 4
        same_place = bit >> 4 * self.protocol.lanes & sum(self.order[k])
        if kind in (0, 2) or self.protocol.early_word == ".C.Y"[kind]:
            return same_place
        earlier = self.order[k]
        return sum(earlier[: earlier.index(bit)])

    # --- what one rank can do next ---------------------------------------------------------------

    def moves_of(self, near: int) -> Iterator[Move]:
        """Moves of the lowest block: its new value, and whether the rank stopped with it."""
        me, channel = near & self.block, (1 << self.width) - 1
        place = self.places[me & 255]
        others = [self.places[near >> k * self.size & 255] for k in self.neighbours]
        inbound = [
            near >> k * self.size + self._at(self.protocol.ranks - k) & channel
            for k in self.neighbours
        ]
        for k, it in zip(self.neighbours, others, strict=True):
            for bit in self._deliveries(k, place, me >> self._at(k) & channel, it):
                yield me | bit << self._at(k), False
        if self.fault and all(it.state in ("runs", "done") for it in (place, *others)):
            for left, dead in self.ends[place.pc]:
                if self.fault == "leave":
                    yield me & ~255 | left, True
                elif place.state == "runs":
                    yield me & ~255 | dead, True
        if place.state == "runs":
            yield from self._local(me, place, others, inbound)

    def _deliveries(self, k: int, place: Place, arrived: int, at: Place) -> Iterator[int]:
        """Everything under way to neighbour ``k`` that may arrive now."""
        if at.state != "runs":  # it looks at nothing any more
            return
        sent, lanes = place.sent[k - 1], self.protocol.lanes
        for bit in self.order[k]:
            if sent & bit and not arrived & bit and not self._before(k, bit) & ~arrived:
                round0, kind = divmod(bit.bit_length() - 1, 4)
                act, what = LANDS[kind]
                if self._finished(at.pc, act) < round0 + 1 - lanes:
                    raise Wrong(f"{what} of round {round0 + 1} overwrite older ones before {act}")
                yield bit
        tells = place.state == "left" and self.protocol.tells and not arrived & self.gone
        if tells and (arrived == sent or not self.protocol.gone_is_release):
            yield self.gone

    def _local(
        self, me: int, place: Place, others: list[Place], inbound: list[int]
    ) -> Iterator[Move]:
        """The next step of a running rank; or, at a wait, the look and the raise."""
        wait, e = self.steps[place.pc][0]
        free = me & (1 << self.look) - 1 & ~255
        if wait.startswith("wait"):
            lack, lacked = self._lacking(wait[4], e, inbound), me >> self.look
            if not self.protocol.gone_before_words:
                if lack and not lacked:
                    yield me | lack << self.look, False
            else:
                lacked = lack
            if not self.protocol.only_needed_stops and lacked:
                lacked = -1
            if self._hears(lacked, e, others, inbound):
                self._must_raise(e, others)
                yield free | self.ends[place.pc][0][0], True
            if lack:
                return
        for act, act_round in self.steps[place.pc]:
            self._check(act, act_round, others, inbound)
        here = self.running[place.pc + 1]
        yield free | here, self.places[here].state == "done"

    def _lacking(self, word: str, e: int, inbound: list[int]) -> int:
        """Which neighbours' words are not in yet, as a mask."""
        p, bits = self.protocol, 1 << 4 * (e - 1) + {"C": 1, "Y": 3}[word]
        if not p.rounds_in_words:
            bits |= sum(bits >> 4 * i for i in range(e))
        of_all = p.waits_C_of_all if word == "C" else p.waits_Y_of_all
        return sum(
            1 << k - 1
            for k, came in zip(self.neighbours, inbound, strict=True)
            if (of_all or p.rows(e, k)) and not came & bits
        )

    def _hears(self, asked: int, e: int, others: list[Place], inbound: list[int]) -> bool:
        """True if a neighbour in the mask is known to be gone, in this round or before."""
        p = self.protocol
        for k, it, came in zip(self.neighbours, others, inbound, strict=True):
            if not asked >> k - 1 & 1:
                continue
            if it.state == "dead" and p.notices and came == it.sent[p.ranks - k - 1]:
                return True
            if came & self.gone:
                newest = p.gone_round == "newest"
                carried = max(it.staged) if newest else self._finished(it.pc, "read") + 1
                if p.gone_round == "none" or carried <= e:
                    return True
        return False

    def _must_raise(self, e: int, others: list[Place]) -> None:
        """A rank may raise only if someone has stopped before it gave all that the round needs."""
        last = 1 << 4 * e - 1
        for k, it in zip(self.neighbours, others, strict=True):
            if it.state in ("left", "dead") and not it.sent[self.protocol.ranks - k - 1] & last:
                return
        raise Wrong(f"raises in round {e}, which nobody that stopped has left incomplete")

    def _check(self, act: str, e: int, others: list[Place], inbound: list[int]) -> None:
        """What an act reads must be of its own round; what it overwrites must have been read."""
        p = self.protocol
        for k, it, came in zip(self.neighbours, others, inbound, strict=True):
            if act[-1].isdigit() and int(act[-1]) != k:
                continue
            bits = (came & ~self.gone) >> 4 * (e - 1)  # this round's four, and those of later ones
            later = bits >> 4 * p.lanes
            if act.startswith("copy") and not (bits & 1 and not later & 1):
                raise Wrong(f"copy in round {e} reads lists of another round")
            if act.startswith("read") and p.rows(e, k) and not (bits & 4 and not later & 4):
                raise Wrong(f"read in round {e} reads results of another round")
            if act.startswith("pull") and p.rows(e, p.ranks - k) and it.staged[e % p.lanes] != e:
                raise Wrong(f"pull in round {e} reads rows of another round")
            late = it.state == "runs" and self._finished(it.pc, "pull") < e - p.lanes
            if act == "stage" and late and p.rows(e - p.lanes, k):
                raise Wrong(f"stage in round {e} overwrites rows before they are pulled")
