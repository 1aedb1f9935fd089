"""Files of loads: every format gives the same numbers, every mistake is named."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from epmoe.cli.loadfile import read

LOADS = [[8.0, 1.0, 0.5], [2.0, 2.0, 3.0]]
PLACED = {"loads": LOADS, "ranks": 2, "placement": [[0, 1, 2, 0], [2, 1, 0, 2]]}


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "8,1,0.5\n2,2,3\n",
        "# tokens\nexpert 0,expert 1,expert 2\n8,1,0.5\n\n2,2,3\n",
        "layer,0,1,e2\n3,8,1,0.5\n4,2,2,3\n",
    ],
)
def test_csv_with_and_without_names(tmp_path, text):
    found = read(write(tmp_path / "loads.csv", text))
    assert found.loads_NE.tolist() == LOADS
    assert found.expert_NS is None
    assert found.ranks is None


def test_npz_and_npy(tmp_path):
    np.savez(tmp_path / "all.npz", **{name: np.array(value) for name, value in PLACED.items()})
    np.savez(tmp_path / "only.npz", np.array(LOADS))
    np.save(tmp_path / "plain.npy", np.array(LOADS[0]))
    found = read(str(tmp_path / "all.npz"))
    assert (found.loads_NE.tolist(), found.ranks) == (LOADS, 2)
    assert found.expert_NS.tolist() == PLACED["placement"]
    assert read(str(tmp_path / "only.npz")).loads_NE.tolist() == LOADS
    assert read(str(tmp_path / "plain.npy")).loads_NE.tolist() == LOADS[:1]


def test_json_of_a_job_from_a_file_and_from_standard_input(tmp_path, monkeypatch):
    one_layer = {"loads": LOADS[0], "ranks": 2, "placement": [0, 1, 2, 0]}
    found = read(write(tmp_path / "job.json", json.dumps(one_layer)))
    assert found.loads_NE.tolist() == LOADS[:1]
    assert found.expert_NS.tolist() == [[0, 1, 2, 0]]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(LOADS)))
    assert read("-").loads_NE.tolist() == LOADS


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "1,2\n3,x\n", "a.csv: line 2 is not all numbers: .*x"),
        ("a.csv", "a,b\nc,d\n", "no line of loads"),
        ("a.csv", "1,2\n3\n", "equally many"),
        ("a.csv", "1,-2\n", "got -2.0 for expert 1 of layer 0"),
        ("a.csv", "1,nan\n", "got nan"),
        ("a.json", "{", "a.json: Expecting"),
        ("a.json", '{"load": [1]}', r"no \"loads\", only \['load'\]"),
        ("a.json", '{"loads": [1], "ranks": 1.5}', "whole number, got 1.5"),
        ("a.json", '{"loads": [1], "placement": [[0], [0]]}', r"each layer \(1\)"),
        ("a.json", '{"loads": [1], "placement": [0.5]}', "float64"),
        ("a.txt", "1,2", "got '.txt'"),
        ("a.npz", "not a zip", "a.npz: "),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=says):
        read(write(tmp_path / name, text))
