"""Slabs of GPU memory that every rank reaches by plain addresses, whoever mapped them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from epmoe.errors import EpmoeError


class DeviceSlabs:
    """The half of a device heap that does not depend on how its memory was had.

    A heap's constructor fills ``_addresses``, one for each rank; ``close`` empties it.
    ``address(rank)`` is what kernels use, ``peer(rank)`` the same bytes as a tensor.
    """

    def __init__(self, rank: int, ranks: int, generation: int, nbytes: int) -> None:
        self.rank, self.ranks, self.generation = rank, ranks, generation
        self._nbytes = nbytes
        self._addresses: list[int] = []
        self._device = 0  # mine; a constructor sets it
        self._driver: Any = None

    @property
    def mine(self) -> torch.Tensor:
        """My slab as bytes."""
        return self.peer(self.rank)

    def peer(self, rank: int) -> torch.Tensor:
        """The slab of ``rank`` as bytes, on my device: only its kernels may follow the address.

        (Asked without a device, torch takes the one where the memory lies, and a kernel there
        faults: each device has been given access to its own rank's mappings only.)
        """
        here = torch.device("cuda", self._device)
        content = torch.as_tensor(_Span(self._addresses[rank], self._nbytes), device=here)
        if content.data_ptr() != self._addresses[rank]:
            raise EpmoeError(f"rank {self.rank}: torch {torch.__version__} copied a peer's slab")
        return content

    def address(self, rank: int) -> int:
        """Where the slab of ``rank`` starts, in this process."""
        return self._addresses[rank]

    def write(self, rank: int, at: int, content: torch.Tensor, stream: int) -> None:
        """Bytes of the host into a slab, in order on ``stream``; the host waits for its turn."""
        size = content.numel() * content.element_size()
        where = self._addresses[rank] + at
        self._call(self._driver.cuMemcpyHtoDAsync, where, content.data_ptr(), size, stream)

    def read(self, rank: int, at: int, nbytes: int) -> bytes:
        """Bytes of a slab as they stand now."""
        content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        # Not behind kernels that wait.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        where = self._addresses[rank] + at
        self._call(
            self._driver.cuMemcpyDtoHAsync, content.data_ptr(), where, nbytes, stream.cuda_stream
        )
        stream.synchronize()
        return bytes(content.tolist())

    def _clear(self) -> None:
        """Zeros in my slab, before any peer may write to it."""
        self._call(self._driver.cuMemsetD8, self.address(self.rank), 0, self._nbytes)
        self._call(self._driver.cuCtxSynchronize)

    def _expect_gpu(self) -> None:
        """An ``EpmoeError`` if the current device is none that kernels are for."""
        if reason := why_not():
            raise EpmoeError(f"rank {self.rank}: no heap of GPU memory here: {reason}")

    def _expect_free(self, nbytes: int) -> None:
        """An ``EpmoeError`` if the current device has not so much memory left."""
        free, _ = torch.cuda.mem_get_info(torch.cuda.current_device())
        if nbytes > free:
            raise EpmoeError(
                f"rank {self.rank}: the slab needs {nbytes / 2**20:.1f} MiB and "
                f"{free / 2**20:.1f} MiB of GPU memory are free; lower max_rows or lanes"
            )

    def _call(self, function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
        status, *values = function(*args)
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            what = text.decode() if text else str(status)
            raise EpmoeError(f"rank {self.rank}: {function.__name__}: {what}")
        return values[0] if values else None


class _Span:
    """Bytes at an address, as torch reads them without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def why_not() -> str:
    """An empty text, or why this process cannot use GPU memory for a heap.  Never raises."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        at = torch.cuda.current_device()
        return f"GPU {at} has compute capability {major}.{minor}, the kernels are for 9.0 (Hopper)"
    try:
        driver()
    except EpmoeError as error:
        return str(error)
    return ""


def driver() -> Any:
    """The driver's calls; an ``EpmoeError`` that names the package if they are not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EpmoeError(f"the extra epmoe[cuda] is not installed: {error}") from error
    return driver
