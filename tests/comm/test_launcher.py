"""Which launcher started this process is read from its environment, the most special one first."""

from __future__ import annotations

import pytest

from epmoe.comm import launcher, meeting

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "gpu-a1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu-b[07,09-12]",
}
OMPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
PMI = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0"}


def test_torchrun_before_mpirun_before_slurm():
    found = launcher.from_env(TORCHRUN | OMPI | PMI | SLURM)
    assert isinstance(found, meeting.Store)
    assert (found.rank, found.size, found.local_rank) == (5, 8, 1)
    assert (found.host, found.port, found.run, found.hosted) == ("gpu-a1", 29400, "job/2", True)
    assert isinstance(launcher.from_env(OMPI | SLURM), meeting.Alone)
    assert isinstance(launcher.from_env(PMI | SLURM), meeting.Alone)
    assert isinstance(launcher.from_env({}), meeting.Alone)


def test_the_hub_of_our_own_launcher_before_all():
    found = launcher.from_env(TORCHRUN | {"EPMOE_HUB_FD": "9"})
    assert isinstance(found, meeting.Hub)
    assert (found.fd, found.rank, found.size) == (9, 5, 8)


def test_a_store_of_rank_0_without_an_agent():
    found = launcher.from_env(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not found.hosted


def test_slurm_meets_on_the_first_host():
    found = launcher.from_env(SLURM)
    assert (found.rank, found.size, found.local_rank) == (3, 4, 1)
    assert (found.host, found.port, found.run) == ("gpu-b07", 19711, "4711.0")
    step = launcher.from_env(SLURM | {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16"})
    assert (step.size, step.run) == (16, "4711.2")
    assert step.port != found.port


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("localhost", "localhost"),
        ("a1,a2", "a1"),
        ("gpu-a[017-019,30],login", "gpu-a017"),
        ("rack[3-4]-gpu,b", "rack3-gpu"),
        ("n[12]", "n12"),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert launcher.first_host(nodes) == host


@pytest.mark.parametrize("job", [0, 1, 16999, 17000, 2**31])
def test_the_port_stays_below_the_range_the_system_hands_out(job):
    assert 15000 <= launcher.slurm_port(job, 7) < 32768


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (TORCHRUN | {"RANK": "8"}, r"RANK must be from 0 to WORLD_SIZE - 1 \(7\), got 8"),
        (TORCHRUN | {"RANK": "-1"}, "got -1"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR must be set"),
        ({k: v for k, v in SLURM.items() if "LIST" not in k}, "SLURM_JOB_NODELIST must be set"),
        (SLURM | {"SLURM_JOB_NODELIST": "[1-2]"}, "must begin with a host name"),
        ({"EPMOE_HUB_FD": "3"}, "RANK must be set"),
        ({"EPMOE_HUB_FD": "x"}, "EPMOE_HUB_FD must be a whole number, got 'x'"),
        ({"RANK": "1"}, "WORLD_SIZE must be set"),  # half of a launcher's: not one rank alone
        ({"WORLD_SIZE": "4"}, "RANK must be set"),
        (TORCHRUN | {"RANK": "x"}, "RANK must be a whole number, got 'x'"),
        (TORCHRUN | {"MASTER_PORT": "p"}, "MASTER_PORT must be a whole number, got 'p'"),
    ],
)
def test_a_contradictory_environment_is_refused_by_name(env, text):
    with pytest.raises(ValueError, match=text):
        launcher.from_env(env)
