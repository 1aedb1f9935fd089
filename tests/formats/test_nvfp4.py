"""NVFP4 against loops in numpy: bytes, not closeness."""

import numpy as np
import pytest
import torch
from number_oracle import nvfp4_row, same_bytes, wild_rows

from epmoe.config import MoEConfig
from epmoe.formats import e2m1, nvfp4

X = [0.1, -0.2, 0.3, 0.5, -0.75, 1, 1.25, -1.5, 2, -2.5, 3, 0, 0.05, -0.6, 0.9, 1.1]
CODES = [0, -0.5, 0.5, 1, -1.5, 2, 2, -3, 4, -4, 6, 0, 0, -1, 2, 2]


def config(**more):
    return MoEConfig(experts=2, choices=1, hidden=64, inner=32, max_rows=4, format="nvfp4", **more)


@pytest.mark.parametrize(("n", "group"), [(896.0, 448.0), (1.0, 0.5)])
def test_vector_a2(n, group):
    packed, groups = nvfp4.quantise(torch.tensor([X]), torch.tensor(1 / n))
    assert groups.float().item() == group
    assert (e2m1.decode(e2m1.unpack(packed)) == torch.tensor([CODES])).all()
    got = nvfp4.dequantise(packed, groups) / n
    assert (got == torch.tensor([CODES]) * 0.5).all()


@pytest.mark.parametrize("power", [-23, -8, 0, 7])
def test_ten_thousand_rows_are_the_bytes_of_the_oracle(power):
    """2,500 rows for each of four scales; groups that vanish and groups that saturate included."""
    scale = np.float32(2.0**power * 1.37)
    x = wild_rows(2500, 32, seed=power + 40, low=power - 4, high=power + 16)
    packed, groups = nvfp4.quantise(torch.from_numpy(x), torch.tensor(scale))
    values = nvfp4.dequantise(packed, groups)
    want = [nvfp4_row(row, scale) for row in x]
    assert same_bytes(packed, np.stack([w[0] for w in want]))
    assert same_bytes(groups, np.stack([w[1] for w in want]))
    assert same_bytes(values, np.stack([w[2] for w in want]))


@pytest.mark.parametrize(
    ("largest", "scale", "group"),
    [(78.08999633789062, 1.37, 9.0), (0.5699999928474426, 0.01, 10.0)],
)
def test_the_order_of_the_two_roundings_before_a_group_scale(largest, scale, group):
    """(largest / 6) * (1 / scale): another order puts these two on the other side of a tie."""
    x = torch.zeros(1, 16)
    x[0, 0] = largest
    packed, groups = nvfp4.quantise(x, torch.tensor(scale))
    assert groups.float().item() == group
    assert same_bytes(packed, nvfp4_row(x[0].numpy(), np.float32(scale))[0])


@pytest.mark.parametrize("hidden", [1568, 1632, 2080])
@pytest.mark.parametrize("rows", [0, 3])
def test_widths_that_are_no_multiple_of_64(hidden, rows):
    x = wild_rows(rows, hidden, seed=5, low=-2, high=2)
    packed, groups = nvfp4.quantise(torch.from_numpy(x), torch.tensor(0.01))
    assert packed.shape == (rows, hidden // 2)
    assert groups.shape == (rows, hidden // 16)
    for k in range(rows):
        assert same_bytes(packed[k], nvfp4_row(x[k], 0.01)[0])


def test_nan_makes_its_group_nan_and_no_other():
    x = torch.ones(1, 32)
    x[0, 3] = torch.nan
    values = nvfp4.dequantise(*nvfp4.quantise(x, torch.tensor(1.0)))
    assert values[0, :16].isnan().all()
    assert (values[0, 16:] == values[0, 16]).all()


def test_static_scales_are_required_for_activations_and_refused_without():
    plain = {
        "w1": torch.randn(2, 32, 64),
        "w3": torch.randn(2, 32, 64),
        "w2": torch.randn(2, 64, 32),
    }
    scale, mids = torch.tensor(0.5), torch.tensor([0.5, 0.25])
    both = config(activations_in="format")
    with pytest.raises(ValueError, match="input_scale is required"):
        nvfp4.from_plain(both, plain, mid_scale=mids)
    with pytest.raises(ValueError, match="mid_scale is required"):
        nvfp4.from_plain(both, plain, input_scale=scale)
    with pytest.raises(ValueError, match="mid_scale has no meaning"):
        nvfp4.from_plain(config(), plain, mid_scale=mids)
    for wrong in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="finite and at least"):
            nvfp4.from_plain(both, plain, input_scale=torch.tensor(wrong), mid_scale=mids)


def test_alphas_are_the_products_of_the_scales_of_their_slot():
    plain = {
        "w1": torch.randn(2, 32, 64),
        "w3": torch.randn(2, 32, 64),
        "w2": torch.randn(2, 64, 32),
    }
    plain["w1"][1] *= 100
    alone = nvfp4.from_plain(config(), plain)
    both = nvfp4.from_plain(
        config(activations_in="format"),
        plain,
        input_scale=torch.tensor(0.5),
        mid_scale=torch.tensor([0.125, 3.0]),
    )
    largest = torch.maximum(plain["w1"].abs().amax((1, 2)), plain["w3"].abs().amax((1, 2)))
    assert torch.equal(alone["alpha1"], largest / 2688)
    assert torch.equal(alone["alpha2"], plain["w2"].abs().amax((1, 2)) / 2688)
    assert torch.equal(both["alpha1"], alone["alpha1"] * 0.5)
    assert torch.equal(both["alpha2"], alone["alpha2"] * torch.tensor([0.125, 3.0]))
    assert nvfp4.agreed(config(activations_in="format")) == ("input_scale",)


def test_requantising_to_a_shared_scale_keeps_the_larger_and_moves_the_smaller():
    w = torch.randn(32, 64)
    small, large = torch.tensor(1.0 / 2688), torch.tensor(7.0 / 2688)
    first, second = nvfp4.quantise(w / 6, small), nvfp4.quantise(w, large)
    got1, got3, shared = nvfp4.requantise_to_shared((*first, small), (*second, large))
    assert shared == large
    assert torch.equal(got3[0], second[0])
    value = nvfp4.dequantise(*first) * small
    again = nvfp4.quantise(value, large)
    assert torch.equal(got1[0], again[0])
    error = nvfp4.dequantise(*got1) * shared - value
    # One more rounding of a group scale: 2**-4 relative, and the code it may push over a border.
    assert error.norm() < 0.1 * value.norm()
