"""The bodies that run as forks run as ranks of mpirun too, and a failing one ends the job.

The folder is not called mpi: pytest-mpi takes that name of a folder for its marker and skips it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import world_of_mpi

ROOT = Path(__file__).parents[2]
SHARED = [
    "tests/comm/test_group.py",
    "tests/comm/test_fds.py",
    "tests/test_transformers.py",
    "tests/test_generate.py",
]


def why_not():
    """Why mpirun cannot be used here, or ""."""
    if world_of_mpi() > 1:
        return "this is a rank of mpirun already"
    if not (Path(sys.executable).parent / "mpirun").exists():
        return "no mpirun beside this python: pip install 'epmoe[mpi]'"
    for module in ("mpi4py", "pytest_mpi"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "mpirun works")


def mpirun(count, *tests, limit_s=110):
    """Run pytest --with-mpi as ``count`` ranks: the finished process, and how long it took."""
    command = [ROOT / "launch" / "mpirun.sh", str(count), sys.executable, "-m", "pytest"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--with-mpi", "--color=no", *map(str, tests)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    return done, time.monotonic() - start


@pytest.mark.night  # `make test` runs all shared bodies under mpirun by itself
@pytest.mark.parametrize("count", [2, 4])
def test_shared_bodies_pass_as_ranks_of_mpirun(count):
    done, _ = mpirun(count, *SHARED)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [line for line in done.stdout.splitlines() if " passed" in line]
    assert len(reports) == 1, done.stdout  # rank 0 alone
    assert int(reports[0].split()[0]) >= 4


FAILING = """
from ranks import ranks

@ranks(2)
def test_one_rank_fails(rank, group):
    assert rank != 1, "only rank 1 fails"
    group.allgather(b"", what="never reached by rank 1", limit_s=60)
"""


def test_a_failing_rank_ends_the_job_at_once_with_its_own_error(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "ranks.py").write_text((ROOT / "tests" / "ranks.py").read_text())
    (tmp_path / "test_failing.py").write_text(FAILING)
    done, took = mpirun(2, f"--rootdir={tmp_path}", tmp_path / "test_failing.py")
    assert done.returncode != 0
    assert "rank 1 of 2 failed" in done.stderr, done.stderr + done.stdout
    assert "only rank 1 fails" in done.stderr
    assert took < 40  # importing torch twice on a busy machine; the collective's limit is 60
