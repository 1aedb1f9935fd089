"""The tables of docs/notes/generate.md are what its files hold."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/notes/generate.md").read_text()
FILES = sorted(set(re.findall(r"`benchmarks/results/(generate-\S+\.json)`", PAGE)))
tables = runpy.run_path(str(ROOT / "benchmarks/generate_table.py"))["tables"]


def test_every_file_is_on_the_page():
    assert sorted(p.name for p in (ROOT / "benchmarks/results").glob("generate-*.json")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_page_shows_what_was_measured(name):
    report = json.loads((ROOT / "benchmarks/results" / name).read_text())
    if "note" in report:  # a run some of whose figures are not to be shown
        return
    assert "\n".join(tables(report)) in PAGE


def report(**more):
    batch = {"prefill_tokens_s": 9e3, "generate_decode_tokens_s": 50.0, "graph_step_us": 1234.0}
    ours = {"batches": {"4": batch}, "experts": {"4": {"us": 7.0}, "64": {"us": 70.0}}}
    theirs = {"batches": {"4": batch | more}, "experts": {"4": {"us": 8.0, "batched_us": 6.0}}}
    error = {"prefill": 0.01, "prefill, whole": 0.02, "decode": 0.03, "decode, whole": 0.04}
    return {
        "asked": {"prompt": 16, "batch": [1, 4]},
        "errors": {"epmoe": error},
        "sides": {"grouped_mm": theirs | {"memory_gib": 2.0}, "epmoe": ours | {"memory_gib": 1.0}},
    }


def test_generate_of_transformers_is_that_of_batched_mm():
    lines = list(tables(report(grouped_generate_decode_tokens_s=60.0, batched_graph_step_us=999.0)))
    assert lines[2:5] == [
        "| 4 | grouped_mm | 9,000 | 60 | - | 1,234 | 8 | - |",
        "| 4 | batched_mm |  | 50 | - | 999 | 6 | - |",
        "| 4 | epmoe | 9,000 | 50 | - | 1,234 | 7 | - |",
    ]
    assert lines[-2:] == ["| grouped_mm | - | 2.0 |", "| epmoe | 70 | 1.0 |"]
    assert "| epmoe | 1.0 % | 2.0 % | 3.0 % | 4.0 % |" in lines


def test_what_an_older_run_did_not_measure_is_a_gap():
    assert "| 4 | grouped_mm | 9,000 | - | - | 1,234 | 8 | - |" in list(tables(report()))
