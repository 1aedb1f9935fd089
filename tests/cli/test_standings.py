"""What bench layer found as tables, CSV and a picture; a part of a layer is called one."""

import csv

import pytest

from epmoe.cli import contest, standings

PEER = contest.PEER


def report(ranks=2, of=2):
    entries = [
        {
            "shape": name,
            "experts": 16,
            "rows": rows,
            "floor_us": 50.0,
            "bound": "memory",
            "us": {
                "split": {"median": 100.0 + rows, "p10": 90.0, "p90": 110.0},
                PEER: {"median": 400.0, "p10": 390.0, "p90": 410.0},
            },
            "verbs_us": {verb: {"median": 20.0} for verb in ("stage", "pull", "experts")},
        }
        for name in ("qwen3-30b", "mixtral")
        for rows in (16, 100)
    ]
    head = {"ranks": ranks, "load_of": of, "warning": ["NOT so"] if of != ranks else []}
    head |= {"format": "bf16", "skew": 0.0, "rounds": 30, "date": "2026-01-01"}
    return head | {"gpu": "a GPU", "machine": {"cores": "2 cores"}, "entries": entries}


def test_csv_has_a_line_for_each_contestant():
    lines = list(csv.DictReader(standings.lines_of(report(of=8))))
    assert len(lines) == 8
    assert lines[2] | {"contestant": ""} == {
        "shape": "qwen3-30b",
        "rows": "100",
        "ranks": "2",
        "load_of": "8",
        "experts": "16",
        "format": "bf16",
        "skew": "0.0",
        "contestant": "",
        "median_us": "200.0",
        "p10_us": "90.0",
        "p90_us": "110.0",
        "floor_us": "50.0",
    }


def test_the_table_has_the_ratio_to_the_peer_and_to_the_floor(capsys):
    standings.print_tables(report())
    line = next(x for x in capsys.readouterr().out.splitlines() if "mixtral" in x and "100" in x)
    assert line.split() == ["mixtral", "100", "50", "200", "400", "0.50", "4.00"]


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    standings.plot(report(), tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"


def test_a_part_of_a_layer_is_called_one_over_every_table(capsys):
    standings.print_tables(report(of=8))
    out = capsys.readouterr().out
    assert out.count("load of 1 rank of 8, on 2; NOT 8 GPUs") == 2
    assert "  NOT so\n" in out
    standings.print_tables(report())
    out = capsys.readouterr().out
    assert "NOT" not in out
    assert "load" not in out


def test_a_picture_of_a_part_says_so(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    titles, figure = [], pyplot.Figure
    monkeypatch.setattr(figure, "suptitle", lambda self, text: titles.append(text))
    for of in (2, 8):
        standings.plot(report(of=of), tmp_path / "times.png")
    assert titles == [
        "2 x a GPU, bf16, 2026-01-01",
        "2 x a GPU (load of 1 rank of 8, on 2; NOT 8 GPUs), bf16, 2026-01-01",
    ]
