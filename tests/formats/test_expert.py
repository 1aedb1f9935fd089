"""One expert in every format, equal to a second chain that shares no number code with the first.

The second chain (``emulated``) starts from the same plain weights and rows.  It uses torch for the
two matrix products and the activation, because those are the same in every format and fp32 sums
have no other exact definition than their order.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from number_oracle import F32, fp8_matrix, fp8_row, mxfp4_row, nvfp4_row

from epmoe.config import FORMATS, MoEConfig
from epmoe.formats import format_of
from epmoe.formats.declare import matrices
from epmoe.formats.expert import expert

SLOTS, ROWS = 3, 6
MODES = ("dtype", "format")


def config(format_name, mode, **more):
    settings = {"hidden": 160, "inner": 96, "experts": 3, "choices": 2, "max_rows": 8} | more
    return MoEConfig(format=format_name, activations_in=mode, **settings)


def inputs(c, seed=0):
    """Plain weights of unequal size per slot, rows, router weights, static scales.

    The NVFP4 alphas that come of it are around 1e-7 and differ by factors of 3 and 9.
    """
    torch.manual_seed(seed)
    sizes = {"w1": [1.0, 3.0, 9.0], "w3": [1.0, 1.5, 2.0], "w2": [9.0, 3.0, 1.0]}
    plain = {n: torch.randn(SLOTS, out, width) / width**0.5 for n, out, width in matrices(c)}
    plain = {n: w * torch.tensor(sizes[n]).view(-1, 1, 1) for n, w in plain.items()}
    if c.bias:
        plain |= {"b" + n[1:]: torch.randn(SLOTS, out) for n, out, _ in matrices(c)}
    x = torch.randn(ROWS, c.hidden)
    x = x.bfloat16() if c.dtype == "bf16" else x
    scales = {}
    if format_of(c).agreed(c):
        scales["input_scale"] = torch.tensor(4.0 / 2688)
        scales["mid_scale"] = torch.tensor([20.0, 60.0, 30.0]) / 2688
    return plain, x, torch.rand(ROWS) + 0.1, scales


def rounded(array, c):
    if c.dtype == "fp32":
        return array.astype(F32)
    return array.astype(ml_dtypes.bfloat16).astype(F32)


def as_rows(function, matrix):
    return np.stack([function(row)[-1] for row in matrix]) if len(matrix) else matrix


def activations(c, array, scale):
    """fp32 rows -> what a GEMM multiplies."""
    if c.activations_in == "dtype" or c.format == "plain":
        return rounded(array, c)
    if c.format == "fp8":
        return as_rows(fp8_row, array)
    if c.format == "mxfp4":
        return as_rows(mxfp4_row, array)
    return as_rows(lambda row: nvfp4_row(row, scale), array)


def operands(c, matrix, scale):
    match c.format:
        case "plain":
            return rounded(matrix, c)
        case "fp8":
            return fp8_matrix(matrix)[-1]
        case "mxfp4":
            return as_rows(mxfp4_row, matrix)
    return as_rows(lambda row: nvfp4_row(row, scale), matrix)


def product(a, b):
    return (torch.from_numpy(a).clone() @ torch.from_numpy(b).clone().T).numpy()


def emulated(c, plain, slot, x, row_weights, scales):
    w = {name: value[slot].float().numpy() for name, value in plain.items()}
    largest = max(np.abs(w[n]).max() for n in ("w1", "w3") if n in w)
    first, second = F32(largest / F32(2688)), F32(np.abs(w["w2"]).max() / F32(2688))
    input_scale = scales["input_scale"].numpy() if scales else F32(1)
    mid_scale = scales["mid_scale"].numpy()[slot] if scales else F32(1)

    rows = activations(c, x.float().numpy(), input_scale)
    halves = []
    for name in ("w1", "w3") if "w3" in w else ("w1",):
        half = product(rows, operands(c, w[name], first))
        if c.format == "nvfp4":
            half = half * (F32(input_scale * first) if scales else first)
        if c.bias:
            half = half + rounded(w["b" + name[1:]], c)
        halves.append(torch.from_numpy(half))
    gate = halves[0].clamp(max=c.clamp)
    up = halves[1].clamp(-c.clamp, c.clamp) if len(halves) > 1 else None
    match c.activation:
        case "swiglu":
            mid = torch.nn.functional.silu(gate) * up
        case "geglu":
            mid = torch.nn.functional.gelu(gate) * up
        case "gpt_oss":
            mid = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        case "gelu":
            mid = torch.nn.functional.gelu(gate)
        case "relu2":
            mid = torch.relu(gate) ** 2
    mid = mid.numpy()
    early = row_weights.numpy()[:, None]
    if c.weight_in == "fc2":
        mid = mid * early
    y = product(activations(c, mid, mid_scale), operands(c, w["w2"], second))
    if c.format == "nvfp4":
        y = y * (F32(mid_scale * second) if scales else second)
    if c.bias:
        bias = rounded(w["b2"], c)
        y = y + (bias * early if c.weight_in == "fc2" else bias)
    return torch.from_numpy(rounded(y, c))


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
