"""Power-of-two scales: every byte, and the scale of every kind of largest value."""

import math

import ml_dtypes
import numpy as np
import torch

from epmoe.formats import ue8m0


def test_every_byte_means_what_ml_dtypes_says():
    bytes_ = np.arange(256, dtype=np.uint8)
    want = bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    got = ue8m0.decode(torch.from_numpy(bytes_)).double().numpy()
    assert np.array_equal(got, want, equal_nan=True)
    inverse = ue8m0.reciprocal(torch.from_numpy(bytes_)).double().numpy()
    assert np.array_equal(inverse[:255] * want[:255], np.ones(255))
    assert np.isnan(inverse[255])


def test_a_scale_is_the_smallest_that_reaches():
    rng = np.random.default_rng(3)
    largest = np.abs(rng.standard_normal(10_000)) * np.exp2(rng.integers(-120, 120, 10_000))
    edge = 6.0 * np.exp2(rng.integers(-120, 120, 500).astype(np.float64))
    above = np.nextafter(edge.astype(np.float32), np.float32(np.inf))
    for value in np.concatenate([largest, edge, above]).astype(np.float32):
        byte = int(ue8m0.encode_e2m1(torch.tensor(value)))
        assert 6 * math.ldexp(1, byte - 127) >= float(value)
        assert byte == 0 or 6 * math.ldexp(1, byte - 128) < float(value)


def test_zero_and_what_is_not_finite():
    x = torch.tensor([0.0, torch.inf, torch.nan, 2.0**-149])
    assert ue8m0.encode_e2m1(x).tolist() == [0, 255, 255, 0]
