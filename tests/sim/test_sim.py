"""The real host code under a seeded scheduler: what returns is exact, what does not says why.

A seed that fails is a test of its own: ``sim.cases.case(1234)`` repeats it, step by step.
"""

from __future__ import annotations

from collections import Counter

import pytest
from sim.cases import FAULTS, Case, case

SEEDS = 1000
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_a_thousand_seeds(part):
    wrong = [text for seed in range(part, SEEDS, PARTS) if (text := case(seed))]
    assert not wrong, f"{len(wrong)} of {SEEDS // PARTS}: {wrong[:3]}"


@pytest.mark.night
@pytest.mark.timeout(1800)
def test_ten_thousand_seeds():
    wrong = [text for seed in range(SEEDS, SEEDS + 10_000) if (text := case(seed))]
    assert not wrong, f"{len(wrong)} of 10000: {wrong[:3]}"


def test_the_seeds_reach_what_they_claim_to_test():
    seen = Counter()
    for seed in range(SEEDS):
        one = Case(seed)
        seen[one.fault] += 1
        seen["two lanes"] += one.lanes > 1
        seen["layers share a heap"] += len(one.configs) > 1
        seen["round wraps"] += one.first > 1 << 31
        for config in one.configs:
            seen[config.format] += 1
            seen["replicas"] += config.places > config.experts
        for program in one.programs:
            for step in program:
                rows = [len(x) for x in step.x_R]
                seen["empty everywhere"] += not any(rows)
                seen["chunked"] += max(rows) > one.configs[step.layer].max_rows
                seen["not a number"] += any(x.isnan().any() for x in step.x_R)
    wanted = {*FAULTS, "two lanes", "layers share a heap", "round wraps", "replicas", "chunked"}
    wanted |= {"empty everywhere", "not a number", "plain", "fp8", "mxfp4", "nvfp4"}
    assert {name for name in wanted if seen[name] < 40} == set(), seen


def test_a_seed_is_a_schedule():
    first, again = Case(17), Case(17)
    assert (first.run(), first.baton.steps) == (again.run(), again.baton.steps)
