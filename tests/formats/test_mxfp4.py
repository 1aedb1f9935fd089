"""MXFP4 against loops in numpy: bytes, not closeness."""

import numpy as np
import pytest
import torch
from number_oracle import mxfp4_row, same_bytes, wild_rows

from epmoe.formats import mxfp4


def test_ten_thousand_rows_are_the_bytes_of_the_oracle():
    x = wild_rows(10_000, 64, seed=7, low=-100, high=100)
    packed, scales = mxfp4.quantise(torch.from_numpy(x))
    values = mxfp4.dequantise(packed, scales)
    want = [mxfp4_row(row) for row in x]
    assert same_bytes(packed, np.stack([w[0] for w in want]))
    assert same_bytes(scales, np.stack([w[1] for w in want]))
    assert same_bytes(values, np.stack([w[2] for w in want]))


@pytest.mark.parametrize("hidden", [1568, 1632, 2080])
@pytest.mark.parametrize("rows", [0, 3])
def test_widths_that_are_no_multiple_of_64(hidden, rows):
    x = wild_rows(rows, hidden, seed=8)
    packed, scales = mxfp4.quantise(torch.from_numpy(x))
    assert packed.shape == (rows, hidden // 2)
    assert scales.shape == (rows, hidden // 32)
    for k in range(rows):
        assert same_bytes(packed[k], mxfp4_row(x[k])[0])


def test_writing_what_was_read_changes_nothing():
    x = torch.from_numpy(wild_rows(500, 64, seed=9))
    once = mxfp4.dequantise(*mxfp4.quantise(x))
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(once)), once)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bad):
    x = torch.ones(1, 64)
    x[0, 3] = bad
    values = mxfp4.dequantise(*mxfp4.quantise(x))
    assert values[0, :32].isnan().all()
    assert (values[0, 32:] == 1).all()


def test_a_width_that_is_no_whole_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp4.quantise(torch.zeros(1, 48))
