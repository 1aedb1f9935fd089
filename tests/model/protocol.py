"""The protocol of a round as a finite machine, searched completely.

A few ranks run a few rounds.  A rank is a list of steps; a message is one bit of one channel.

    stage     my rows of this round go into my slab         peers read them there
    C1 C2 ..  row lists, then word C, to one neighbour       lists land in the neighbour's mailbox
    waitC     C of this round is in from every neighbour
    copy      the lists become private
    pull      rows are read from the neighbours' slabs
    Y1 Y2 ..  results, then word Y, to one neighbour         results land in the neighbour's cells
    waitY     Y of this round is in from every neighbour
    read      results are summed; the round is returned

Memory is weak: what a rank sent may arrive in any order, any time later, except that a word arrives
after everything its rank sent to that neighbour before it (release), and two writes to one place
keep their order.  A rank may stop at any point, between data and word too: it *leaves* (its gone
word is one more release) or it *crashes* (the system tells the others; what it stored is visible by
then).  A rank that waits for a word that cannot come any more raises, and so leaves as well.

Everything in one tuple of ``Protocol.program`` happens at once.  ``ROUND`` takes a wait with the
reads behind it, ``FINEST`` takes every read and every write alone; both are searched.

The state of a rank is its place in the program and the bits that arrived of what it sent; all
memory follows from that.  The machine looks the same from every rank, so a state and its rotations
are searched once.  Every move makes a number grow, so there is no endless run: a hang is a state
without a move in which some rank has neither finished nor stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Program = tuple[tuple[str, ...], ...]

ROUND: Program = (
    ("stage",),
    ("C*",),
    ("waitC", "copy", "pull"),
    ("Y*",),
    ("waitY", "read"),
)
FINEST: Program = tuple(
    (act,)
    for act in (
        *("stage", "L1", "C1", "L2", "C2", "waitC", "copy1", "copy2", "pull1", "pull2"),
        *("V1", "Y1", "V2", "Y2", "waitY", "read1", "read2"),
    )
)
AHEAD: Program = (("stage+1",), ("C*+1",), *ROUND[2:])  # the next round is begun before this pull


def everybody(round: int, offset: int) -> bool:
    """Every rank has rows for every neighbour in every round."""
    return True


def one_neighbour(round: int, offset: int) -> bool:
    """Rows go to one neighbour only, and to another one in the next round."""
    return offset == (1 if round % 2 else 2)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The round as it should be.  A mutant is this with one field replaced.

    In ``program``, ``act+1`` is the act of the next round and ``act-1`` of the one before; a digit
    is a neighbour, without it all of them; ``*`` makes one step for each.  ``rows(e, o)``: does
    every rank have rows for the rank ``o`` places further in round e.  Round e uses the regions of
    lane ``e % lanes``.
    """

    ranks: int = 3
    program: Program = ROUND
    lanes: int = 1
    rows: Callable[[int, int], bool] = everybody
    early_word: str = ""  # this word (C or Y) may arrive before what was sent ahead of it
    serves_all: bool = True  # Y goes to a neighbour without rows for me, too
    rounds_in_words: bool = True  # a word says which round it is for
    waits_C_of_all: bool = True  # not only of those that I have rows for
    waits_Y_of_all: bool = True  # not only of those that I have rows for
    tells: bool = True  # a rank that leaves writes its gone word
    notices: bool = True  # the system's notice of a death reaches the waiters
    gone_is_release: bool = True  # the gone word arrives after all that was sent before it
    gone_round: str = "oldest"  # it carries the oldest round not returned | newest begun | none
    gone_before_words: bool = True  # a waiter reads the gone words first and then the words
    only_needed_stops: bool = True  # a rank that is gone stops me only if I lack its word
