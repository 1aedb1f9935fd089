"""What is declared is what is there: names, shapes, dtypes, bytes; for weights and for rows."""

import pytest
import torch

from epmoe.config import FORMATS, MoEConfig
from epmoe.formats import format_of
from epmoe.formats.declare import agreed_values, check_weights, matrices

MODES = ("dtype", "format")


def config(format_name, mode, **more):
    settings = {"hidden": 160, "inner": 96, "experts": 4, "choices": 2, "max_rows": 8} | more
    return MoEConfig(format=format_name, activations_in=mode, **settings)


def made(c, slots):
    source = {name: torch.randn(slots, out, width) for name, out, width in matrices(c)}
    if c.bias:
        source |= {"b" + n[1:]: torch.randn(slots, out) for n, out, _ in matrices(c)}
    scales = {}
    if format_of(c).agreed(c):
        scales = {"input_scale": torch.tensor(0.002), "mid_scale": torch.rand(slots) + 0.5}
    return format_of(c).from_plain(c, source, **scales)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_made_weights_are_what_is_declared(name, mode, bias, activation, slots):
    c = config(name, mode, bias=bias, activation=activation)
    declared = format_of(c).tensors(c)
    check_weights(declared, made(c, slots), slots)
    assert ("w3" in {t.name for t in declared}) == (activation == "swiglu")
    assert sum(t.nbytes for t in declared) * slots == sum(t.nbytes for t in made(c, slots).values())


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("hidden", [160, 1568, 1632, 2080])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_staged_rows_are_what_the_wire_declares(name, mode, hidden, rows):
    c = config(name, mode, hidden=hidden)
    weights = made(c, 2)
    staged = format_of(c).stage_rows(c, weights, torch.randn(rows, hidden).bfloat16())
    parts = format_of(c).wire(c)
    assert list(staged) == [part.name for part in parts]
    for part in parts:
        assert staged[part.name].shape == (rows, *part.shape)
        assert staged[part.name].dtype == part.dtype
        assert staged[part.name].nbytes == rows * part.nbytes
    assert format_of(c).open_rows(c, staged).shape == (rows, hidden)


def test_bytes_of_a_row_on_the_wire():
    def of(name, mode):
        c = config(name, mode, hidden=7168)
        return [part.nbytes for part in format_of(c).wire(c)]

    assert of("plain", "dtype") == of("mxfp4", "dtype") == of("nvfp4", "dtype") == [14336]
    assert of("fp8", "dtype") == [14336]
    assert of("fp8", "format") == [7168, 56 * 4]
    assert of("mxfp4", "format") == [3584, 224]
    assert of("nvfp4", "format") == [3584, 448]


def test_what_is_missing_unknown_or_of_another_shape_is_named():
    c = config("nvfp4", "format")
    declared, good = format_of(c).tensors(c), made(c, 2)
    with pytest.raises(ValueError, match=r"lack \['alpha2'\]"):
        check_weights(declared, {n: t for n, t in good.items() if n != "alpha2"}, 2)
    with pytest.raises(ValueError, match=r"unknown \['alpha3'\]"):
        check_weights(declared, good | {"alpha3": good["alpha1"]}, 2)
    with pytest.raises(ValueError, match="alpha1 must be torch.float32 of shape"):
        check_weights(declared, good | {"alpha1": torch.ones(3)}, 2)
    with pytest.raises(ValueError, match="w1 must be torch.uint8"):
        check_weights(declared, good | {"w1": good["w1"].int()}, 2)


@pytest.mark.parametrize("name", FORMATS)
def test_plain_weights_of_the_wrong_shape_are_refused_before_anything_is_quantised(name):
    c = config(name, "dtype")
    source = {n: torch.zeros(2, out, width) for n, out, width in matrices(c)}
    with pytest.raises(ValueError, match="w2 must be"):
        format_of(c).from_plain(c, source | {"w2": source["w2"].mT.contiguous()})
    with pytest.raises(ValueError, match=r"lack \['w3'\]"):
        format_of(c).from_plain(c, {n: w for n, w in source.items() if n != "w3"})


@pytest.mark.parametrize("field", ["hidden", "inner"])
def test_a_quantised_width_is_a_multiple_of_32(field):
    with pytest.raises(ValueError, match=f"{field} must be a multiple of 32"):
        config("nvfp4", "dtype", **{field: 48})


def test_a_value_that_is_agreed_is_one_value_in_all_slots():
    weights = {"input_scale": torch.tensor([0.5, 0.5]), "alpha1": torch.tensor([1.0, 2.0])}
    assert agreed_values(("input_scale",), weights) == {"input_scale": 0.5}
    assert agreed_values((), weights) == {}
    with pytest.raises(ValueError, match=r"alpha1 must be equal in all slots, got \[1.0, 2.0\]"):
        agreed_values(("alpha1",), weights)
