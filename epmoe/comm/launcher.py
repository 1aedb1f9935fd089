"""Which launcher started this process, and where its ranks meet."""

from __future__ import annotations

import re
from collections.abc import Mapping

from epmoe.comm import meeting
from epmoe.errors import EpmoeError


def from_env(env: Mapping[str, str]) -> meeting.Meeting:
    """The meeting that this process was started for.

    The order matters: under torchrun mpi4py is a job of one, inside a Slurm allocation mpirun sets
    its own variables too, so the more special launcher is asked first.
    """
    if "EPMOE_HUB_FD" in env:
        return meeting.Hub(
            _number(env, "EPMOE_HUB_FD"), *_place(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local = _place(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        if size == 1:
            return meeting.Alone(local)
        agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        run = f"{env.get('TORCHELASTIC_RUN_ID', '')}/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        host, port = _need(env, "MASTER_ADDR"), _number(env, "MASTER_PORT")
        return meeting.Store(host, port, run, rank, size, local, hosted=agent)
    for names in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ):
        if names[0] in env and names[1] in env:
            return _mpi_world(*_place(env, *names))
    if "SLURM_PROCID" in env and ("SLURM_STEP_NUM_TASKS" in env or "SLURM_NTASKS" in env):
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        rank, size, local = _place(env, "SLURM_PROCID", tasks, "SLURM_LOCALID")
        if size == 1:
            return meeting.Alone(local)
        nodes = env.get("SLURM_STEP_NODELIST") or _need(env, "SLURM_JOB_NODELIST")
        job = _number(env, "SLURM_JOB_ID")
        step = _number(env, "SLURM_STEP_ID") if "SLURM_STEP_ID" in env else 0
        port = slurm_port(job, step)
        return meeting.Store(
            first_host(nodes), port, f"{job}.{step}", rank, size, local, hosted=False
        )
    if env.get("RANK", "0") != "0" or env.get("WORLD_SIZE", "1") != "1":  # half of a launcher's
        _place(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return meeting.Alone()


def _need(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ValueError(f"{name} must be set in the environment of a rank, it is missing")
    return env[name]


def _place(env: Mapping[str, str], rank: str, size: str, local: str) -> tuple[int, int, int | None]:
    at, of = _number(env, rank), _number(env, size)
    if not 0 <= at < of:
        raise ValueError(f"{rank} must be from 0 to {size} - 1 ({of - 1}), got {at}")
    return at, of, _number(env, local) if env.get(local) else None


def _number(env: Mapping[str, str], name: str) -> int:
    value = _need(env, name)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def slurm_port(job: int, step: int) -> int:
    """A port that every rank of a job step computes alike, below the range of chance ports.

    >>> slurm_port(4711, 0), slurm_port(4711, 1)
    (19711, 19848)
    """
    return 15000 + (job + 137 * step) % 17000


def first_host(nodes: str) -> str:
    """The first host of a Slurm list.

    >>> first_host("gpu-a[017-019,30],login")
    'gpu-a017'
    """
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not found:
        raise ValueError(f"SLURM_JOB_NODELIST must begin with a host name, got {nodes!r}")
    return "".join(part or "" for part in found.groups())


def _mpi_world(rank: int, size: int, local: int | None) -> meeting.Meeting:
    """MPI's world as the launcher's variables describe it."""
    if size == 1:
        return meeting.Alone(local)
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise EpmoeError(
            f"an MPI launcher started {size} ranks, but mpi4py is not usable here ({error}); "
            f"pip install 'epmoe[mpi]', or start by torchrun"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, size):
        raise EpmoeError(
            f"the launcher says rank {rank} of {size}, mpi4py says {world.Get_rank()} of "
            f"{world.Get_size()}: they belong to different MPIs (mpi4py runs on "
            f"{MPI.Get_library_version().split(',')[0]}); use the mpirun of that one"
        )
    return meeting.Mpi(world, local)
