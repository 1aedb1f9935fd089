"""The round is searched in every order of events; and what the search is worth: it finds mutants.

The properties, all checked in every state: no row, list or result of another round is read; none is
overwritten before it was used; nobody hangs; a round that returns is right whatever happens
elsewhere; a round that nobody left incomplete is returned.  docs/protocol.md gives the reasons.
"""

import pytest
from model.protocol import AHEAD, FINEST, ROUND, Protocol, one_neighbour
from model.search import search

FAULTS = ("", "leave", "crash")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("protocol", "rounds", "at_least"),
    [
        (Protocol(), 3, 15_000),
        (Protocol(program=FINEST), 2, 40_000),
        (Protocol(program=FINEST, rows=one_neighbour), 2, 25_000),
        (Protocol(program=AHEAD, ranks=2, lanes=2), 4, 700),
    ],
    ids=["three rounds", "finest steps", "rows for one neighbour only", "two lanes"],
)
def test_no_order_of_events_breaks_the_round(protocol, rounds, at_least, fault):
    result = search(protocol, rounds=rounds, fault=fault)
    assert not result.wrong, "\n".join((result.wrong, *result.path))
    assert result.states >= at_least  # a search that sees too little proves nothing


@pytest.mark.night
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("protocol", "rounds"),
    [
        (Protocol(program=FINEST), 3),
        (Protocol(program=AHEAD, lanes=2), 2),
        (Protocol(ranks=4), 1),
    ],
    ids=["finest steps, three rounds", "two lanes, three ranks", "four ranks"],
)
def test_the_larger_searches(protocol, rounds, fault):
    result = search(protocol, rounds=rounds, fault=fault)
    assert not result.wrong, "\n".join((result.wrong, *result.path))


# Each is a mistake somebody could make, in one line; the search must name what it leads to.
MUTANTS = {
    "all lists are read again after the first Y was sent": (
        Protocol(program=(*ROUND[:3], ("Y1",), ("copy",), ("Y2",), ROUND[4])),
        "",
        "lists of round 2 overwrite",
    ),
    "C is sent before the lists it announces": (
        Protocol(early_word="C"),
        "",
        "copy in round 1 reads lists of another",
    ),
    "Y is sent before the results it announces": (
        Protocol(early_word="Y"),
        "",
        "read in round 1 reads results of another",
    ),
    "C is sent before my rows are staged": (
        Protocol(program=(("C*",), ("stage",), *ROUND[2:])),
        "",
        "pull in round 1 reads rows of another",
    ),
    "the next rows are staged before all Y are in": (
        Protocol(program=(*ROUND[1:4], ("stage+1",), ROUND[4])),
        "",
        "overwrites rows before they are pulled",
    ),
    "Y is sent before the rows are pulled": (
        Protocol(program=(*ROUND[:2], ("waitC", "copy"), ("Y*",), ("pull",), ROUND[4])),
        "",
        "overwrites rows before they are pulled",
    ),
    "no Y to a rank that had no rows for me": (
        Protocol(rows=one_neighbour, serves_all=False),
        "",
        "hang",
    ),
    "wait for C only of those that I have rows for": (
        Protocol(rows=one_neighbour, waits_C_of_all=False),
        "",
        "copy in round 1 reads lists of another",
    ),
    "wait for Y only of those that I have rows for": (
        Protocol(rows=one_neighbour, waits_Y_of_all=False),
        "",
        "overwrite",
    ),
    "cells are cleared ahead, before the peer's C of this round": (
        Protocol(program=(("stage",), ("V*",), *ROUND[1:])),
        "",
        "results of round 2 overwrite",
    ),
    "the results are summed later, when the next C is already out": (
        Protocol(program=(*ROUND[:2], ("read-1",), *ROUND[2:4], ("waitY",))),
        "",
        "results of round 2 overwrite",
    ),
    "the lists become private only after Y": (
        Protocol(program=(*ROUND[:2], ("waitC", "pull"), ("Y*",), ("copy",), ROUND[4])),
        "",
        "lists of round 2 overwrite",
    ),
    "a word does not say its round": (
        Protocol(rounds_in_words=False),
        "",
        "another round",
    ),
    "a rank leaves without a word": (Protocol(tells=False), "leave", "hang"),
    "nobody listens to the system's notice of a death": (Protocol(notices=False), "crash", "hang"),
    "any abort stops me": (
        Protocol(only_needed_stops=False),
        "leave",
        "nobody that stopped has left incomplete",
    ),
    "the gone word overtakes the words before it": (
        Protocol(gone_is_release=False),
        "leave",
        "nobody that stopped has left incomplete",
    ),
    "a waiter reads its words first and the gone words after": (
        Protocol(gone_before_words=False),
        "leave",
        "nobody that stopped has left incomplete",
    ),
    "a death is believed without a second look at the words": (
        Protocol(gone_before_words=False),
        "crash",
        "nobody that stopped has left incomplete",
    ),
    "two lanes: the gone word carries the newest round begun": (
        Protocol(program=AHEAD, ranks=2, lanes=2, gone_round="newest"),
        "leave",
        "hang",
    ),
    "two micro-batches in one lane": (
        Protocol(program=AHEAD, lanes=1),
        "",
        "overwrite",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_search_finds_every_mutant(mutant):
    protocol, fault, consequence = MUTANTS[mutant]
    result = search(protocol, fault=fault)
    assert consequence in result.wrong, f"saw {result.wrong or 'nothing'} in {result.states} states"
