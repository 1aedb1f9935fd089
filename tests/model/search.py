"""Every state a protocol can reach, breadth first, until one is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from model.machine import Machine, Wrong
from model.protocol import Protocol


@dataclass(frozen=True)
class Result:
    """What a search saw: how much, and the first violation with the shortest way to it."""

    states: int
    moves: int
    wrong: str = ""
    path: tuple[str, ...] = ()


def search(protocol: Protocol, *, rounds: int = 2, fault: str = "") -> Result:
    """Every state; ``fault`` is "", "leave" or "crash": at most one at first, at any point."""
    machine = Machine(protocol, rounds, fault)
    result = _all_states(machine, turn=True)
    return _all_states(machine, turn=False) if result.wrong else result


def _all_states(machine: Machine, *, turn: bool) -> Result:
    """``turn`` takes a state and its rotations as one; without it, paths keep their ranks."""
    size, block, near, ranks = machine.size, machine.block, machine.near, machine.protocol.ranks
    top, busy = size * (ranks - 1), {i for i, p in enumerate(machine.places) if p.state == "runs"}
    known: dict[int, list[tuple[int, int]]] = {}
    seen, todo, moves = {0: -1}, [0], 0
    for state in todo:
        before, turned = moves, state
        for turns in range(ranks):
            key = turned & near
            if key not in known:
                try:
                    known[key] = [
                        (new, ~block & ~machine.inbound if stopped else ~block)
                        for new, stopped in machine.moves_of(key)
                    ]
                except Wrong as wrong:
                    return Result(len(seen), moves, str(wrong), _path(machine, seen, state))
            for new, keep in known[key]:
                moves += 1
                least = after = turned & keep | new
                for back in range(1, ranks):
                    after = after >> size | (after & block) << top
                    if after < least if turn else (turns + back == ranks):
                        least = after
                if least not in seen:
                    seen[least] = state
                    todo.append(least)
            turned = turned >> size | (turned & block) << top
        if moves == before and any(state >> i * size & 255 in busy for i in range(ranks)):
            return Result(len(seen), moves, "hang", _path(machine, seen, state))
    return Result(len(seen), moves)


def _path(machine: Machine, seen: dict[int, int], state: int) -> tuple[str, ...]:
    """Where the ranks stand, state by state, on the shortest way to ``state``."""
    way = []
    while state >= 0:
        here = [
            machine.places[state >> i * machine.size & 255] for i in range(machine.protocol.ranks)
        ]
        acts = [" ".join(f"{a}({e})" for a, e in (machine.steps + [[]])[p.pc]) for p in here]
        way.append(" | ".join(f"{p.state:4} {a:24}" for p, a in zip(here, acts, strict=True)))
        state = seen[state]
    return tuple(reversed(way))
