"""The bench compares equals: same rows, same results, the slowest rank's time."""

from __future__ import annotations

import json
import time

import pytest
import torch
from ranks import ranks

from epmoe.cli import main, transport
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError

SMALL = MoEConfig(experts=8, choices=2, hidden=64, inner=1, max_rows=16, open_s=30)


@ranks(1, 2, 4, mpi=False)
def test_all_contestants_agree_and_every_round_counts(rank, group):
    report = transport.run(group, SMALL, rows=16, rounds=20)
    assert [len(times.rounds) for times in report.times.values()] == [18, 18, 18, 18]
    whole, moved = report.times[transport.EPMOE], report.times[transport.EPMOE_MOVED]
    assert all(a < b for a, b in zip(moved.rounds, whole.rounds, strict=True))
    assert report.shape["payload_bytes"] == 16 * 2 * 64 * 2
    assert all(us > 0 for us in report.verbs.values())
    us = {name: times.described()["median"] for name, times in report.times.items()}
    assert report.ratios["whole"] == us["epmoe"] / us["gloo"]
    assert report.ratios["rows moved"] == us["epmoe, rows moved"] / us["gloo, rows moved"]
    raw = json.dumps([times.rounds for times in report.times.values()]).encode()
    raw += json.dumps([report.shape, report.verbs]).encode()
    assert set(group.allgather(raw, what="times", limit_s=10)) == {raw}


@ranks(2, mpi=False)
def test_a_time_is_that_of_the_slowest_rank(rank, group, monkeypatch):
    call = transport.Epmoe.__call__

    def slow(self, *args):
        out = call(self, *args)
        time.sleep(0.02 * rank)  # after the round: the other rank does not wait for it
        return out

    monkeypatch.setattr(transport.Epmoe, "__call__", slow)
    report = transport.run(group, SMALL, rows=4, rounds=10)
    assert min(report.times["epmoe"].rounds) >= 0.02
    assert report.times["gloo"].described()["median"] < 0.02e6


@ranks(2, mpi=False)
def test_results_that_differ_are_an_error_on_all_ranks(rank, group, monkeypatch):
    if rank == 1:
        call = transport.Gloo.__call__
        monkeypatch.setattr(transport.Gloo, "__call__", lambda self, *args: call(self, *args) + 1)
    with pytest.raises(EpmoeError, match=r"rank 1.*different results"):
        transport.run(group, SMALL, rows=4, rounds=10)


@ranks(2, mpi=False)
def test_rows_of_fp32_and_no_rows_at_all(rank, group):
    wide = MoEConfig(experts=4, choices=3, hidden=24, inner=1, max_rows=5, dtype="fp32", open_s=30)
    for rows in (5, 0):
        transport.run(group, wide, rows=rows, rounds=10)


def test_rows_are_drawn_per_rank_with_distinct_experts():
    x, ids, weights = transport._drawn(SMALL, 16, seed=1)
    assert x.shape == (16, 64)
    assert x.dtype == torch.bfloat16
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert not torch.equal(x, transport._drawn(SMALL, 16, seed=2)[0])


def test_json_holds_what_the_table_shows(capfd):
    run = ["bench", "transport", "--ranks", "2", "--rows", "8", "--hidden", "64", "--rounds", "10"]
    assert main([*run, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["ranks"] == 2
    assert report["us"]["epmoe"]["p10"] <= report["us"]["epmoe"]["median"]
    assert "torch" in report["machine"]
    assert main(run) == 0
    table = capfd.readouterr().out
    assert "top-4 of 32" in table
    assert "gloo, rows moved" in table


def test_help_says_how_it_times(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "transport", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "slowest rank" in text
    assert "median over the rounds" in text
