"""Eight-bit floats against ml_dtypes."""

import ml_dtypes
import numpy as np
import torch
from number_oracle import same_bytes

from epmoe.formats import e4m3


def test_ten_thousand_values_round_as_ml_dtypes_rounds():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(9000) * np.exp2(rng.integers(-14, 8, 9000))).astype(np.float32)
    ties = rng.integers(0, 64, 1000) * np.float32(2.0**-10)  # halfway in the subnormals
    x = np.clip(np.concatenate([x, ties]), -448, 448).astype(np.float32)
    assert same_bytes(e4m3.encode(torch.from_numpy(x)), x.astype(ml_dtypes.float8_e4m3fn))


def test_too_large_saturates_and_nan_stays():
    got = e4m3.encode(torch.tensor([465.0, 1e30, torch.inf, -torch.inf, torch.nan])).float()
    assert got[:4].tolist() == [448.0, 448.0, 448.0, -448.0]
    assert got[4].isnan()
