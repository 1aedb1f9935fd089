"""The fused round compiles for every shape without a GPU; tests/gpu says what it computes."""

import itertools

import pytest

pytest.importorskip("cuda.core")
from epmoe import MoEConfig
from epmoe.comm.layout import layout
from epmoe.kernels.fused import compiled, few_rows

SHAPES = {  # experts, choices, hidden, inner
    "dsv3": (256, 8, 7168, 2048),
    "qwen3-30b": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "smallest": (8, 1, 64, 64),
    "largest": (512, 16, 16384, 16384),
}


def config(shape, **more):
    experts, choices, hidden, inner = SHAPES[shape]
    return MoEConfig(
        experts=experts,
        choices=choices,
        hidden=hidden,
        inner=inner,
        **{"max_rows": 512, "heap": "cuda", **more},
    )


@pytest.mark.parametrize("tall", [0, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_compiles_without_spills(shape, tall):
    spills_nowhere(shape, tall, ((8, not tall),))


@pytest.mark.night
@pytest.mark.parametrize("tall", [0, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_compiles_without_spills_in_every_way(shape, tall):
    spills_nowhere(shape, tall, itertools.product((1, 2, 4, 8), (False, True)))


def spills_nowhere(shape, tall, ways):
    for ranks, counted in ways:
        one = config(shape)
        kernel = compiled(one, ranks, layout([one], ranks), 0, 0, counted=counted, tall=tall)
        assert kernel.resources.spills == 0, (ranks, counted)
        assert "serializ" not in kernel.log


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gpt_oss", "relu2"])
def test_other_activations_spill_little(activation):
    """A debt: their epilogues with bias and weight want some registers more than the assembler
    gives around WGMMA; they go to L1 once a tile, outside of the product loop."""
    for bias, tall in ((False, 0), (True, 0), (True, 128)):
        one = config("qwen3-30b", activation=activation, bias=bias, weight_in="fc2")
        kernel = compiled(one, 8, layout([one], 8), 0, 0, tall=tall)
        assert kernel.resources.spills <= 160
        assert "serializ" not in kernel.log


def test_the_narrow_path_is_for_few_rows_a_slot_on_all_ranks_together():
    assert few_rows(config("dsv3", max_rows=128), 8) == 128  # 32 rows a slot
    assert few_rows(config("dsv3", max_rows=129), 8) == 0
    assert few_rows(config("dsv3", max_rows=1024), 1) == 128
