"""What the roles of a traced round did, and when: the notes of cu/trace.cuh as spans of time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from epmoe.kernels.compile import SOURCES
from epmoe.kernels.fused import NOTE, NOTES, ROLES

HEADER = 2  # notes that the header takes
# Spans in which a role can only wait: for a peer, or for another role of its rank.  Work has waits
# inside too (a product waits for its operands), which the notes do not tell apart.
WAITS = frozenset({"wait_c", "wait_y", "wait_rows", "wait_half", "take", "idle"})
# One span: its CTA, which role, which name, nanoseconds since the round's first reading.
SPAN = np.dtype([("cta", "<u2"), ("role", "u1"), ("name", "u1"), ("begin", "<i8"), ("end", "<i8")])
Spans = npt.NDArray[np.void]  # of SPAN


@dataclass(frozen=True, slots=True)
class Span:
    """One role of one CTA from ``begin`` to ``end``, nanoseconds since the round began here."""

    cta: int
    role: str
    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Traced:
    """A round as one GPU saw it.  ``timer`` is that GPU's timer at nanosecond 0 of the spans.

    ``full`` names the roles (CTA, role) that used all their notes: what they did later is lacking.
    """

    timer: int
    spans: Spans
    full: tuple[tuple[int, str], ...]


def names_of(kind: str) -> list[str]:
    """The values of ``enum Span`` or ``enum Role`` of cu/trace.cuh, in lower case.

    >>> names_of("Span")[:2]
    ['tell', 'wait_c']
    """
    source = (SOURCES / "trace.cuh").read_text()
    found = re.search(rf"enum {kind} \{{([^}}]*)\}}", source)
    if found is None:
        raise ValueError(f"kind must name an enum of trace.cuh, got {kind!r}")
    return [name.strip().lower() for name in found[1].split(",") if name.strip()]


def decode(notes: Tensor, grid: int) -> Traced:
    """What ``FusedOps.notes`` holds after one round from cleared notes; waits for the GPU.

    Notes are in clocks of their SM; the readings of clock and timer that the roles of a CTA took
    when they began and ended make them nanoseconds, with a straight line from each reading to the
    next.  Between the first tens of microseconds and the last there is none, and an H200 that went
    in at 1.98 GHz ran at 1.78 on average there: a span in the middle of a round of 340 us may be
    drawn some microseconds off, and longer or shorter by a tenth.

    Example: readings (clock 1000, timer 5000) and (3000, 6000), a note that ends at clock 2000 and
    is 400 clocks long: nanoseconds 300 to 500 since 5000.
    """
    words = notes.cpu().numpy().view(np.int64).reshape(grid, ROLES, NOTES, NOTE // 8)
    readings = words[:, :, :HEADER].reshape(grid, ROLES, 2, 2)  # first, last: clock, timer
    there = readings[:, :, 1, 0] > readings[:, :, 0, 0]  # a CTA has not every role
    if not there.any():
        return Traced(0, np.zeros(0, SPAN), ())
    roles, names = names_of("Role"), names_of("Span")
    timer = readings[there][:, 0, 1].min()
    found, full = [], []
    for cta in range(grid):
        if not there[cta].any():
            continue
        clock, since = _line(readings[cta][there[cta]].reshape(-1, 2) - np.array([0, timer]))
        for role in np.flatnonzero(there[cta]):
            taken = words[cta, role, HEADER:]
            taken = taken[: np.count_nonzero(taken[:, 0])]
            name, length = taken[:, 1] >> 32, taken[:, 1] & 0xFFFFFFFF
            if len(taken) and name.max() >= len(names):
                raise ValueError(f"notes of CTA {cta} name span {name.max()} of {len(names)}")
            if len(taken) == NOTES - HEADER:
                full.append((cta, roles[role]))
            spans = np.zeros(len(taken), SPAN)
            spans["cta"], spans["role"], spans["name"] = cta, role, name
            # From clocks, not from the end's nanoseconds: a span begins where the one before ends.
            spans["begin"] = np.rint(np.interp(taken[:, 0] - length, clock, since))
            spans["end"] = np.rint(np.interp(taken[:, 0], clock, since))
            found.append(spans)
    return Traced(int(timer), np.concatenate(found), tuple(full))


def _line(readings: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Readings by clock, none later than those after it: a warp that was held up between its clock
    and its timer read the timer too late, never too early."""
    clock, first = np.unique(readings[:, 0], return_index=True)
    since = readings[first, 1]
    return clock, np.minimum.accumulate(since[::-1])[::-1]


def spans(notes: Tensor, grid: int) -> Iterator[Span]:
    """The spans of ``decode`` one by one, by CTA and role, each role's in order of time."""
    roles, names = names_of("Role"), names_of("Span")
    for cta, role, name, begin, end in decode(notes, grid).spans.tolist():
        yield Span(cta, roles[role], names[name], begin, end)
