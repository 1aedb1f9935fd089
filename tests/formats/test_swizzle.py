"""The 128 x 4 order against its closed form, byte by byte, and its inverse."""

import numpy as np
import pytest
import torch

from epmoe.formats.swizzle import flat_size, swizzle, unswizzle

SHAPES = [(200, 10), (1, 1), (128, 4), (129, 5), (0, 98), (7, 0), (3, 98), (130, 102), (2, 130)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_byte_is_where_the_closed_form_says(rows, cols):
    m = np.random.default_rng(rows).integers(1, 256, (rows, cols)).astype(np.uint8)
    across = -(-cols // 4)
    want = np.zeros(-(-rows // 128) * across * 512, np.uint8)
    for r in range(rows):
        for c in range(cols):
            tile = (r // 128) * across + c // 4
            want[tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4] = m[r, c]
    assert flat_size(rows, cols) == len(want)
    assert swizzle(torch.from_numpy(m)).tolist() == want.tolist()


def test_vector_a3_is_3072_bytes():
    assert swizzle(torch.zeros(200, 10, dtype=torch.uint8)).shape == (3072,)


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_unswizzle_is_the_inverse_for_any_number_of_slots(slots, rows, cols, dtype):
    scales = torch.randint(0, 256, (slots, rows, cols), dtype=torch.uint8).view(dtype)
    flat = swizzle(scales)
    assert flat.shape == (slots, flat_size(rows, cols))
    back = unswizzle(flat, rows, cols)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_what_has_more_than_a_byte_or_the_wrong_size_is_refused():
    with pytest.raises(TypeError, match="one byte"):
        swizzle(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="3072"):
        unswizzle(torch.zeros(512, dtype=torch.uint8), 200, 10)
