"""What the roles of a traced round did, and when: the notes of cu/trace.cuh as spans of time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from epmoe.kernels.compile import SOURCES
from epmoe.kernels.fused import NOTE, NOTES, ROLES

HEADER = 2  # notes that the header takes


@dataclass(frozen=True, slots=True)
class Span:
    """One role of one CTA from ``begin`` to ``end``, nanoseconds of the GPU's own timer."""

    cta: int
    role: str
    name: str
    begin: float
    end: float


def names_of(kind: str) -> list[str]:
    """The values of ``enum Span`` or ``enum Role`` of cu/trace.cuh, in lower case.

    >>> names_of("Span")[:2]
    ['stage', 'tell']
    """
    source = (SOURCES / "trace.cuh").read_text()
    found = re.search(rf"enum {kind} \{{([^}}]*)\}}", source)
    if found is None:
        raise ValueError(f"kind must name an enum of trace.cuh, got {kind!r}")
    return [name.strip().lower() for name in found[1].split(",") if name.strip()]


def spans(notes: Tensor, grid: int) -> Iterator[Span]:
    """What ``FusedOps.notes`` holds after a round; waits for the GPU.

    Clocks of an SM become nanoseconds by the role's two common readings of clock and timer.
    """
    words = notes.cpu().numpy().view(np.uint64).reshape(grid, ROLES, NOTES, NOTE // 8)
    names, roles = names_of("Span"), names_of("Role")
    for cta in range(grid):
        for role in range(ROLES):
            told = words[cta, role]
            (clock, first), (last_clock, last) = told[:HEADER].tolist()
            if last_clock <= clock:
                continue  # this CTA has no such role
            rate = (last - first) / (last_clock - clock)
            taken = told[HEADER:]
            for end, packed in taken[: int((taken[:, 0] == 0).argmax())].tolist():
                length, name = packed & 0xFFFFFFFF, packed >> 32
                stop = first + (end - clock) * rate
                yield Span(cta, roles[role], names[name], stop - length * rate, stop)
