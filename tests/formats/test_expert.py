"""One expert in every format, equal to the last bit to a chain that shares no code with it."""

import pytest
import torch
from expert_oracle import MODES, SLOTS, as_rows, config, emulated, inputs
from number_oracle import nvfp4_row

from epmoe.config import FORMATS
from epmoe.formats import format_of
from epmoe.formats.expert import expert


def run(c, plain, slot, x, row_weights, scales):
    form = format_of(c)
    weights = form.from_plain(c, plain, **scales)
    y = expert(c, weights, slot, form.stage_rows(c, weights, x), row_weights)
    assert y.dtype == (torch.bfloat16 if c.dtype == "bf16" else torch.float32)
    return y.float()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": "fp32", "weight_in": "fc2"},
        {"activation": "gpt_oss", "bias": True, "clamp": 1.5},
        {"activation": "gpt_oss", "bias": True, "weight_in": "fc2", "hidden": 32, "inner": 32},
        {"activation": "relu2", "hidden": 1568, "inner": 32},
        {"activation": "gelu", "clamp": 0.5, "hidden": 1632, "inner": 32},
        {"activation": "geglu", "hidden": 2080, "inner": 32},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_equal_to_the_emulation_to_the_last_bit(name, mode, more):
    c = config(name, mode, **more)
    plain, x, row_weights, scales = inputs(c)
    for slot in range(SLOTS):
        want = emulated(c, plain, slot, x, row_weights, scales)
        assert torch.equal(run(c, plain, slot, x, row_weights, scales), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_give_no_rows(name, mode):
    c = config(name, mode)
    plain, x, row_weights, scales = inputs(c)
    assert run(c, plain, 0, x[:0], row_weights[:0], scales).shape == (0, c.hidden)


def off(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def in_fp64(c, weights, slot, x):
    """Dequantised weights as real numbers; rows and inner values quantised if the mode says so."""
    form = format_of(c)
    w1, w3, w2 = (m.double() for m in form.dense(c, weights, slot))
    rows = x.double()
    if c.activations_in == "format":
        rows = form.open_rows(c, form.stage_rows(c, weights, x)).double()
        rows = rows * weights["input_scale"][slot].double()
    mid = torch.nn.functional.silu(rows @ w1.T) * (rows @ w3.T)
    if c.activations_in == "format":
        scale = weights["mid_scale"][slot]
        values = as_rows(lambda row: nvfp4_row(row, scale.numpy()), mid.float().numpy())
        mid = torch.from_numpy(values).double() * scale.double()
    return mid @ w2.T


@pytest.mark.parametrize("mode", MODES)
def test_nvfp4_with_tiny_unequal_alphas_is_close_to_fp64(mode):
    c = config("nvfp4", mode, hidden=1568, inner=256)
    plain, x, row_weights, scales = inputs(c)
    weights = format_of(c).from_plain(c, plain, **scales)
    if mode == "format":
        assert ((weights["alpha1"] > 1e-8) & (weights["alpha1"] < 1e-5)).all()
    assert len(set(weights["alpha1"].tolist())) == len(set(weights["alpha2"].tolist())) == SLOTS
    for slot in range(SLOTS):
        got = run(c, plain, slot, x, row_weights, scales)
        assert off(got, in_fp64(c, weights, slot, x)) <= 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", ["alpha1", "alpha2"])
def test_an_alpha_that_is_dropped_or_of_another_slot_is_seen(alpha, mode):
    c = config("nvfp4", mode)
    plain, x, row_weights, scales = inputs(c)
    form = format_of(c)
    weights = form.from_plain(c, plain, **scales)
    rows = form.stage_rows(c, weights, x)
    want = in_fp64(c, weights, 0, x)
    for wrong in (torch.ones(SLOTS), weights[alpha].roll(1)):
        got = expert(c, weights | {alpha: wrong}, 0, rows, row_weights)
        assert off(got, want) > 0.5
    without = {name: value for name, value in weights.items() if name != alpha}
    with pytest.raises(KeyError, match=alpha):
        expert(c, without, 0, rows, row_weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_gate_and_up_swapped_are_seen(name, mode):
    c = config(name, mode)
    plain, x, row_weights, scales = inputs(c)
    want = emulated(c, plain, 1, x, row_weights, scales)
    swapped = plain | {"w1": plain["w3"], "w3": plain["w1"]}
    assert off(run(c, swapped, 1, x, row_weights, scales), want.double()) > 0.3


def test_an_input_scale_of_another_rank_is_seen():
    c = config("nvfp4", "format")
    plain, x, row_weights, scales = inputs(c)
    form = format_of(c)
    weights = form.from_plain(c, plain, **scales)
    elsewhere = form.from_plain(c, plain, **scales | {"input_scale": torch.tensor(8.0 / 2688)})
    rows = form.stage_rows(c, elsewhere, x)
    assert off(expert(c, weights, 0, rows, row_weights), in_fp64(c, weights, 0, x)) > 0.3
