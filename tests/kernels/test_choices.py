"""Which slot an id names: cu/choices.cuh compiled for this machine, against the definition."""

import ctypes

import numpy as np
import pytest
from on_cpu import built, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def look_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    return built(folder, "choices.cpp", ["choices.cuh"]).look_up


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("by_table", [False, True], ids=["slots", "experts"])
def test_an_id_names_its_slot_none_or_nothing(look_up, by_table, wide):
    rng, known = np.random.default_rng(5), 131
    ids = rng.integers(0, known, 4000)
    strange = [-1, -2, known, known + 7, 2**31 - 1, -(2**31)]
    strange += [2**32, 2**32 + 3, -(2**32) - 1, 2**63 - 1, -(2**63), 2**32 - 1] if wide else []
    ids[rng.integers(0, len(ids), 900)] = rng.choice(strange, 900)
    ids = np.ascontiguousarray(ids, np.int64 if wide else np.int32)
    table = rng.permutation(known).astype(np.int32)
    out = np.zeros(len(ids), np.int32)
    at = table.ctypes.data if by_table else None
    look_up(
        ctypes.c_void_p(ids.ctypes.data),
        ctypes.c_void_p(at),
        known,
        int(wide),
        len(ids),
        ctypes.c_void_p(out.ctypes.data),
    )
    names = (ids >= 0) & (ids < known)
    slots = table[np.where(names, ids, 0)] if by_table else ids
    assert np.array_equal(out, np.where(names, slots, np.where(ids == -1, -1, -2)))
