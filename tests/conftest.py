"""What every test runs under: one thread for torch, and mpirun's rules if it started us."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from _pytest.terminal import TerminalReporter

torch.set_num_threads(1)  # ranks are forked from here, and torch's threads do not survive a fork

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
RANKS = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "ranks: its body runs in several processes, or under mpirun")
    if RANK > 0:  # only rank 0 reports; a failure on another rank ends the job with its own report
        config.pluginmanager.unregister(name="terminalreporter")
        silent = TerminalReporter(config, open(os.devnull, "w"))  # noqa: SIM115
        config.pluginmanager.register(silent, "terminalreporter")


def pytest_collection_modifyitems(items):
    if RANKS > 1:
        for item in items:
            if "ranks" not in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs without mpirun, once"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if RANKS > 1 and report.failed:
        # The other ranks may be inside a collective that this one will never join.
        from mpi4py import MPI

        text = f"\nrank {RANK} of {RANKS} failed: {item.nodeid}\n{report.longreprtext}\n"
        sys.__stderr__.write(text)
        sys.__stderr__.flush()
        MPI.COMM_WORLD.Abort(1)
