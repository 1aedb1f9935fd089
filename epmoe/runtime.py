"""One heap and its lanes, shared by the layers that were opened together: opened, poisoned, closed.

A fault makes the heap unusable, never the process: the error is kept, every peer is told in which
round this rank left, and all later calls raise.  Whoever wants to go on opens a new heap.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from epmoe import comm
from epmoe.accept import check_ranks, check_together
from epmoe.comm.group import Group
from epmoe.comm.heap import DeviceHeap, Heap
from epmoe.comm.layout import Layout, layout
from epmoe.comm.words import ROUNDS, LastWords, Words
from epmoe.config import MoEConfig
from epmoe.errors import ConfigMismatch, EpmoeError, PeerLost
from epmoe.kernels.ops import HEAD_FIELDS

if TYPE_CHECKING:
    from epmoe.comm.device_words import DeviceWords
    from epmoe.kernels.moving import Carrier

PROTOCOL = 1  # what two ranks must agree on beside their configs: words, layout, order of a round


@dataclass(slots=True)
class Lane:
    """One stream of rounds: its words, the round that comes next, and who is in it."""

    words: Words | DeviceWords
    round: int = 1  # as this process counts; a GPU's own count is the one that holds
    busy: threading.Lock = field(default_factory=threading.Lock)
    pools: dict[object, torch.Tensor] = field(default_factory=dict)  # layers take turns in them

    def next_round(self) -> int:
        """The round that comes next on this lane."""
        return self.round if isinstance(self.words, Words) else self.words.round()


class Runtime:
    """What the layers on one heap share.  Made by ``open`` only; ``close`` is local."""

    def __init__(
        self, configs: Sequence[MoEConfig], group: Group, heap: Heap, placed: Layout
    ) -> None:
        self.configs, self.group, self.heap, self.placed = tuple(configs), group, heap, placed
        self.pid = os.getpid()
        self.fault: BaseException | None = None
        self.closed = False
        self.carrier: Carrier | None = None  # made when experts move for the first time
        # What must let go before the heap can be unmapped.
        self.views: list[Callable[[], None]] = []
        self.device = torch.device("cpu")
        if configs[0].heap != "host":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.lanes = [Lane(self._words(lane)) for lane in range(configs[0].lanes)]
        # MPI's end waits for all ranks: one that ended without a word would keep them waiting.
        self._at_exit = functools.partial(_leave_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        weakref.finalize(self, atexit.unregister, self._at_exit).atexit = False

    def _words(self, lane: int) -> Words | DeviceWords:
        watch, heap = self.group.watch, self.heap
        if self.configs[0].heap == "host":
            return Words(
                heap,
                self.placed,
                lane,
                lost=watch.lost,
                describe=self.describe,
                state_of=self.state_of,
            )
        from epmoe.comm.device_words import DeviceWords

        if not isinstance(heap, DeviceHeap):
            raise EpmoeError(f"words on a GPU need a device heap, got {type(heap).__name__}")
        return DeviceWords(
            heap,
            self.placed,
            lane,
            watch=watch,
            describe=self.describe,
            state_of=self.state_of,
            head_fields=HEAD_FIELDS,
            limit_s=self.configs[0].open_s,
        )

    @classmethod
    def open(cls, configs: Sequence[MoEConfig], group: Group) -> Runtime:
        """Compare configs, then make and map the heap: every rank succeeds or every rank raises."""
        limit_s = configs[0].open_s if configs else 600.0
        compare(configs, group, limit_s)  # first: what follows would raise on the odd rank alone
        check_together(configs)
        for config in configs:
            check_ranks(config, group.size)
        placed = layout(configs, group.size)
        heap = comm.open_heap(configs[0].heap, group, placed.total, generation=1, limit_s=limit_s)
        made: Runtime | Heap = heap
        try:
            with group.guarded("make the words", limit_s):
                made = runtime = cls(configs, group, heap, placed)
        except BaseException:
            made.close()
            raise
        return runtime

    def host_words(self, lane: int) -> Words:
        """The words of a lane of a host heap."""
        words = self.lanes[lane].words
        if not isinstance(words, Words):
            raise EpmoeError(f"rounds on the host need a host heap, got {type(self.heap).__name__}")
        return words

    @contextmanager
    def turn(self, number: int) -> Iterator[Lane]:
        """The lane for one forward: in order, one caller at a time, never after a fault.

        Whatever leaves the body as an exception poisons the heap and tells the peers in which round
        this rank left; a refused batch must therefore be raised outside.
        """
        self.check()
        if not isinstance(number, int) or not 0 <= number < len(self.lanes):
            raise ValueError(f"lane must be in 0..{len(self.lanes) - 1}, got {number!r}")
        lane = self.lanes[number]
        if not lane.busy.acquire(blocking=False):
            raise EpmoeError(
                f"rank {self.group.rank}: lane {number} is in round {lane.round} already; another "
                "thread needs a lane of its own (config.lanes)"
            )
        try:
            yield lane
        except Exception as error:
            self.poison(error, lane.next_round())
            if self.closed:  # its views are gone: whatever this is, the close is the cause
                raise EpmoeError(
                    f"rank {self.group.rank}: this MoE was closed by another thread in round "
                    f"{lane.round} of lane {number}"
                ) from error
            raise
        except BaseException as error:
            self.poison(error, lane.next_round())
            raise
        finally:
            lane.busy.release()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A fault found on the GPU poisons the heap as one raised in a round does."""
        try:
            yield
        except EpmoeError as error:
            self.poison(error, self.lanes[0].next_round())
            raise

    def limit_s(self, lane: Lane) -> float:
        """The first round may wait for a peer that still compiles or loads; later ones may not."""
        return self.configs[0].open_s if lane.round == 1 else self.configs[0].stall_s

    def describe(self, rank: int) -> str:
        """How messages name a rank: its number, pid and host."""
        return str(self.group.peers[rank])

    def state_of(self, rank: int) -> str:
        """The operating system's word for what the process of ``rank`` is doing."""
        return self.group.watch.state_of(self.group.peers[rank])

    def check(self) -> None:
        """Raise what makes this heap unusable here, if anything does."""
        if os.getpid() != self.pid:
            raise EpmoeError(
                f"this MoE was opened by pid {self.pid} and is used in pid {os.getpid()}; "
                "a forked child cannot take part"
            )
        if self.closed:
            raise EpmoeError(f"rank {self.group.rank}: this MoE is closed")
        if self.fault is not None:
            raise EpmoeError(
                f"rank {self.group.rank}: this heap is unusable since "
                f"{type(self.fault).__name__}: {self.fault}"
            ) from self.fault

    def poison(self, error: BaseException, round: int) -> None:
        """Remember the first fault and tell every peer in every lane that this rank has left."""
        if self.fault is not None or self.closed or os.getpid() != self.pid:
            return  # a forked child is not a rank, and the heap is not mapped there
        self.fault = error
        if isinstance(error, PeerLost):
            why = LastWords(error.how, error.ranks, round, str(error).split("\n", 1)[0])
        else:
            text = f"{type(error).__name__}: {error}"
            why = LastWords("raised", (self.group.rank,), round, text)
        self._leave(why)

    def close(self) -> None:
        """Leave, tell the peers, unmap.  Waits for nobody; may be called twice."""
        if self.closed or os.getpid() != self.pid:
            return
        if self.fault is None:
            text = f"rank {self.group.rank} closed its MoE"
            self._leave(LastWords("closed", (self.group.rank,), 0, text))
        self.closed = True
        atexit.unregister(self._at_exit)
        for let_go in self.views:
            let_go()
        self.views.clear()  # they hold the lanes' work memory, and the group's watch holds this
        if self.fault is not None:
            _forget_views(self.fault)
        for lane in self.lanes:
            lane.pools.clear()
            lane.words.close()
        self.heap.close()

    def _leave(self, why: LastWords) -> None:
        """Each lane has rounds of its own: what it says is the next one of that lane."""
        for lane in self.lanes:
            round = lane.next_round() % ROUNDS
            lane.words.leave(LastWords(why.how, why.ranks, round, why.text))


def _leave_at_exit(runtime: weakref.ref[Runtime]) -> None:
    """A program that ends without ``close``: its peers learn of it, the rest ends with it."""
    found = runtime()
    if found is None or found.closed or found.fault is not None or found.pid != os.getpid():
        return
    with suppress(EpmoeError, RuntimeError):  # a GPU whose context is lost tells nobody
        if found.device.type != "cpu":
            torch.cuda.synchronize(found.device)  # rounds that are queued are still good
        found.poison(EpmoeError("the program ended without close"), found.lanes[0].next_round())


def _forget_views(error: BaseException) -> None:
    """Clear our frames in its traceback: one that was struck in mid-copy holds a view of a slab,
    which would stay mapped for as long as anybody keeps the error."""
    ours = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        ours = ours or frame.f_globals.get("__name__", "").startswith("epmoe.")
        if ours:  # and what we called: numpy's frames hold the arrays that they were given
            with suppress(RuntimeError):  # still running: it is on its way out and needs no help
                frame.clear()


def compare(configs: Sequence[MoEConfig], group: Group, limit_s: float) -> None:
    """Every field of every layer, and the protocol, on all ranks: equal, or all ranks raise."""
    facts = {"protocol": str(PROTOCOL), "layers": str(len(configs))}
    for layer, config in enumerate(configs):
        facts |= {f"layer {layer} {name}": value for name, value in config.described().items()}
    agree(facts, group, what="configs", limit_s=limit_s)


def agree(facts: Mapping[str, str], group: Group, *, what: str, limit_s: float) -> None:
    """The same facts on all ranks, or a ``ConfigMismatch`` on all, naming the first difference."""
    answers = group.allgather(json.dumps(dict(facts)).encode(), what=what, limit_s=limit_s)
    everyone = [json.loads(answer) for answer in answers]
    for rank, theirs in enumerate(everyone):
        for name in everyone[0] | theirs:
            here, there = everyone[0].get(name), theirs.get(name)
            if here != there:
                raise ConfigMismatch(
                    f"{name} is {here} on {group.peers[0]} and {there} on {group.peers[rank]}"
                )
