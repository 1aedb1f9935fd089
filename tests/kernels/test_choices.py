"""Which slot an id names: cu/choices.cuh compiled for this machine, against the definition."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from epmoe.kernels.compile import SOURCES

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# All that the header takes from CUDA and from ptx.cuh.
STUB = """
#pragma once
using u8 = unsigned char; using u32 = unsigned; using u64 = unsigned long long;
template <typename T> T __ldg(const T* p) { return *p; }
"""
CALL = """
#include "choices.cuh"
extern "C" void look_up(const void* ids, const int* table, u32 known, u32 wide, u32 cells,
                        int* out) {
    const Choices choices{ids, table, known, wide};
    for (u32 c = 0; c < cells; ++c) {
        const Choices::Id id = choices.id(c);
        out[c] = choices.slot(id, choices.found(id));
        if (choices.names(c) != (out[c] >= 0)) out[c] = -99;
    }
}
"""


@pytest.fixture(scope="module")
def look_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    (folder / "choices.cuh").write_text((SOURCES / "choices.cuh").read_text())
    (folder / "ptx.cuh").write_text(STUB)
    (folder / "call.cpp").write_text(CALL)
    made = folder / "choices.so"
    run = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", made, folder / "call.cpp"]
    subprocess.run(run, check=True)
    return ctypes.CDLL(str(made)).look_up


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
