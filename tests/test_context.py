"""A context is checked when it is made."""

from __future__ import annotations

import dataclasses

import pytest

from epmoe.context import PHASES, ForwardContext

WRONG = [
    ({"phase": "train"}, ValueError, "phase must be one of .*'train'"),
    ({"phase": None}, ValueError, "phase must be one of .*None"),
    ({"rows": [1, 2]}, TypeError, "rows must be a tuple of int"),
    ({"rows": 3}, TypeError, "rows must be a tuple of int"),
    ({"rows": (1, 2.0)}, TypeError, "rows must be a tuple of int"),
    ({"rows": ()}, ValueError, "rows must be at least 0 on every rank"),
    ({"rows": (1, -1)}, ValueError, r"rows must be at least 0 on every rank, got \(1, -1\)"),
    ({"epoch": -1}, ValueError, "epoch must be at least 0, got -1"),
    ({"epoch": "1"}, TypeError, "epoch must be an int, got str"),
]


@pytest.mark.parametrize(("given", "error", "text"), WRONG, ids=[str(g) for g, _, _ in WRONG])
def test_what_is_wrong_is_named(given, error, text):
    with pytest.raises(error, match=text):
        ForwardContext(**given)


def test_what_is_right_is_kept_and_cannot_change():
    for phase in PHASES:
        context = ForwardContext(phase=phase, rows=(0, 5), epoch=2)
        assert (context.phase, context.rows, context.epoch) == (phase, (0, 5), 2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            context.epoch = 3
