"""`ranks(n)`: the body below runs in n processes, or as one rank of the mpirun that runs pytest."""

from __future__ import annotations

import functools
import inspect
import os

import pytest

from epmoe import local
from epmoe.comm.group import Group

HANG_S = 60.0  # after this the ranks print their stacks and are killed


def ranks(*sizes, mpi=True, limit_s=HANG_S, env=None):
    """Run a test's body once in each of n processes, for every n in ``sizes``.

    The body gets what it names of ``rank`` and ``group`` (a ``Group`` of the n processes); its
    other parameters are fixtures and parametrised values, made once, before the ranks are forked.
    Any rank that fails, fails the test with its own traceback.  Under ``mpirun -n n pytest
    --with-mpi`` the body runs here, as one rank of MPI's world; ``mpi=False`` keeps it out of that
    (bodies that kill ranks: mpirun would end the job).
    """

    def decorate(body):
        wanted = inspect.signature(body).parameters
        fixtures = [p for name, p in wanted.items() if name not in ("rank", "group")]

        @functools.wraps(body)
        def test(world, **given):
            if world_of_mpi() > 1:
                if not mpi:
                    pytest.skip("kills or forks its ranks, and mpirun would end the job")
                if world_of_mpi() != world:
                    pytest.skip(f"needs {world} ranks, mpirun started {world_of_mpi()}")
                one_rank(body, wanted, given)
            else:
                several(world, lambda rank: one_rank(body, wanted, given), limit_s, env)

        world = inspect.Parameter("world", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fixtures]
        test.__signature__ = inspect.Signature([world, *keyword])
        test = pytest.mark.parametrize("world", sizes, ids=[f"{n}-ranks" for n in sizes])(test)
        return pytest.mark.ranks(test)

    return decorate


def world_of_mpi():
    """Ranks of the mpirun that started this pytest; 1 if none did."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def one_rank(body, wanted, given):
    """The body as this process's rank."""
    with Group.from_env(limit_s=HANG_S) as group:
        own = {"rank": group.rank, "group": group}
        body(**{name: own[name] for name in own if name in wanted}, **given)


def several(world, body, limit_s=HANG_S, env=None):
    """Run ``body(rank)`` in ``world`` forks; fail with the first failing rank's traceback.

    Returns the outcomes, by rank.
    """
    job = local.run(world, body, limit_s=limit_s, env=env)
    if job.first:
        pytest.fail(report(job), pytrace=False)
    return job.outcomes


def report(job):
    """What each failing rank said, the first failure first."""
    bad = sorted((o for o in job.outcomes if not o.ok), key=lambda o: o is not job.first)
    lines = [f"{len(bad)} of {len(job.outcomes)} ranks failed; rank {bad[0].rank} was the first"]
    for outcome in bad:
        lines.append(f"--- rank {outcome.rank} (pid {outcome.pid}, status {outcome.code})")
        lines.append(outcome.log or (outcome.error.trace if outcome.error else "(no output)"))
    return "\n".join(lines)
