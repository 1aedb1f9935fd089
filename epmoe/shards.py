"""Pieces of tensors out of a folder of safetensors files, and no byte more.

The files are read, not mapped.  A mapped page that was copied from stays resident until it is
unmapped: loading 64 MiB through ``safe_open(...).get_slice`` raised the peak by 130 MiB, reading
into the tensor's own memory raises it by 64.  What the kernel keeps in its page cache is the same
either way; it is nobody's memory and goes when somebody needs it.

A file is 8 bytes (little-endian) with the size of a JSON header, the header, then the data; each
tensor's ``data_offsets`` count from the end of the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100 << 20  # what the reference implementation accepts
PIECE = 1 << 20  # bytes read at once where values must be rearranged or cast on the way


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int  # byte of its first value, from the start of the file


class Folder:
    """The tensors of one checkpoint folder by name.  ``bytes_read`` counts data and headers."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._headers: dict[Path, dict[str, Stored]] = {}
        index = self.folder / INDEX
        if index.is_file():
            self.bytes_read += index.stat().st_size
            try:
                where = dict(json.loads(index.read_bytes())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no index with a weight_map: {error!r}") from error
            self._files = {name: self.folder / file for name, file in where.items()}
        elif (self.folder / SINGLE).is_file():
            only = self.folder / SINGLE
            self._files = dict.fromkeys(self._header(only), only)
        else:
            raise FileNotFoundError(f"folder {self.folder} has neither {INDEX} nor {SINGLE}")

    def names(self) -> Iterator[str]:
        """Every tensor of the checkpoint; opens no shard."""
        return iter(self._files)

    def find(self, name: str) -> Stored:
        """Where ``name`` lies; a ``ValueError`` that names folder or file if it lies nowhere."""
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        file = self._files[name]
        if not file.is_file():
            raise FileNotFoundError(f"{file}, which holds {name!r}, does not exist")
        if name not in (header := self._header(file)):
            raise ValueError(f"{file} has no tensor {name!r} of a dtype in {sorted(DTYPES)}")
        return header[name]

    def read(self, stored: Stored, out: Tensor, *, skip: int = 0) -> None:
        """Fill contiguous ``out`` with the values from number ``skip`` on; no copy in between."""
        if out.dtype != stored.dtype or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(
                f"out must be contiguous {stored.dtype} in host memory for {stored.name!r}, "
                f"got {out.dtype} on {out.device}"
            )
        if skip + out.numel() > math.prod(stored.shape):
            raise ValueError(
                f"values {skip} to {skip + out.numel()} of {stored.name!r} in {stored.file}: "
                f"it has {math.prod(stored.shape)}"
            )
        if out.numel() == 0:
            return
        target = out.reshape(-1).view(torch.uint8).numpy().data
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.at + skip * out.dtype.itemsize)
            done = 0
            while done < len(target):
                got = file.readinto(target[done:])
                if not got:
                    raise ValueError(f"{stored.file} ends inside {stored.name!r}")
                done += got
        self.bytes_read += len(target)

    def pieces(self, stored: Stored, skip: int, rows: int, width: int) -> Iterator[Tensor]:
        """``rows`` rows of ``width`` values from value ``skip`` on, an even number at a time.

        Every piece lies in the same memory: use it before asking for the next.
        """
        at_once = max(2, PIECE // (width * stored.dtype.itemsize) & ~1)
        scratch = torch.empty(min(at_once, rows), width, dtype=stored.dtype, device="cpu")
        for first in range(0, rows, at_once):
            piece = scratch[: min(at_once, rows - first)]
            self.read(stored, piece, skip=skip + first * width)
            yield piece

    def _header(self, file: Path) -> dict[str, Stored]:
        if file not in self._headers:
            self._headers[file] = dict(self._parse(file))
        return self._headers[file]

    def _parse(self, file: Path) -> Iterator[tuple[str, Stored]]:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise ValueError(f"{file} is no safetensors file: its header would be {length}")
            text = handle.read(length)
        self.bytes_read += 8 + length
        try:
            entries = json.loads(text)
            for name, entry in entries.items():
                if name != "__metadata__" and entry["dtype"] in DTYPES:
                    yield name, _stored(name, file, entry, 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has a broken header: {error}") from error


def _stored(name: str, file: Path, entry: dict[str, Any], data: int, size: int) -> Stored:
    """A header entry, its place checked against its shape and the size of the file."""
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, end = entry["data_offsets"]
    if end - first != math.prod(shape) * dtype.itemsize or first < 0 or data + end > size:
        raise ValueError(f"{name!r} of shape {shape} cannot lie at {first} to {end}")
    return Stored(name, file, dtype, shape, data + first)
