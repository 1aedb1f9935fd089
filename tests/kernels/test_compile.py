"""The cache gives whole kernels or none, whoever races, dies or tampers."""

import ctypes
import os
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("cuda.core")
from epmoe.errors import EpmoeError
from epmoe.kernels import compile as compiling
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.launch import Launch

HEADER = "__device__ inline float scaled(float x) { return x * SCALE; }\n"
SOURCE = """#include "scaled.cuh"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] = scaled(x[threadIdx.x]); }
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
    float a[96];
    for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = a[i] * a[95 - i];
}
"""
CHILD = """
import os, signal, sys
from pathlib import Path
from epmoe.kernels import compile as compiling
compiling.SOURCES = Path(sys.argv[1])
if sys.argv[3] == "dies":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
k = compiling.compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=Path(sys.argv[2]))
print(len(k.cubin), k.resources)
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    folder = tmp_path / "cu"
    folder.mkdir()
    (folder / "scale.cu").write_text(SOURCE)
    (folder / "scaled.cuh").write_text(HEADER)
    monkeypatch.setattr(compiling, "SOURCES", folder)
    return folder


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def builds(monkeypatch):
    """Counts how often the compiler really ran."""
    count = []
    real = compiling._build
    monkeypatch.setattr(compiling, "_build", lambda *a: count.append(a) or real(*a))
    return count


def child(sources, cache, how="lives"):
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(sources), str(cache), how],
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_the_second_time_nothing_is_compiled(sources, cache, builds):
    first = compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache)
    again = compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache)
    assert len(builds) == 1
    assert (first.cubin, first.resources) == (again.cubin, again.resources)
    assert first.cubin[:4] == b"\x7fELF"


def test_whatever_decides_the_bytes_is_in_the_key(sources, cache, builds):
    compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache)
    compile_kernel("scale.cu", "scale", {"SCALE": 3}, cache=cache)
    assert len(builds) == 2
    (sources / "scaled.cuh").write_text(HEADER.replace("x *", "x +"))  # an included file
    compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache)
    assert len(builds) == 3
    compile_kernel("scale.cu", "spills", {"SCALE": 2}, cache=cache)  # another entry, same bytes
    assert len(builds) == 3


def test_a_neighbour_of_the_same_name_where_we_run_is_not_taken(
    sources, cache, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    here.mkdir()
    (here / "scaled.cuh").write_text("#error not ours\n")
    monkeypatch.chdir(here)
    assert compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache).cubin


def test_spills_are_seen(sources, cache):
    assert compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache).resources.spills == 0
    assert compile_kernel("scale.cu", "spills", {"SCALE": 2}, cache=cache).resources.spills > 0


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "other"])
def test_a_changed_file_is_built_again(sources, cache, builds, how):
    whole = compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache).cubin
    (path,) = cache.glob("*.cubin")
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-100] ^= 1
    path.write_bytes({"cut": data[:-1], "empty": b"", "other": b"x" * 500}.get(how, data))
    assert compile_kernel("scale.cu", "scale", {"SCALE": 2}, cache=cache).cubin == whole
    assert len(builds) == 2
    assert path.read_bytes()[-100] == whole[-100]


def test_a_process_killed_while_writing_leaves_nothing_that_loads(sources, cache):
    assert child(sources, cache, "dies").returncode == -signal.SIGKILL
    assert not list(cache.glob("*.cubin"))
    assert child(sources, cache).returncode == 0


def test_sixteen_processes_on_an_empty_cache(sources, cache):
    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(lambda _: child(sources, cache), range(16)))
    assert [d.returncode for d in done] == [0] * 16, done[0].stderr
    assert len({d.stdout for d in done}) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_source_that_does_not_compile_says_where(sources, cache):
    (sources / "bad.cu").write_text('extern "C" __global__ void f() { wrong(); }\n')
    with pytest.raises(EpmoeError, match=r"bad\.cu.*\n?.*wrong"):
        compile_kernel("bad.cu", "f", {}, cache=cache)
    assert not list(cache.iterdir())


def test_an_entry_that_is_not_there_is_named(sources, cache):
    with pytest.raises(ValueError, match="entry must be one of.*scale"):
        compile_kernel("scale.cu", "missing", {"SCALE": 1}, cache=cache)


def test_a_folder_that_others_may_write_is_refused(tmp_path, monkeypatch):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("EPMOE_CACHE", str(open_to_all))
    with pytest.raises(EpmoeError, match="writable by nobody else"):
        compiling.cache_folder()
    monkeypatch.setenv("EPMOE_CACHE", str(tmp_path / "new"))
    assert os.stat(compiling.cache_folder()).st_mode & 0o777 == 0o700


class Recorder:
    """Stands in for the driver: what a launch would have handed to it."""

    def __init__(self):
        self.calls = []

    def cuLaunchKernelEx(self, config, function, table, extra):  # noqa: N802  the driver's name
        cells = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))
        whole = ctypes.c_uint64.from_address(cells[1]).value
        self.calls.append((config.gridDimX, whole, ctypes.string_at(cells[2], 4)))
        return (0,)


def test_a_launch_takes_new_values_for_its_last_arguments():
    kernel = types.SimpleNamespace(
        load=lambda shared: None, _kernel=types.SimpleNamespace(handle=0)
    )
    launch = Launch(kernel, (3,), 32, [b"kept", 7, b"abcd"])
    launch._driver = driver = Recorder()
    tensor = torch.zeros(2)
    launch.enqueue(0)
    launch.enqueue(0, 1 << 40, b"efgh")
    launch.enqueue(0, tensor, b"ijkl", blocks=9)
    launch.enqueue(0, b"mnop")
    assert driver.calls == [
        (3, 7, b"abcd"),
        (3, 1 << 40, b"efgh"),
        (9, tensor.data_ptr(), b"ijkl"),
        (9, tensor.data_ptr(), b"mnop"),
    ]
