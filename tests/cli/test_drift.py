"""The drift demo: the balancer's line goes down, the other stays up, and wrong answers count."""

from __future__ import annotations

import json

from ranks import ranks

from epmoe.cli import drift, main
from epmoe.kernels.host import HostOps


def test_the_balanced_line_goes_down_and_every_answer_is_right(capfd):
    assert main(["demo", "--drift", "--rounds", "480", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["ranks"], said["steps"], said["results"]) == (4, 240, 1920)
    assert (said["without"]["wrong"], said["balancer"]["wrong"]) == (0, 0)
    assert said["without"]["last_half"] >= 1.8
    assert said["balancer"]["last_half"] <= 1.3  # they move twice in these 120 steps
    assert min(said["balancer"]["ratios"]) <= 1.1
    assert said["without"]["placements"] == 0 < said["balancer"]["placements"]
    assert said["balancer"]["changes"] >= said["balancer"]["placements"] - 1


def test_without_a_terminal_it_says_ten_lines_and_a_table(capfd):
    assert main(["demo", "--drift", "--rounds", "200", "--ranks", "2"]) == 0
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert len(lines) == 5  # of 20 steps each
    assert "max/mean" in lines[0]
    assert "with balancer" in lines[0]
    assert "0 of 200" in out


@ranks(2)
def test_a_result_that_differs_in_one_bit_is_counted_on_all_ranks(rank, group, monkeypatch):
    reduce, left = HostOps.reduce, [5]

    def bent(self, *args):
        out = reduce(self, *args)
        left[0] -= 1
        if rank == 1 and left[0] == 0:  # the third step of the layer that is left alone
            out[0, 0] += 1
        return out

    monkeypatch.setattr(HostOps, "reduce", bent)
    without, balanced = drift.run(group, steps=40)
    assert (without.wrong, balanced.wrong) == (1, 0)
    assert len(without.ratios) == 2


def test_hot_experts_wander_and_batches_are_the_same_everywhere():
    config = drift.config_of(4)
    first, later = (int(drift.wanted_E(32, step).argmax()) for step in (0, drift.WANDER))
    assert later == first + 1
    x, ids, _ = drift.batch(config, 1, 7, 2)
    again = drift.batch(config, 1, 7, 2)
    assert (x == again[0]).all()
    assert (ids == again[1]).all()
    assert not (ids == drift.batch(config, 1, 8, 2)[1]).all()
