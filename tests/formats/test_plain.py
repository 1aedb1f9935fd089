"""Plain weights: what is declared, cast once, and nothing else."""

import pytest
import torch

from epmoe.config import MoEConfig
from epmoe.formats import format_of, plain


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_weights_rows_and_inner_values_are_rounded_to_the_dtype_once(dtype, torch_dtype):
    c = MoEConfig(experts=2, choices=1, hidden=5, inner=3, max_rows=4, dtype=dtype)
    source = {"w1": torch.randn(2, 3, 5), "w3": torch.randn(2, 3, 5), "w2": torch.randn(2, 5, 3)}
    weights = plain.from_plain(c, source)
    for slot in range(2):
        for got, name in zip(plain.operands(c, weights, slot), ("w1", "w3", "w2"), strict=True):
            assert torch.equal(got, source[name][slot].to(torch_dtype).float())
    x = torch.randn(4, 5)
    assert torch.equal(
        plain.open_rows(c, plain.stage_rows(c, weights, x)), x.to(torch_dtype).float()
    )
    assert torch.equal(plain.quantise_mid(c, weights, 0, x), x.to(torch_dtype).float())


def test_a_static_scale_is_refused():
    c = MoEConfig(experts=1, choices=1, hidden=4, inner=4, max_rows=1, activation="relu2")
    source = {"w1": torch.zeros(1, 4, 4), "w2": torch.zeros(1, 4, 4)}
    with pytest.raises(ValueError, match="input_scale has no meaning for format 'plain'"):
        plain.from_plain(c, source, input_scale=torch.tensor(1.0))


def test_it_is_the_format_of_a_default_config():
    c = MoEConfig(experts=1, choices=1, hidden=4, inner=4, max_rows=1)
    assert format_of(c) is plain
