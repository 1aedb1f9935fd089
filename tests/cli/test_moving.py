"""The bench of dispatch and combine on GPUs: what it compares and what it prints, without a GPU."""

import pytest
import torch

from epmoe.cli import moving
from epmoe.cli.contest import Drawn
from epmoe.errors import EpmoeError


def test_a_row_that_came_back_may_be_rounded_but_not_another():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    drawn = Drawn(x, torch.zeros(6, 2), torch.full((6, 2), 0.5))
    moving._compare(drawn, x, 0)
    moving._compare(drawn, (x.float() * 1.0039).bfloat16(), 0)  # one bit of eight
    with pytest.raises(EpmoeError, match="rank 1: a row came back .* away from itself"):
        moving._compare(drawn, x.roll(1, 0), 1)
    with pytest.raises(EpmoeError, match="away from itself"):
        moving._compare(drawn, x * float("nan"), 0)


def test_the_table_has_time_and_rate_of_every_way(capsys):
    us = {"median": 1234.5, "p10": 1200.0, "p90": 1300.0}
    report = {
        "ranks": 2,
        "gpu": "a GPU",
        "machine": {"cores": "2 cores"},
        "rows": 16,
        "hidden": 64,
        "choices": 2,
        "experts": 8,
        "heap": "cuda",
        "rounds": 50,
        "us": dict.fromkeys(moving.WAYS, us),
        "gb_per_s": dict.fromkeys(moving.WAYS, 301.4),
    }
    moving.print_table(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["epmoe", "dispatch", "1,234.5", "1,200.0", "1,300.0", "301"] in lines
    assert ["nccl", "combine", "1,234.5", "1,200.0", "1,300.0", "301"] in lines
