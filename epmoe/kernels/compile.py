"""CUDA C++ from ``kernels/cu`` to a kernel that can be launched, through NVRTC, with a file cache.

Sources include nothing but their neighbours in ``cu/`` (no CUDA headers), so an NVRTC of any 13.x
is all that compiling needs: no driver, no GPU, no toolkit.  The driver is touched by the first
launch (or by ``load``, which a caller uses before a graph capture).

The cache is one folder per user (0700).  A file's name is a hash of everything that decides its
bytes: the source, all files it includes, the constants, the options, the compiler.  A file carries
the hash of its own content and appears by ``os.replace``: a reader sees a whole file or none, so
any number of processes may race, and one that dies while writing leaves nothing that can be loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epmoe.errors import EpmoeError

SOURCES = Path(__file__).parent / "cu"
ARCH = "sm_90a"
MAGIC = b"epmoe-cubin-1\n"
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

Value = Any  # what a kernel parameter may be: int, float, ctypes scalar, bytes (by value), tensor


@dataclass(frozen=True, slots=True)
class Resources:
    """What the assembler says one entry takes; ``shared`` is the static part."""

    registers: int
    spills: int  # bytes stored to or loaded from local memory
    shared: int


@dataclass(slots=True)
class CompiledKernel:
    """One entry of one cubin.  Cheap until ``load``; safe to keep for the life of the process."""

    entry: str
    cubin: bytes
    resources: Resources
    log: str
    _kernel: Any = field(default=None, repr=False)
    _keep: Any = field(default=None, repr=False)  # the library that owns the kernel

    def load(self, shared: int = 0) -> None:
        """Load into the current CUDA context and allow ``shared`` bytes of dynamic memory.

        Not allowed inside a graph capture: call it once before.
        """
        from cuda.bindings import driver
        from cuda.core import ObjectCode

        if self._kernel is None:
            self._keep = ObjectCode.from_cubin(self.cubin)
            self._kernel = self._keep.get_kernel(self.entry)
        if shared > 48 * 1024:
            device = _checked(driver.cuCtxGetDevice())
            name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuKernelSetAttribute(name, shared, self._kernel.handle, device))

    def launch(
        self,
        stream: int,
        grid: Sequence[int],
        block: int,
        args: Sequence[Value],
        *,
        cluster: int = 1,
        shared: int = 0,
    ) -> None:
        """Enqueue on ``stream`` (a raw CUstream) ``grid`` blocks of ``block`` threads.

        ``grid`` counts blocks and must divide by ``cluster``.  An int goes to any integer or
        pointer parameter, a tensor as its address, bytes as a struct by value.
        """
        Launch(self, grid, block, args, cluster=cluster, shared=shared).enqueue(stream)


class Launch:
    """One launch with its parameters packed, to be enqueued as often as wanted.

    Packing is most of what a launch costs in Python: a layer that runs the same launch every round
    keeps one of these.  The tensors among ``args`` are kept alive.
    """

    def __init__(
        self,
        kernel: CompiledKernel,
        grid: Sequence[int],
        block: int,
        args: Sequence[Value],
        *,
        cluster: int = 1,
        shared: int = 0,
    ) -> None:
        from cuda.bindings import driver

        if grid[0] % cluster:
            raise ValueError(f"grid[0] must be a multiple of cluster ({cluster}), got {grid[0]}")
        kernel.load(shared)
        self._driver, self._kernel, self._args = driver, kernel, list(args)
        self._cells = [_cell(a) for a in args]
        self._table = _array(ctypes.c_void_p, max(1, len(args)))(
            *(ctypes.addressof(c) for c in self._cells)
        )
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        config.attrs, config.numAttrs = [attribute], 1
        self._config = config
        self._function = driver.CUfunction(int(kernel._kernel.handle))

    def enqueue(self, stream: int, *last: Value, blocks: int = 0) -> None:
        """``last`` takes the place of as many arguments at the end, ``blocks`` that of grid[0].

        The stream's order keeps what they point to alive, this launch does not: making one anew
        takes three times as long.
        """
        for cell, value in zip(self._cells[len(self._cells) - len(last) :], last, strict=True):
            _put(cell, value)
        if blocks:
            self._config.gridDimX = blocks
        self._config.hStream = stream
        _checked(
            self._driver.cuLaunchKernelEx(
                self._config, self._function, ctypes.addressof(self._table), 0
            )
        )


def _put(cell: Any, value: Value) -> None:
    """Another value of the same kind in a parameter's bytes."""
    if hasattr(value, "data_ptr"):
        cell.value = value.data_ptr()
    elif isinstance(value, bytes):
        cell.raw = value
    else:
        cell.value = value


@functools.cache
def _array(of: Any, length: int) -> Any:
    """The type; ctypes makes it anew, for the garbage collector to find, once the last one went."""
    return of * length


def _cell(value: Value) -> Any:
    """The bytes of one parameter, at an address that stays; the driver copies what it needs."""
    if hasattr(value, "data_ptr"):
        return ctypes.c_uint64(value.data_ptr())
    if isinstance(value, bytes):
        raw = _array(ctypes.c_char, len(value) + 63)()
        at = -ctypes.addressof(raw) % 64  # a tensor map wants 64-byte alignment on the host too
        cell = _array(ctypes.c_char, len(value)).from_buffer(raw, at)
        cell.raw = value
        return cell
    if isinstance(value, bool | int):
        return ctypes.c_uint64(int(value) & (1 << 64) - 1)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, ctypes._SimpleCData):
        return value
    raise TypeError(f"a kernel parameter cannot be a {type(value).__name__}")


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a driver call, or an error with the driver's own words."""
    from cuda.bindings import driver

    code, *values = answer
    if int(code) != 0:
        _, text = driver.cuGetErrorString(code)
        raise EpmoeError(f"CUDA driver: {code.name}: {text.decode() if text else 'no text'}")
    return values[0] if len(values) == 1 else tuple(values) or None


def compile_kernel(
    source: str,
    entry: str,
    defines: Mapping[str, int | str] | None = None,
    *,
    cache: Path | None = None,
    arch: str = ARCH,
) -> CompiledKernel:
    """The entry ``entry`` (extern "C") of ``cu/<source>``, compiled with ``-D`` constants.

    Never loads the driver.  Equal arguments and sources give the cached bytes; ``cache`` is the
    folder (default: ``cache_folder()``).  A source that does not compile is an ``EpmoeError`` with
    the compiler's log.
    """
    constants = {name: str(value) for name, value in sorted((defines or {}).items())}
    files = _closure(source)
    path = (cache or cache_folder()) / f"{_key(files, constants, arch)}.cubin"
    found = _read(path)
    if found is None:
        found = _build(source, files[source], constants, arch)
        _write(path, *found)
    log, cubin = found
    resources = _resources(log)
    if entry not in resources:
        raise ValueError(f"entry must be one of {sorted(resources)} in {source}, got {entry!r}")
    return CompiledKernel(entry, cubin, resources[entry], log)


def cache_folder() -> Path:
    """The folder of compiled kernels: ``$EPMOE_CACHE``, else ``~/.cache/epmoe``; 0700 and ours.

    A folder that others can write to is refused: what lies in it is run on the GPU.
    """
    named = os.environ.get("EPMOE_CACHE")
    folder = Path(named) if named else Path.home() / ".cache" / "epmoe"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise EpmoeError(
            f"the folder of compiled kernels {folder} cannot be used ({error}); "
            f"name another in EPMOE_CACHE"
        ) from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EpmoeError(
            f"the folder of compiled kernels {folder} must belong to uid {os.getuid()} and be "
            f"writable by nobody else, got uid {found.st_uid} mode {found.st_mode & 0o777:o}"
        )
    return folder


def _closure(source: str) -> dict[str, str]:
    """Texts of ``source`` and of every neighbour it includes, however deep."""
    texts: dict[str, str] = {}
    pending = [source]
    while pending:
        name = pending.pop()
        if name not in texts:
            texts[name] = (SOURCES / name).read_text()
            pending.extend(INCLUDE.findall(texts[name]))
    return texts


def _key(files: Mapping[str, str], constants: Mapping[str, str], arch: str) -> str:
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    told = [MAGIC.decode(), arch, version, sorted(files.items()), sorted(constants.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _build(source: str, text: str, constants: Mapping[str, str], arch: str) -> tuple[str, bytes]:
    from cuda.core import Program, ProgramOptions

    class Log(list[str]):
        def write(self, text: str) -> None:
            self.append(text)

    log = Log()
    options = ProgramOptions(
        name=source,
        std="c++17",
        arch=arch,
        include_path=str(SOURCES),
        lineinfo=True,
        device_as_default_execution_space=True,
        ptxas_options=["-v", "--warn-on-spills"],
        no_cache=True,  # of its own: what comes from there comes without a log
        define_macro=list(constants.items()) or None,  # an empty list is refused
    )
    try:
        code = Program(text, "c++", options=options).compile("cubin", logs=log)
    except Exception as error:  # noqa: BLE001  cuda.core has no one class for a failed compile
        raise EpmoeError(f"{source} does not compile with {dict(constants)}: {error}") from error
    return "".join(log), bytes(code.code)


def _resources(log: str) -> dict[str, Resources]:
    """What ``-v`` reported for each entry.

    >>> _resources('''Compiling entry function 'f' for 'sm_90a'
    ... 0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
    ... Used 32 registers, used 1 barriers, 64 bytes smem''')
    {'f': Resources(registers=32, spills=12, shared=64)}
    """
    found = {}
    parts = ENTRY.split(log)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        spill, used, shared = SPILL.search(text), USED.search(text), SHARED.search(text)
        found[name] = Resources(
            registers=int(used[1]) if used else 0,
            spills=int(spill[2]) + int(spill[3]) if spill else 0,
            shared=int(shared[1]) if shared else 0,
        )
    return found


def _read(path: Path) -> tuple[str, bytes] | None:
    """The log and the cubin of a whole, unchanged file of ours; None for anything else."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            data = file.read()
    except FileNotFoundError:
        return None
    head = len(MAGIC) + 32
    body = data[head:]
    if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : head] != hashlib.sha256(body).digest():
        return None
    size = int.from_bytes(body[:8], "little")
    return body[8 : 8 + size].decode(), body[8 + size :]


def _write(path: Path, log: str, cubin: bytes) -> None:
    text = log.encode()
    body = len(text).to_bytes(8, "little") + text + cubin
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
