"""The scripts under launch/ start ranks that find each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from epmoe.comm.group import Group
for _ in range(2):
    with Group.from_env(limit_s=60) as group:
        said = group.allgather(b"%d" % group.rank, what="x", limit_s=30)
    assert said == [b"%d" % rank for rank in range(group.size)], said
names = "NCCL_NVLS_ENABLE TORCH_SYMM_MEM_DISABLE_MULTICAST NVSHMEM_DISABLE_NVLS OMP_NUM_THREADS"
values = "".join(os.environ[name] for name in names.split())
sys.stdout.write(f"rank {group.rank} of {group.size}, local {group.local_rank}, {values}\\n")
"""


def lines_of(command, **env):
    """What the command printed, sorted."""
    outer = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK")}
    done = subprocess.run(
        list(map(str, command)),
        env=outer | {"PYTHONPATH": str(ROOT), "NCCL_NVLS_ENABLE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


@pytest.mark.parametrize("script", ["torchrun", "mpirun"])
def test_ranks_of_a_script_find_each_other_twice(script):
    if not (Path(sys.executable).parent / script).exists():
        pytest.skip(f"no {script} beside this python")
    found = lines_of([ROOT / "launch" / f"{script}.sh", 3, sys.executable, "-c", PROGRAM])
    assert found == [f"rank {rank} of 3, local {rank}, 0111" for rank in range(3)]


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "slurm.sbatch"])
def test_a_script_says_how_to_use_it(script):
    done = subprocess.run(["bash", ROOT / "launch" / script], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"usage" in done.stderr


def test_slurm_ranks_meet_by_slurms_variables():
    env = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
    }
    fixed = "NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1"
    each = f'{fixed} OMP_NUM_THREADS=1 SLURM_PROCID=$r SLURM_LOCALID=$r "$@" &'
    both = f"for r in 0 1; do {each} done; wait"
    found = lines_of(["bash", "-c", both, "bash", sys.executable, "-c", PROGRAM], **env)
    assert found == [f"rank {rank} of 2, local {rank}, 0111" for rank in range(2)]
