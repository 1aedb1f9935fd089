"""The split verbs compile for every shape of the house, without spills; no GPU is needed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.core")
from epmoe.comm.layout import layout
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels import cuda
from epmoe.kernels.cuda import CudaOps, compiled
from epmoe.shapes import SHAPES, shape

REGISTERS = 64  # 1,024 threads of stage: 65,536 registers of an SM


def built(config, ranks, lane=0, layer=0, configs=None):
    return compiled(config, ranks, layout(configs or [config], ranks), layer, lane)


def check(kernels):
    assert set(kernels) == {"stage", "pull", "push", "reduce"}
    for verb, kernel in kernels.items():
        assert kernel.resources.spills == 0, verb
    assert kernels["stage"].resources.registers <= REGISTERS


@pytest.mark.parametrize("name", SHAPES)
def test_every_published_shape_on_eight_ranks(name):
    check(built(shape(name, max_rows=8192, heap="cuda"), 8))


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (1, {"experts": 1, "choices": 1, "hidden": 64, "inner": 64}),
        (8, {"experts": 512, "choices": 16, "hidden": 16384, "inner": 64}),
        (2, {"experts": 8, "choices": 2, "hidden": 2880, "inner": 64, "weight_in": "fc2"}),
    ],
)
def test_the_edges(ranks, fields):
    check(built(MoEConfig(max_rows=17, heap="cuda", **fields), ranks))


def test_another_lane_and_another_layer_are_other_kernels():
    one = MoEConfig(
        experts=8, choices=2, hidden=256, inner=64, max_rows=8, lanes=2, heap="cuda", name="one"
    )
    wide = MoEConfig(
        experts=8, choices=2, hidden=512, inner=64, max_rows=8, lanes=2, heap="cuda", name="wide"
    )
    both = [one, wide]
    first = built(one, 2, 0, 0, both)["push"].cubin
    assert built(one, 2, 1, 0, both)["push"].cubin != first
    assert built(wide, 2, 0, 1, both)["push"].cubin != first
    assert built(one, 2, 0, 0, both)["push"].cubin == first


def test_what_the_kernels_do_not_compute_is_refused_by_name():
    config = MoEConfig(
        experts=8, choices=2, hidden=256, inner=64, max_rows=8, dtype="fp32", heap="cuda"
    )
    with pytest.raises(EpmoeError, match="plain bf16, got plain fp32"):
        CudaOps(config, layout([config], 1), layer=0, lane=0, words=SimpleNamespace(ranks=1))
    assert cuda.MOVER_SHARED <= 227 * 1024  # the most a block of Hopper may have
