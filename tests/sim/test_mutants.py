"""Every mutant of the host code is found, and by the seeds that also run in test_sim."""

from __future__ import annotations

import pytest
from sim.mutants import MUTANTS, first_seed

from epmoe import local

SEEDS = 600


def found(mutant, seeds, limit_s):
    """(seed, what it said) from a forked child with the broken code; seed None if none did."""
    job = local.run(1, lambda rank: first_seed(mutant, seeds), limit_s=limit_s)
    assert job.first is None, job.outcomes[0].log
    return job.outcomes[0].result


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_known_seed_finds(mutant):
    near = range(mutant.seed, mutant.seed + 40)
    seed, said = found(mutant, near, 60)
    assert seed is not None, f"{mutant.name} survives seeds {near}; say which seed finds it"
    assert said


@pytest.mark.night
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_six_hundred_seeds_find(mutant):
    seed, _ = found(mutant, range(SEEDS), 500)
    assert seed is not None


def test_the_code_as_it_is_has_no_such_bug():
    """Or a mutant could be found for a reason of its own."""
    from sim.cases import case

    assert [text for seed in range(40) if (text := case(seed))] == []
