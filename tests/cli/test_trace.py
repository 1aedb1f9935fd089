"""epmoe trace without a GPU: what it refuses, what it prints."""

import argparse
import json
from contextlib import nullcontext

import numpy as np
import pytest

from epmoe.cli import contest, main, trace
from epmoe.cli.timeline import Told, timeline
from epmoe.kernels.trace import SPAN, Traced, names_of
from epmoe.shapes import shape

SPANS, ROLE = names_of("Span"), names_of("Role")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shape", "gpt5"], "--shape must be one of dsv3, "),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--skew", "-1"], "--skew must be at least 0, got -1.0"),
        (["--out", "/no/such/t.json"], "--out must lie in a folder that exists, got '/no/such/"),
    ],
)
def test_a_wrong_argument_is_named(capsys, argv, said):
    assert main(["trace", *argv]) == 2
    assert said in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(contest, "ask_driver", lambda: {"error": "libcuda.so.1 is not here"})
    assert main(["trace", "--out", str(tmp_path / "t.json")]) == 1
    assert "no GPU here: libcuda.so.1 is not here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_says_how_ranks_are_aligned(capsys):
    with pytest.raises(SystemExit):
        main(["trace", "--help"])
    assert "ranks are drawn such that all leave wait_c" in capsys.readouterr().out


def test_rank_0_writes_and_prints_what_all_ranks_told(monkeypatch, capfd, tmp_path):
    """The whole verb on two ranks, but for the round itself."""

    def traced(group, config, args):
        assert config.experts == 64
        late = 5000 * group.rank
        rows = [(0, "tell", late, late + 900), (1, "wait_c", late + 900, late + 2000)]
        rows += [(1, "wait_y", late + 2000, late + 9000 + 70 * group.rank)]
        made = [(cta, 0, SPANS.index(name), begin, end) for cta, name, begin, end in rows]
        return Told("H200", Traced(0, np.array(made, SPAN), ())), {"plain": 9.0, "noted": 9.5}

    monkeypatch.setattr(contest, "gpus", lambda: 2)
    monkeypatch.setattr(contest, "ready", lambda group: nullcontext())
    monkeypatch.setattr(trace, "_traced", traced)
    out = tmp_path / "t.json"
    assert main(["trace", "--shape", "dsv3", "--load-of", "8", "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    assert "  dsv3 load-of-8, 128 rows" in printed
    assert "  NOT a layer on 8 GPUs: the load of one rank of 8, on 2" in printed
    assert printed.count("on 2 x H200") == 1
    assert "where they leave wait_c, to about 0.1 us" in printed
    made = json.loads(out.read_text())
    assert made["otherData"]["apart_us"] == 0.07
    assert made["otherData"]["shape"] == "dsv3 load-of-8"
    assert made["otherData"]["warning"][2] == "dsv3: 64 of 256 experts, 32 a rank"
    assert made["otherData"]["round_us"] == {"plain": 9.0, "noted": 9.5}
    spans = [e for e in made["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["ts"], e["dur"]) for e in spans if e["name"] == "wait_y"] == [
        (0, 2.0, 7.0),
        (1, 2.0, 7.07),
    ]


def report(ranks, *, waits_c=True, full=()):
    spans = [("tell", 0, 1500)] + ([("wait_c", 1500, 4000)] if waits_c else [])
    spans += [("work", 4000, 90_000), ("wait_y", 90_000, 91_250)]
    rows = [(0, ROLE.index("whole_cta"), SPANS.index(name), b, e) for name, b, e in spans]
    told = [Told("H200", Traced(0, np.array(rows, SPAN), full)) for _ in range(ranks)]
    args = argparse.Namespace(rows=128, skew=0.5, heap="cuda", warm=False, out="t.json.gz")
    config, us = shape("dsv3", max_rows=128), {"plain": 90.04, "noted": 95.5}
    return trace._report(timeline(told), us, config, args) | {"bytes": 2048, "warning": []}


def printed(capsys, made):
    trace.print_tables(made)
    return capsys.readouterr().out


def test_the_tables_say_what_ran_what_notes_cost_and_where_time_went(capsys):
    out = printed(capsys, report(2))
    assert "on 2 x H200, " in out
    assert "dsv3, 128 rows, skew 0.5, cold caches: a round takes 90.0 us, with notes 95.5" in out
    assert "ranks are aligned where they leave wait_c, to about 0.0 us" in out
    assert "2.0 KiB in t.json.gz" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "0.0", "4.0", "91.2", "91.2", "4"] in lines
    assert ["whole", "cta", "wait_c", "waits", "2", "1.0", "2.5", "1.5", "4.0"] in lines
    assert ["whole", "cta", "work", "2", "1.0", "86.0", "4.0", "90.0"] in lines
    assert "ran out of notes" not in out


def test_what_cannot_be_known_is_said(capsys):
    assert "aligned" not in printed(capsys, report(1))
    out = printed(capsys, report(2, waits_c=False, full=((7, "scout"),)))
    assert "the ranks share no event: each has its own time" in out
    assert "aligned" not in out
    assert "rank 1: 1 roles ran out of notes" in out
