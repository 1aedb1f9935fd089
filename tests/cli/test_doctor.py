"""The doctor answers on any machine: a question that breaks is answered by how it broke."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epmoe.cli import gpu, main, probes, ranks
from epmoe.comm.layout import layout
from epmoe.config import HEAPS
from epmoe.shapes import SHAPES, shape

H200 = {"name": "NVIDIA H200", "memory": 150 << 30, "sms": 132, "major": 9, "minor": 0}
TWO = {
    "cuda": "13.0",
    "devices": [H200 | {"vmm": 1, "passes_fds": 1}] * 2,
    "pairs": 2,
    "no_peer_access": [],
    "nvlinks": [18, 18],
}


@pytest.fixture(autouse=True)
def nobody_started_us(monkeypatch):
    for _, size, rank in ranks.MARKS:
        monkeypatch.delenv(size, raising=False)
        monkeypatch.delenv(rank, raising=False)


def broken(*args, **kwargs):
    raise RuntimeError("broken on purpose")


def no_file(*args, **kwargs):
    raise FileNotFoundError(2, "no such file")


def no_driver():
    return {"error": "no driver here"}


def test_a_healthy_machine_can_have_the_host_heap(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("machine", "software", "launchers", "gpu", "multicast", "heaps", "pidfd"):
        assert word in text


def test_json_has_a_reason_for_every_heap(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["heaps"]) == set(HEAPS)
    assert found["heaps"]["host"] == ""
    assert found["heaps"]["nvshmem"]


HOSTILE = {
    "no /proc": lambda m: m.setattr(Path, "read_text", no_file),
    "no memory files": lambda m: m.delattr(os, "memfd_create"),
    "no pidfd": lambda m: m.delattr(os, "pidfd_open"),
    "no affinity": lambda m: m.delattr(os, "sched_getaffinity"),
    "a torch.cuda that breaks": lambda m: m.setattr(torch.cuda, "is_available", broken),
    "no package is listed": lambda m: m.setattr(probes.metadata, "version", broken),
    "nothing can be started": lambda m: m.setattr(subprocess, "run", broken),
    "nothing can be imported": lambda m: m.setattr(probes.importlib, "import_module", broken),
    "nothing can be found": lambda m: m.setattr(probes.importlib.util, "find_spec", broken),
    "no path": lambda m: m.setattr(probes.shutil, "which", broken),
    "no limits": lambda m: m.setattr(probes.resource, "getrlimit", broken),
    "no interpreter path": lambda m: m.setattr(sys, "executable", ""),
}


@pytest.mark.parametrize("break_it", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_it_never_crashes(break_it, flags, monkeypatch, capsys):
    if flags:
        monkeypatch.setattr(probes, "ask_driver", no_driver)  # asked once for real is enough
    break_it(monkeypatch)
    status = main(["doctor", *flags])
    text = capsys.readouterr().out
    assert status in (0, 1)
    if flags:
        found = json.loads(text)
        assert status == (0 if found["heaps"]["host"] == "" else 1)


def test_a_machine_without_proc_has_no_host_heap_and_says_why(monkeypatch):
    monkeypatch.setattr(probes, "ask_driver", no_driver)
    monkeypatch.setattr(Path, "read_text", no_file)
    assert main(["doctor", "--json"]) == 1
    assert "FileNotFoundError" in probes.asked(probes.why_not, "host", {})


def test_the_status_is_about_the_heap_that_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(probes, "ask_driver", no_driver)
    assert main(["doctor", "--heap", "host"]) == 0
    assert main(["doctor", "--heap", "cuda"]) == 1
    assert "no driver here" in capsys.readouterr().out


def test_a_driver_that_hangs_or_dies_is_an_answer(monkeypatch, tmp_path):
    for code, said in (("import time; time.sleep(60)", "Timeout"), ("import os; os.abort()", "-6")):
        program = tmp_path / "driver.py"
        program.write_text(code)
        monkeypatch.setattr(gpu, "__file__", str(program))
        monkeypatch.setattr(probes, "ASK_S", 0.5)
        assert said in probes.asked(probes.ask_driver)


def test_gpus_are_told_in_words():
    told = probes.gpus(TWO)
    assert told["devices"][0] == "NVIDIA H200, 132 SMs, capability 9.0, 150.0 GiB"
    assert told["peer access"] == "all 2 pairs"
    assert told["nvlinks up"] == "18, 18"
    deaf = probes.gpus(TWO | {"no_peer_access": ["0->1"], "nvlinks": "not known: no library"})
    assert deaf["peer access"] == ["not 0->1"]
    assert deaf["nvlinks up"] == "not known: no library"


def test_a_pair_without_peer_access_means_no_cuda_heap(monkeypatch):
    class Cuda:
        why_not = staticmethod(lambda: "")

    monkeypatch.setattr(probes.importlib, "import_module", lambda name: Cuda)
    assert probes.why_not("cuda", TWO) == ""
    assert "0->1" in probes.why_not("cuda", TWO | {"no_peer_access": ["0->1"]})
    assert "no device" in probes.why_not("cuda", TWO | {"devices": []})


def test_a_gpu_question_is_answered_by_the_driver_s_number():
    class Library:
        @staticmethod
        def cuInit(flags):
            return 100

    with pytest.raises(OSError, match="cuInit answers 100"):
        gpu.checked(Library(), "cuInit", 0)


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_a_shape_is_the_layout(name, capsys):
    run = ["doctor", "--layout", name, "--ranks", "4", "--max-rows", "64", "--json"]
    assert main(run) == 0
    told = json.loads(capsys.readouterr().out)
    placed = layout([shape(name, max_rows=64)], 4)
    assert told["bytes_all_ranks"] == 4 * placed.total == 4 * told["bytes_per_rank"]
    rows = next(r for r in told["regions"] if r["region"] == "lane 0 rows")
    assert (rows["at"], rows["bytes"]) == (
        placed.lanes[0][0]["rows"].at,
        placed.lanes[0][0]["rows"].bytes,
    )


def test_flags_make_or_change_a_shape(capsys):
    flags = ["--experts", "32", "--choices", "4", "--hidden", "1024", "--lanes", "2"]
    assert main(["doctor", "--layout", *flags, "--max-rows", "512"]) == 0
    text = capsys.readouterr().out
    assert "lane 1 results" in text
    assert "top-4 of 32" in text
    assert main(["doctor", "--layout", "dsv3", "--hidden", "4096", "--max-rows", "8"]) == 0
    assert "hidden 4096" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layout"], "--experts, --choices, --hidden"),
        (["--layout", "gpt-2"], "got 'gpt-2'"),
        (["--layout", "dsv3", "--ranks", "0"], "--ranks must be at least 1"),
        (["--layout", "dsv3", "--ranks", "3"], "multiple of the number of ranks (3)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_name(flags, said, capsys):
    assert main(["doctor", *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_numbers_of_the_shapes():
    told = {
        n: (s.hidden, s.inner, s.experts, s.choices) for n in SHAPES for s in [shape(n, max_rows=1)]
    }
    assert told == {
        "dsv3": (7168, 2048, 256, 8),
        "qwen3-235b": (4096, 1536, 128, 8),
        "qwen3-30b": (2048, 768, 128, 8),
        "mixtral": (4096, 14336, 8, 2),
        "gpt-oss": (2880, 2880, 128, 4),
        "kimi-k2": (7168, 2048, 384, 8),
    }
