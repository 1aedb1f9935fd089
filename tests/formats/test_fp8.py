"""FP8 blocks and rows against loops in numpy: bytes, not closeness."""

import numpy as np
import pytest
import torch
from number_oracle import fp8_matrix, fp8_row, same_bytes, wild_rows

from epmoe.formats import fp8


@pytest.mark.parametrize("width", [32, 128, 160, 288])
def test_ten_thousand_rows_are_the_bytes_of_the_oracle(width):
    """2,500 rows for each of four widths."""
    x = wild_rows(2500, width, seed=width)
    codes, scales = fp8.quantise_rows(torch.from_numpy(x))
    values = fp8.dequantise_rows(codes, scales)
    want = [fp8_row(row) for row in x]
    assert same_bytes(codes, np.stack([w[0] for w in want]))
    assert same_bytes(scales, np.stack([w[1] for w in want]))
    assert same_bytes(values, np.stack([w[2] for w in want]))


@pytest.mark.parametrize(
    ("n", "k"), [(128, 128), (32, 1568), (1632, 96), (160, 288), (1, 130), (257, 127)]
)
def test_matrices_are_the_bytes_of_the_oracle(n, k):
    w = np.stack([wild_rows(n, k, seed=s, low=-8, high=8) for s in (n, k)])
    codes, scales = fp8.quantise_blocks(torch.from_numpy(w))
    values = fp8.dequantise_blocks(codes, scales)
    for slot in range(2):
        want = fp8_matrix(w[slot])
        for got, part in zip((codes, scales, values), want, strict=True):
            assert same_bytes(got[slot], part)


@pytest.mark.parametrize("hidden", [1568, 1632, 2080])
@pytest.mark.parametrize("rows", [0, 3])
def test_widths_that_are_no_multiple_of_128(hidden, rows):
    x = wild_rows(rows, hidden, seed=11)
    codes, scales = fp8.quantise_rows(torch.from_numpy(x))
    assert codes.shape == (rows, hidden)
    assert scales.shape == (rows, -(-hidden // 128))
    for k in range(rows):
        assert same_bytes(codes[k], fp8_row(x[k])[0])


def test_no_slots_is_a_number_of_slots():
    codes, scales = fp8.quantise_blocks(torch.zeros(0, 160, 288))
    assert scales.shape == (0, 2, 3)
    assert fp8.dequantise_blocks(codes, scales).shape == (0, 160, 288)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(bad):
    x = torch.ones(1, 256)
    x[0, 3] = bad
    values = fp8.dequantise_rows(*fp8.quantise_rows(x))
    assert values[0, 3].isnan()
    assert values[0, 128:].isfinite().all()


def test_a_block_of_zeros_has_the_floor_as_its_scale():
    codes, scales = fp8.quantise_rows(torch.zeros(1, 128))
    assert codes.float().abs().max() == 0
    assert scales.item() == float(np.float32(1e-4) / np.float32(448))
