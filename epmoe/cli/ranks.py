"""The ranks a verb runs on: the launcher's, or some that are started here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import torch

from epmoe.comm.group import Group
from epmoe.local import fork_ranks

MARKS = (  # the variables by which launchers are known, in the order in which Group asks
    ("epmoe", "EPMOE_HUB_FD", "RANK"),
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("srun", "SLURM_NTASKS", "SLURM_PROCID"),
)
LIMIT_S = 3600.0


def launcher(env: Mapping[str, str]) -> str:
    """Who started this process as a rank; empty if nobody did.

    >>> launcher({"RANK": "0", "WORLD_SIZE": "4"}), launcher({})
    ('torchrun', '')
    """
    return next((name for name, size, rank in MARKS if size in env and rank in env), "")


def first_rank(env: Mapping[str, str]) -> bool:
    """True if this process is rank 0 or no rank at all: the one that prints."""
    name = launcher(env)
    return not name or env[next(rank for mark, _, rank in MARKS if mark == name)] == "0"


def on_ranks(count: int | None, default: int, body: Callable[[Group], int]) -> int:
    """``body`` on every rank; the exit status of this process.

    Under a launcher this process is one rank, and ``count`` must be its number of ranks if it is
    given.  Alone, ``count`` (or ``default``) ranks are forked, rank 0 writes to our own output, and
    the first failure of another rank is printed whole.
    """
    if launcher(os.environ):
        with Group.from_env() as group:
            if count not in (None, group.size):
                raise ValueError(f"--ranks must be {group.size} or left out here, got {count}")
            return _one(group, body)
    with fork_ranks(count or default, lambda _: _forked(body), echo=0) as job:
        outcomes = job.wait(LIMIT_S)
    if job.first is not None:
        first = job.first
        if first.rank:  # rank 0 has said it
            print(f"rank {first.rank} failed first (status {first.code}):", file=sys.stderr)
            print(first.log.rstrip(), file=sys.stderr)
        return 1
    return max(int(outcome.result) for outcome in outcomes)


def _forked(body: Callable[[Group], int]) -> int:
    with Group.from_env() as group:
        return _one(group, body)


def _one(group: Group, body: Callable[[Group], int]) -> int:
    torch.set_num_threads(1)  # N ranks of N threads each starve one another
    return body(group)
