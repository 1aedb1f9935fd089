"""Four-bit codes against ml_dtypes and against the table, every code and every tie."""

import ml_dtypes
import numpy as np
import pytest
import torch
from number_oracle import e2m1_code

from epmoe.formats import e2m1


def test_every_code_means_what_ml_dtypes_says():
    want = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = e2m1.decode(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(got.view(torch.int32), torch.from_numpy(want).view(torch.int32))


def test_ten_thousand_values_round_as_ml_dtypes_rounds():
    rng = np.random.default_rng(1)
    near = rng.integers(-28, 29, 5000) / 4 + rng.choice([0, 1e-7, -1e-7], 5000)
    x = np.concatenate([near, rng.standard_normal(5000) * 4]).astype(np.float32)
    assert e2m1.encode(torch.from_numpy(x)).tolist() == e2m1_code(x).tolist()


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (7.0, 7)],
)
def test_a_tie_goes_to_the_even_code_and_too_large_to_six(value, code):
    assert e2m1.encode(torch.tensor([value, -value])).tolist() == [code, code + 8]


def test_zero_keeps_its_sign():
    assert e2m1.encode(torch.tensor([0.0, -0.0, -1e-30])).tolist() == [0, 8, 8]


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (4, 32), (2, 3, 1568), (1, 1632), (1, 2080)])
def test_pack_and_unpack_are_inverse(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = e2m1.pack(codes)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(e2m1.unpack(packed), codes)


def test_the_even_column_is_in_the_low_half():
    assert e2m1.pack(torch.tensor([3, 12], dtype=torch.uint8)).item() == 3 + 12 * 16


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))
