"""Notes of a round as spans: clocks to nanoseconds, roles that are lacking, roles that are full."""

import numpy as np
import pytest
import torch

from epmoe.kernels.fused import NOTE, NOTES, ROLES
from epmoe.kernels.trace import HEADER, WAITS, Span, decode, names_of, spans

SPANS, ROLE = names_of("Span"), names_of("Role")
TIMER = 1_763_703_634_000_000_123  # an epoch's nanoseconds: a float64 of it is right to 256 ns


class Notes:
    """What the kernel would have written, a role at a time."""

    def __init__(self, grid):
        self.words = np.zeros((grid, ROLES, NOTES, NOTE // 8), np.int64)

    def role(self, cta, role, first, last, taken=()):
        mine = self.words[cta, ROLE.index(role)]
        mine[:HEADER] = np.array([*first, *last]).reshape(HEADER, 2)
        for note, (end, length, name) in zip(mine[HEADER:], taken, strict=False):
            note[:] = end, SPANS.index(name) << 32 | length
        return self

    def tensor(self):
        return torch.from_numpy(self.words.view(np.uint8).reshape(-1))


def test_clocks_become_nanoseconds_of_the_gpu_since_its_first_reading():
    notes = Notes(2)
    notes.role(
        *(0, "feeder", (1000, TIMER), (3000, TIMER + 1000)),
        [(1500, 500, "take"), (2000, 500, "feed"), (2600, 600, "wait_rows")],
    )
    # Another SM has other clocks, and began 40 ns later.
    notes.role(*(1, "scout", (70000, TIMER + 40), (72000, TIMER + 1040)), [(71000, 400, "idle")])
    assert list(spans(notes.tensor(), 2)) == [
        Span(0, "feeder", "take", 0, 250),
        Span(0, "feeder", "feed", 250, 500),
        Span(0, "feeder", "wait_rows", 500, 800),
        Span(1, "scout", "idle", 340, 540),
    ]
    assert decode(notes.tensor(), 2).timer == TIMER


def test_the_pace_of_the_clock_may_change_within_a_round():
    """Readings of other roles of the CTA bend the line: 2 clocks a nanosecond, then 1."""
    notes = Notes(1).role(0, "whole_cta", (0, TIMER), (60_000, TIMER + 50_000))
    notes.role(
        *(0, "scout", (20_000, TIMER + 10_000), (40_000, TIMER + 30_000)),
        [(20_500, 500, "idle"), (30_000, 9500, "turn_id")],
    )
    notes.role(0, "feeder", (100, TIMER + 50), (59_000, TIMER + 49_000), [(20_500, 1000, "feed")])
    assert [(s.begin, s.end) for s in spans(notes.tensor(), 1)] == [
        (10_000, 10_500),
        (10_500, 20_000),
        (9750, 10_500),
    ]


def test_a_reading_that_was_held_up_is_late_and_gives_way_to_those_after_it():
    notes = Notes(1).role(0, "whole_cta", (0, TIMER), (9000, TIMER + 9000), [(6000, 5600, "work")])
    notes.role(0, "scout", (400, TIMER + 2500), (8000, TIMER + 8000), [(900, 100, "idle")])
    notes.role(0, "feeder", (2000, TIMER + 2000), (7000, TIMER + 7000), [(2000, 1000, "take")])
    made = decode(notes.tensor(), 1).spans
    assert (made["end"] >= made["begin"]).all()
    assert made["end"].tolist() == [6000, 2000, 2000]


def test_a_role_that_a_cta_lacks_has_no_spans():
    notes = Notes(3).role(1, "scout", (10, TIMER), (30, TIMER + 10), [(20, 4, "idle")])
    notes.role(2, "feeder", (10, TIMER), (0, 0), [(20, 4, "idle")])  # it never ended
    made = decode(notes.tensor(), 3)
    assert made.spans[["cta", "role"]].tolist() == [(1, ROLE.index("scout"))]
    assert made.full == ()


def test_a_full_role_keeps_all_its_notes_and_says_so():
    room = NOTES - HEADER
    notes = Notes(2)
    notes.role(
        *(0, "scout", (0, TIMER), (2 * room + 900, TIMER + room + 450)),
        [(2 * i + 2, 2, "find_tile") for i in range(room + 5)],
    )
    notes.role(
        *(1, "scout", (0, TIMER), (2 * room, TIMER + room)),
        [(2 * i + 2, 2, "idle") for i in range(room - 1)],
    )
    made = decode(notes.tensor(), 2)
    assert np.bincount(made.spans["cta"]).tolist() == [room, room - 1]
    assert made.full == ((0, "scout"),)
    assert made.spans["end"][room - 1] == room


def test_spans_of_a_role_touch_and_never_overlap():
    """Viewers refuse threads whose spans overlap; a rate that is no whole number rounds."""
    ends = np.cumsum(np.arange(1, 400) % 37 + 1) + 1000
    taken = [(end, length, "fc1") for end, length in zip(ends[1:], np.diff(ends), strict=True)]
    notes = Notes(1).role(0, "first_group", (1000, TIMER), (9711, TIMER + 4567), taken)
    made = decode(notes.tensor(), 1).spans
    assert len(made) == len(taken)
    assert (made["begin"][1:] == made["end"][:-1]).all()


def test_no_notes_are_no_spans():
    made = decode(Notes(2).tensor(), 2)
    assert len(made.spans) == 0
    assert made.full == ()


def test_a_note_of_no_span_is_refused():
    notes = Notes(1).role(0, "scout", (10, TIMER), (30, TIMER + 10), [(20, 4, "idle")])
    notes.words[0, ROLE.index("scout"), HEADER, 1] = len(SPANS) << 32 | 4
    with pytest.raises(ValueError, match=f"CTA 0 name span {len(SPANS)} of {len(SPANS)}"):
        decode(notes.tensor(), 1)


def test_names_are_those_of_the_kernel():
    assert len(ROLE) == ROLES + 1  # the last one is their number
    assert ROLE[ROLES] == "traced"
    assert set(SPANS) >= WAITS
    with pytest.raises(ValueError, match="kind must name an enum of trace.cuh, got 'Note'"):
        names_of("Note")
