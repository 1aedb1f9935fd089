# `make demo` and `make test` do everything on a fresh machine: environment, packages, run.
#
#   VENV=.venv       where the environment is made; `VENV=` uses PYTHON as it is, installs nothing
#   PYTHON=python3   3.11 or later; in a GPU image that has torch: make test-gpu PYTHON=python3 VENV=
#   TORCH_INDEX=URL  a further package index, for machines whose pip finds no CPU build of torch

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TORCH_CPU := torch==2.13.0+cpu

export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY_RUN := have-run
READY_TEST := have-test
else
PY := $(abspath $(VENV))/bin/python
READY_RUN := $(VENV)/.ready-run
READY_TEST := $(VENV)/.ready-test
endif

PYTEST := $(PY) -m pytest
SHORT := -m "not night and not gpu"

.PHONY: help demo test check test-gpu sanitize kills model sim fuzz night bench clean have-run have-test
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 | /p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|'

demo: $(READY_RUN)  ## four ranks on this machine run an MoE layer, every round checked
	$(PY) -m epmoe demo

test: $(READY_TEST)  ## every short test, and the distributed ones under mpirun with 2 and 4 ranks
	$(PYTEST) $(SHORT) tests
	$(MAKE) --no-print-directory mpi RANKS=2
	$(MAKE) --no-print-directory mpi RANKS=4

# A failing rank ends the job with its own error; the time limit ends a job that does not end itself.
.PHONY: mpi
RANKS ?= 4
mpi: $(READY_TEST)
	MPIEXEC_TIMEOUT=240 launch/mpirun.sh $(RANKS) $(PYTEST) --with-mpi --color=no \
	  -m "ranks and not night and not gpu" tests

check: $(READY_TEST)  ## ruff, formatting, types, the direction of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PYTEST) tests/test_floors.py

test-gpu: $(READY_TEST)  ## the tests that need a Hopper GPU
	$(PYTEST) -m "gpu and not night" tests

# Barriers of a block: left to find out by itself, synccheck tracks too few and breaks the kernel.
# Errors of API calls are not reported: cuda-core asks old drivers for functions that they lack.
SANITIZER ?= compute-sanitizer
sanitize: $(READY_TEST)  ## one small round under memcheck, synccheck and racecheck, on a Hopper GPU
	for tool in memcheck synccheck racecheck; do PYTHONPATH=. $(SANITIZER) --tool $$tool \
	  --num-cuda-barriers 512 --report-api-errors no --error-exitcode 9 \
	  $(PY) tests/gpu/fused_round.py --tiny || exit; done

kills: $(READY_TEST)  ## a hundred ranks killed on pairs of GPUs, two minutes at most
	PYTHONPATH=. $(PY) tests/gpu/kills.py --ranks 2 --schedules 100

model: $(READY_TEST)  ## every order of events of a round, and the planted mistakes
	$(PYTEST) $(SHORT) tests/model

sim: $(READY_TEST)  ## the host code under a seeded scheduler
	$(PYTEST) $(SHORT) tests/sim

fuzz: $(READY_TEST)  ## the long simulations and the long fault schedules
	$(PYTEST) -m "night and not gpu" tests/sim tests/faults

night: $(READY_TEST)  ## the long form of every test
	$(PYTEST) -m "night and not gpu" --timeout 3600 tests

bench: $(READY_RUN)  ## dispatch and combine beside torch.distributed, in one run
	$(PY) -m epmoe bench transport

clean:  ## remove the environment and everything that tools leave behind
	rm -rf "$(or $(VENV),.venv)" build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	find epmoe tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up ---------------------------------------------------------------------------------------
# torch comes first and alone: on Linux its default build brings 2.5 GB of CUDA, so a machine without
# an NVIDIA GPU gets the CPU build or a sentence that says what to do, never the other one in silence.

have-run:
	@$(PY) -c "import torch, numpy, rich" || \
	  { echo "make: VENV is empty, so nothing is installed: $(PY) must have the modules itself" >&2; exit 1; }

have-test: have-run
	@$(PY) -c "import pytest, pytest_timeout, hypothesis, ml_dtypes" || \
	  { echo "make: VENV is empty, so nothing is installed: $(PY) must have the modules itself" >&2; exit 1; }

ifneq ($(strip $(VENV)),)
PIP := $(PY) -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
GPU := $(shell [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1 && echo yes)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) must be Python 3.11 or later; name another: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv "$(VENV)"

$(READY_RUN): pyproject.toml $(VENV)/bin/python
	$(PIP) "pip>=23" "setuptools>=68"
ifeq ($(shell uname -s)-$(GPU),Linux-)
	@echo "no NVIDIA GPU here: installing the CPU build of torch"
	@$(PY) -c "import torch" 2>/dev/null || $(PIP) "$(TORCH_CPU)" || { echo \
	  "make: pip found no CPU build of torch ($(TORCH_CPU)) for $$($(PY) -V)." \
	  "Name an index that has it, make $(MAKECMDGOALS) TORCH_INDEX=<URL> (torch's install page gives" \
	  "the URL of its CPU builds), or use a Python that has torch, make $(MAKECMDGOALS) PYTHON=... VENV=" \
	  >&2; exit 1; }
endif
	$(PIP) --no-build-isolation --editable ".$(if $(GPU),[cuda])"
	@touch $@

$(READY_TEST): $(READY_RUN)
	$(PIP) --no-build-isolation --editable ".[test,lint,mpi$(if $(GPU),$(comma)cuda)]"
	@touch $@
endif

comma := ,
