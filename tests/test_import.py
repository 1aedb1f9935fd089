"""Importing epmoe looks at nothing and starts nothing: no GPU, no MPI, no memory, no thread."""

import subprocess
import sys

LOOKS = """
import os, sys, threading
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import torch  # what torch does at import is torch's; epmoe must add nothing to it
before, threads, loaded = len(opened), tasks(), set(sys.modules)
def maps():
    return open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
mapped = maps()
import epmoe
"""

HEAD = """
import os
def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
"""


def run(code):
    """Run ``code`` in a fresh process after LOOKS; its output, or the failure of the test."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + LOOKS + code], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_epmoe_touches_no_gpu_no_mpi_no_shared_memory():
    said = run(
        """
assert not torch.cuda.is_initialized()
new = set(sys.modules) - loaded
bad = [m for m in new if m.split(".")[0] in ("cuda", "mpi4py", "nvshmem", "triton", "transformers")]
assert not bad, bad
assert "epmoe.comm.cuda" not in sys.modules and "epmoe.comm.nvshmem" not in sys.modules
added = set(maps().split()) - set(mapped.split())
far = ("libcuda", "libnvrtc", "libmpi", "memfd", "/dev/shm", "/dev/nvidia")
bad = [m for m in added if any(s in m for s in far)]
assert not bad, bad
bad = [o for o in opened[before:] if o.startswith(("/dev/", "/proc/driver"))]
assert not bad, bad
print("looked", len(new))
"""
    )
    assert said[0] == "looked"
    assert int(said[1]) > 3  # epmoe really was imported there


def test_importing_epmoe_starts_no_thread_and_fork_works():
    said = run(
        """
assert tasks() == threads and threading.active_count() == 1, (tasks(), threads)
pid = os.fork()
if pid == 0:
    epmoe.MoEConfig(experts=4, choices=2, hidden=64, inner=64, max_rows=8).fingerprint()
    ok = torch.equal(torch.ones(4, 4) @ torch.ones(4, 4), torch.full((4, 4), 4.0))
    os._exit(7 if ok else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert said == ["7"]
