"""A compiled kernel, and launching it on a stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from epmoe.errors import EpmoeError

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
            device = checked(driver.cuCtxGetDevice())
            name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuKernelSetAttribute(name, shared, self._kernel.handle, device))


class Launch:
    """One launch with its parameters packed, to be enqueued as often as wanted.

    Packing is most of what a launch costs in Python: a layer that runs the same launch every round
    keeps one of these.  ``grid`` counts blocks and must divide by ``cluster``.  An int of ``args``
    goes to any integer or pointer parameter, a tensor as its address, bytes as a struct by value;
    tensors are kept alive.
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
        checked(
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


def checked(answer: tuple[Any, ...]) -> Any:
    """The value of a driver call, or an error with the driver's own words."""
    from cuda.bindings import driver

    code, *values = answer
    if int(code) != 0:
        _, text = driver.cuGetErrorString(code)
        raise EpmoeError(f"CUDA driver: {code.name}: {text.decode() if text else 'no text'}")
    return values[0] if len(values) == 1 else tuple(values) or None
