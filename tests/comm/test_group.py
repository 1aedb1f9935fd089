"""Ranks meet, prove who they are, exchange values, and learn of each other's end."""

from __future__ import annotations

import pytest
from ranks import ranks

from epmoe.errors import EpmoeError


@ranks(1, 2, 4)
def test_every_rank_gets_every_value(rank, group):
    for turn in range(20):
        said = group.allgather(bytes([rank, turn]) * turn, what="turn", limit_s=5)
        assert said == [bytes([r, turn]) * turn for r in range(group.size)]


@ranks(4)
def test_one_failing_rank_fails_the_phase_for_all(rank, group):
    def phase():
        with group.guarded("phase", 5):
            if rank == 2:
                raise KeyError("boom")

    with pytest.raises(KeyError if rank == 2 else EpmoeError, match="boom"):
        phase()
    assert group.allgather(b"", what="after", limit_s=5) == [b""] * 4
