"""Heap of sealed memory files: shared by the processes of one machine, without a name.

A memory file lives as long as a descriptor or a mapping does, so nothing is left behind by any
ending, a kill included.  The seals fix its size for ever: a peer cannot make a load fault by
truncating it.  Mappings are not inherited by forked children (``MADV_DONTFORK``).
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import weakref
from pathlib import Path

import torch

from epmoe.comm import atomics
from epmoe.comm.fds import pass_fds
from epmoe.comm.group import Group
from epmoe.errors import EpmoeError

log = logging.getLogger("epmoe")


class HostHeap:
    """One sealed memory file per rank, all of them mapped here.  Collective to make."""

    def __init__(self, group: Group, nbytes: int, *, generation: int, limit_s: float) -> None:
        """All ranks get the heap or all raise; nothing half-made stays."""
        self.rank, self.ranks, self.generation = group.rank, group.size, generation
        self._slabs: list[torch.Tensor] = []
        fds: dict[int, int] = {}
        try:
            # All look before any takes: who looked later would count the others' slabs twice.
            with group.guarded("look for memory", limit_s):
                if reason := why_not(nbytes * group.size):
                    raise EpmoeError(f"rank {group.rank}: no host heap here: {reason}")
            with group.guarded("make the slab", limit_s):
                fds[group.rank] = _memory_file(nbytes, group.rank)
            with group.guarded("map the peers", limit_s):
                fds |= pass_fds(group, fds[group.rank], what="slab", limit_s=limit_s)
                self._slabs = [_mapped(fds[rank], nbytes, rank) for rank in range(group.size)]
        except BaseException:
            self.close()
            raise
        finally:
            for fd in fds.values():
                os.close(fd)  # the mapping keeps the file alive
        log.info("host heap: %d slabs of %.1f MiB", group.size, nbytes / 2**20)

    @property
    def mine(self) -> torch.Tensor:
        """My slab as bytes."""
        return self._slabs[self.rank]

    def peer(self, rank: int) -> torch.Tensor:
        """The slab of ``rank`` as bytes."""
        return self._slabs[rank]

    def close(self) -> None:
        """Forget the slabs; a view that somebody holds keeps its slab mapped until dropped."""
        self._slabs.clear()


def _never_unmap() -> None:
    """In a forked child, where the slabs are not mapped and other memory may lie in their place:
    an object that is collected there would unmap it."""
    for mapping in _mappings:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))


_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
os.register_at_fork(after_in_child=_never_unmap)


def why_not(nbytes: int = 0) -> str:
    """An empty text, or why this machine cannot hold a host heap of ``nbytes`` on all ranks."""
    if not hasattr(os, "memfd_create"):
        return "the operating system has no memory files (memfd_create)"
    if reason := atomics.why_not():
        return reason
    free = free_memory()
    if nbytes > free:
        return (
            f"all slabs together need {nbytes / 2**20:.1f} MiB and {free / 2**20:.1f} MiB of "
            "memory are free; lower max_rows, choices, hidden or lanes"
        )
    return ""


def free_memory() -> int:
    """Bytes this process could still take: the machine's and its control group's, the smaller."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])  # files read lately, given back when memory is wanted
    except (OSError, KeyError):
        # No control group of version 2, or not visible from here: the machine decides.
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _memory_file(nbytes: int, rank: int) -> int:
    fd = os.memfd_create("epmoe-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Take the pages now: a full machine is an error here, not a SIGBUS within a round.
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
    except OSError as error:
        os.close(fd)
        raise EpmoeError(
            f"rank {rank}: no memory for a slab of {nbytes / 2**20:.1f} MiB: {error}"
        ) from error
    return fd


def _mapped(fd: int, nbytes: int, rank: int) -> torch.Tensor:
    if (size := os.fstat(fd).st_size) != nbytes:
        raise EpmoeError(f"the slab of rank {rank} has {size} bytes, the layout says {nbytes}")
    mapping = mmap.mmap(fd, nbytes)
    mapping.madvise(mmap.MADV_DONTFORK)
    _mappings.add(mapping)
    return torch.frombuffer(mapping, dtype=torch.uint8)
