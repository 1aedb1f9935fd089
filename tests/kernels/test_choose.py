"""The kernel that turns experts into slots compiles for what it takes; tests/gpu runs it."""

import pytest
import torch

from epmoe import MoEConfig
from epmoe.kernels.choose import CELLS_PER_BLOCK, compiled


def config(experts):
    return MoEConfig(experts=experts, choices=1, hidden=64, inner=64, max_rows=8)


@pytest.mark.parametrize("experts", [1, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_it_compiles_without_spills_and_fits_two_blocks_a_processor(experts, dtype):
    found = compiled(config(experts), dtype, 3).resources
    assert found.spills == 0
    assert found.registers * CELLS_PER_BLOCK * 2 <= 65536
    assert found.shared <= 48 * 1024  # what a block has without asking


def test_more_experts_than_its_tables_hold_are_refused():
    with pytest.raises(ValueError, match="experts must be at most 1024 on a GPU, got 1025"):
        compiled(config(1025), torch.int32, 1)
