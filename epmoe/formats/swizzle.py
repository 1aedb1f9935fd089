"""The order in which tensor cores of the FP4 generation read block scales: tiles of 128 x 4."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, COLS, TILE = 128, 4, 512


def flat_size(rows: int, cols: int) -> int:
    """Bytes of a swizzled (rows, cols) matrix of byte-sized scales, whole tiles.

    >>> flat_size(200, 10), flat_size(1, 98)
    (3072, 12800)
    """
    return -(-rows // ROWS) * -(-cols // COLS) * TILE


def swizzle(scales: Tensor) -> Tensor:
    """(..., rows, cols) byte-sized scales -> (..., flat_size) bytes, padded with zero bytes.

    Scale (r, c) lands at ((r // 128) * ceil(cols / 4) + c // 4) * 512 + (r % 32) * 16
    + (r % 128) // 32 * 4 + c % 4: scale (33, 6) of a (128, 8) matrix at 512 + 16 + 4 + 2 = 534.
    """
    if scales.dtype.itemsize != 1:
        raise TypeError(f"scales must have one byte each, got {scales.dtype}")
    *lead, rows, cols = scales.shape
    down, across = -(-rows // ROWS), -(-cols // COLS)
    padding = (0, across * COLS - cols, 0, down * ROWS - rows)
    padded = torch.nn.functional.pad(scales.view(torch.uint8), padding)
    tiles = padded.reshape(*lead, down, 4, 32, across, COLS)
    n = len(lead)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
    return tiles.permute(order).reshape(*lead, flat_size(rows, cols)).view(scales.dtype)


def unswizzle(flat: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of :func:`swizzle`; what was padded is dropped."""
    if flat.dtype.itemsize != 1:
        raise TypeError(f"flat must have one byte per scale, got {flat.dtype}")
    if flat.shape[-1] != flat_size(rows, cols):
        raise ValueError(
            f"flat must end in {flat_size(rows, cols)} bytes for ({rows}, {cols}) scales, "
            f"got {tuple(flat.shape)}"
        )
    lead = flat.shape[:-1]
    down, across = -(-rows // ROWS), -(-cols // COLS)
    tiles = flat.view(torch.uint8).reshape(*lead, down, across, 32, 4, COLS)
    n = len(lead)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
    padded = tiles.permute(order).reshape(*lead, down * ROWS, across * COLS)
    return padded[..., :rows, :cols].contiguous().view(flat.dtype)
