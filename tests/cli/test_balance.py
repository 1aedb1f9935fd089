"""epmoe balance: the numbers it prints are those of the planners."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from epmoe.cli import balance
from epmoe.sched.balance import max_over_mean
from epmoe.sched.placement import Placement


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    balance.add(parser.add_subparsers(dest="verb"))
    return balance.main(parser.parse_args(["balance", *map(str, words)]))


@pytest.fixture
def job(tmp_path):
    """Three layers of a job whose placement has become a bad one."""
    loads = np.random.default_rng(0).permuted(np.tile(1e5 / np.arange(1, 17), (3, 1)), axis=1)
    placement = [[slot % 16 for slot in range(24)]] * 3
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"loads": loads.tolist(), "ranks": 4, "placement": placement}))
    return path, loads


def test_json_says_what_would_change(job, capsys):
    path, loads = job
    assert run(path, "--slot-bytes", 1000, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["layers"], said["experts"], said["slots"], said["ranks"]) == (3, 16, 24, 4)
    before, published, ours = said["placements"].values()
    for one in (before, published, ours):
        placed = [Placement.of(row, experts=16, ranks=4) for row in one["placement"]]
        assert one["max_over_mean"] == max_over_mean(loads, placed)
        assert one["moved_slots"] == [
            sum(a != b for a, b in zip(old, new, strict=True))
            for old, new in zip(before["placement"], one["placement"], strict=True)
        ]
        assert one["most_replicas"] == max(int(p.counts_E.max()) for p in placed)
        assert one["busiest_bytes"] <= one["wire_bytes"] <= 1000 * sum(one["moved_slots"])
    assert before["moved_slots"] == [0, 0, 0]
    assert before["wire_bytes"] == 0
    assert 0 < ours["wire_bytes"] < published["wire_bytes"]
    assert np.less_equal(ours["max_over_mean"], published["max_over_mean"]).all()


def test_bytes_on_the_wire_leave_out_copies_inside_a_rank():
    old = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)
    new = Placement(expert_of_S=(0, 0, 2, 1), experts=3, ranks=2)  # 0 within rank 0; 1 to rank 1
    found = balance.outcome("x", np.ones((1, 3)), (old,), (new,), 10, 0.0)
    assert (found.moved, found.wire_bytes, found.busiest_bytes) == ((2,), 10, 10)


def test_the_table_has_a_line_for_each_way_and_each_layer(job, capsys):
    path, _ = job
    assert run(path, "--layers") == 0
    out = capsys.readouterr().out
    assert "3 layers of 16 experts in 24 slots on 4 ranks" in out
    assert [
        line.split()[0]
        for line in out.splitlines()
        if line.split()[:1] in ([["in"], ["published"], ["epmoe"], ["0"], ["1"], ["2"]])
    ] == ["in", "published", "epmoe", "0", "1", "2"]


def test_enough_and_fresh_are_heard(job, capsys):
    path, _ = job

    def ours(*words: str) -> dict:
        assert run(path, "--json", *words) == 0
        return json.loads(capsys.readouterr().out)["placements"]["epmoe"]

    best, less = ours(), ours("--enough", "1.2")
    assert sum(best["moved_slots"]) > sum(less["moved_slots"])
    assert ours("--fresh")["moved_slots"] != best["moved_slots"]


def test_hosts_make_the_published_plan_hierarchical(tmp_path, capsys):
    path = tmp_path / "readme.csv"
    path.write_text("90,132,40,61,104,165,39,4,73,56,183,86\n")
    words = ("--ranks", 8, "--slots", 16, "--groups", 4, "--hosts", 2, "--json")
    assert run(path, *words) == 0
    found = json.loads(capsys.readouterr().out)["placements"]["published"]
    assert found["placement"] == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]]


def test_plot_writes_a_picture(job, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(job[0], "--plot", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert "a.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/nowhere/loads.csv"], "No such file"),
        (["JOB", "--ranks", "5"], "multiple of ranks (5)"),
        (["JOB", "--slots", "32"], "file's placement (24), got 32"),
        (["JOB", "--enough", "0.9"], "enough must be at least 1, got 0.9"),
        (["JOB", "--slot-bytes", "-1"], "slot_bytes must be at least 0, got -1"),
        (["CSV"], "--ranks is needed"),
        (["CSV", "--ranks", "2", "--slots", "1"], "slots must be at least experts (2)"),
        (["CSV", "--ranks", "0"], "ranks must be at least 1, got 0"),
        (["CSV", "--ranks", "2", "--hosts", "3"], "hosts must divide ranks (2), got 3"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(job, tmp_path, capsys, words, says):
    csv = tmp_path / "two.csv"
    csv.write_text("3,1\n")
    assert run(*({"JOB": job[0], "CSV": csv}.get(word, word) for word in words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("epmoe balance: ")
    assert says in said
    assert said.count("\n") == 1
