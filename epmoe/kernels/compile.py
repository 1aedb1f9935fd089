"""CUDA C++ from ``kernels/cu`` to a kernel that can be launched, through NVRTC, with a file cache.

Sources include nothing but their neighbours in ``cu/`` (no CUDA headers), so an NVRTC of any 13.x
is all that compiling needs: no driver, no GPU, no toolkit.  The driver is touched by the first
launch (or by ``load``, which a caller uses before a graph capture).

The cache is one folder per user (0700).  A file's name is a hash of everything that decides its
bytes, but for the path in its line table: the source, all files it includes, the constants, the
options, the compiler.  A file carries the hash of its own content and appears by ``os.replace``: a
reader sees a whole file or none, so any number of processes may race, and one that dies while
writing leaves nothing that can be loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epmoe.errors import EpmoeError
from epmoe.kernels.launch import CompiledKernel, Resources

SOURCES = Path(__file__).parent / "cu"
ARCH = "sm_90a"
MAGIC = b"epmoe-cubin-1\n"
OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "lineinfo": True,
    "device_as_default_execution_space": True,
    "ptxas_options": ["-v", "--warn-on-spills"],
}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


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
    sources = [sorted(files.items()), sorted(constants.items())]
    told = [MAGIC.decode(), arch, version, sorted(OPTIONS.items()), *sources]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _build(source: str, text: str, constants: Mapping[str, str], arch: str) -> tuple[str, bytes]:
    from cuda.core import Program, ProgramOptions

    class Log(list[str]):
        def write(self, text: str) -> None:
            self.append(text)

    log = Log()
    options = ProgramOptions(
        name=str(SOURCES / source),  # with its folder: a name alone is looked for where we run
        arch=arch,
        include_path=str(SOURCES),
        no_cache=True,  # of its own: what comes from there comes without a log
        define_macro=list(constants.items()) or None,  # an empty list is refused
        **OPTIONS,
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
