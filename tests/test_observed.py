"""Loads of rounds that run later: looking changes nothing, beginning a forward does."""

import pytest
import torch

from epmoe.observed import Observed


class Queued:
    """Rounds on a GPU, as far as loads are concerned: a total that grows."""

    def __init__(self):
        self.total_E = torch.zeros(2, dtype=torch.int64)

    def counted(self):
        return self.total_E.clone()


@pytest.fixture
def layer():
    lanes = [Queued(), Queued()]
    return lanes, Observed(2, lanes, queued=True)


def test_a_rank_that_looks_more_often_sees_and_keeps_the_same(layer):
    lanes, often = layer
    seldom = Observed(2, lanes, queued=True)
    often.remember(2, 0.5)
    seldom.remember(2, 0.5)
    for step in range(1, 7):
        lanes[step % 2].total_E += torch.tensor([step, 1])
        often.loads()
        if step % 2 == 0:
            often.observe()
            seldom.observe()
        assert torch.equal(often.loads(), seldom.loads())
    # Lane 0 had 2, 4, 6 and lane 1 1, 3, 5 rows of expert 0; two intervals, the older one half.
    assert often.loads().tolist() == [(6 + 4 / 2) + (5 + 3 / 2), 3.0]


def test_remember_begins_with_nothing(layer):
    lanes, seen = layer
    lanes[0].total_E += 5
    seen.remember(10, 1.0)
    assert seen.loads().tolist() == [0.0, 0.0]
    lanes[0].total_E += 1
    assert seen.loads().tolist() == [1.0, 1.0]
