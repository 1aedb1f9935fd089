"""The demo finds what is wrong, counts what it moved, and ends with the right status."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import ranks

from epmoe.cli import demo, main, traffic
from epmoe.kernels.host import HostOps


@ranks(1, 2, 4)
def test_every_result_is_right_and_all_ranks_report_alike(rank, group):
    report = demo.run(group, rounds=24, layers=4, seed=3)
    assert report.wrong == 0
    assert report.rounds >= 24
    assert report.results == report.forwards * group.size
    mine = json.dumps([report.rows, report.moved_bytes, report.load]).encode()
    assert set(group.allgather(mine, what="reports", limit_s=10)) == {mine}


@ranks(2)
def test_a_result_that_differs_in_one_bit_is_counted(rank, group, monkeypatch):
    reduce, struck = HostOps.reduce, []

    def bent(self, *args):
        out = reduce(self, *args)
        if rank == 1 and len(out) and not struck:
            struck.append(out.view(-1).view(torch.int16).__setitem__(0, 1))
        return out

    monkeypatch.setattr(HostOps, "reduce", bent)
    assert demo.run(group, rounds=4, layers=2).wrong == 1


@ranks(2)
def test_rows_and_bytes_are_those_of_the_batches(rank, group):
    report = demo.run(group, rounds=10, layers=2, seed=5)
    configs = traffic.configs(2, 2)
    sent = [traffic.batch(configs, 2, 5, number) for number in range(report.forwards)]
    assert report.rows == sum(len(x) for b in sent for x in b.x_R)
    moved, load = 0, [0, 0]
    for b in sent:
        config = configs[b.layer]
        for source, ids in enumerate(b.ids_R):
            for expert in ids.reshape(-1).tolist():
                if expert >= 0:
                    owner = expert // (config.experts // 2)
                    load[owner] += 1
                    moved += (owner != source) * 2 * config.hidden * config.itemsize
    assert (report.moved_bytes, list(report.load)) == (moved, load)


def test_traffic_has_everything_the_demo_promises():
    configs = traffic.configs(4, 4)
    sent = [traffic.batch(configs, 4, 0, number) for number in range(200)]
    assert {b.layer for b in sent if b.context} == {0, 1, 2, 3}
    assert any(b.chunks(48).count > 1 for b in sent)
    assert 0.08 < sum(not len(x) for b in sent for x in b.x_R) / 800 < 0.2
    assert any(len({len(x) for x in b.x_R}) == 4 for b in sent)
    ids = torch.cat([ids.reshape(-1) for b in sent if b.layer == 0 for ids in b.ids_R])
    assert 0.08 < (ids == -1).float().mean() < 0.12
    counts = torch.bincount(ids[ids >= 0], minlength=16).sort(descending=True).values
    assert counts[0] > 3 * counts[8] > 0
    same = [traffic.batch(configs, 4, 0, 7) for _ in range(2)]
    assert all(map(torch.equal, same[0].x_R, same[1].x_R))
    assert not torch.equal(sent[0].x_R[0], traffic.batch(configs, 4, 1, 0).x_R[0])


def test_alone_it_starts_ranks_and_only_rank_0_prints(capfd):
    assert main(["demo", "--rounds", "10", "--ranks", "3", "--layers", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["ranks"], report["wrong"], len(report["load"])) == (3, 0, 3)
    assert report["rows_per_s"] > 0


def test_one_wrong_result_makes_status_1(monkeypatch, capfd):
    right = demo.expected
    monkeypatch.setattr(demo, "expected", lambda *args: right(*args) + 1)
    assert main(["demo", "--rounds", "5", "--ranks", "2"]) == 1
    assert "wrong" in capfd.readouterr().out


def test_a_rank_that_raises_makes_status_1_and_is_named(monkeypatch, capfd):
    def refuse(*args):
        if args[3] == 1:
            raise KeyError("lost my oracle")
        return right(*args)

    right = demo.expected
    monkeypatch.setattr(demo, "expected", refuse)
    assert main(["demo", "--rounds", "50", "--ranks", "2"]) == 1
    said = capfd.readouterr().err
    assert "rank 1 failed first" in said
    assert "lost my oracle" in said


@pytest.mark.parametrize("flag", ["--rounds", "--layers", "--ranks"])
def test_a_number_below_1_is_refused_by_name(flag, capfd):
    assert main(["demo", flag, "0"]) == 2
    assert f"{flag} must be at least 1, got 0" in capfd.readouterr().err
