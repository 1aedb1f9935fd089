"""Gate and up in turns: the published vector, every group, every axis, and the inverse."""

import pytest
import torch

from epmoe.formats.interleave import interleave, split


def test_vector_a5():
    gate, up = torch.arange(32), torch.arange(100, 132)
    want = [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]
    assert interleave(gate, up, 16, axis=0).tolist() == want


@pytest.mark.parametrize("group", [1, 8, 16, 48])
def test_row_by_row(group):
    gate, up = torch.randn(2, 48, 5), torch.randn(2, 48, 5)
    both = interleave(gate, up, group)
    for row in range(96):
        block, within = divmod(row, group)
        half = gate if block % 2 == 0 else up
        assert torch.equal(both[:, row], half[:, block // 2 * group + within])


@pytest.mark.parametrize("shape", [(0, 48, 5), (2, 48, 0), (2, 48, 5), (1, 1632, 2)])
@pytest.mark.parametrize("group", [1, 8, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16])
def test_split_is_the_inverse(shape, group, dtype):
    gate, up = (torch.randint(0, 100, shape, dtype=torch.uint8).to(dtype) for _ in range(2))
    back = split(interleave(gate, up, group), group)
    for got, want in zip(back, (gate, up), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_a_swap_is_another_matrix():
    gate, up = torch.zeros(16, 4), torch.ones(16, 4)
    assert not torch.equal(interleave(gate, up, 8), interleave(up, gate, 8))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="group must divide"):
        interleave(torch.zeros(20, 4), torch.zeros(20, 4), 16)
    with pytest.raises(ValueError, match="alike"):
        interleave(torch.zeros(16, 4), torch.zeros(16, 5), 8)
    with pytest.raises(ValueError, match="even"):
        split(torch.zeros(15, 4), 1)
