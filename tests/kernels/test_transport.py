"""Dispatch and combine alone compile for every shape, without spills; no GPU is needed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.core")
from epmoe.comm.layout import layout
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.transport import Transport, compiled
from epmoe.shapes import SHAPES, shape


def check(config, ranks):
    kernels = compiled(config, ranks, layout([config], ranks), 0, 0)
    assert set(kernels) == {"dispatch", "combine"}
    for name, kernel in kernels.items():
        assert kernel.resources.spills == 0, name
    # 65,536 registers of an SM, 384 and 896 threads
    assert kernels["dispatch"].resources.registers <= 168
    assert kernels["combine"].resources.registers <= 72


@pytest.mark.parametrize("name", SHAPES)
def test_every_published_shape_on_eight_ranks(name):
    check(shape(name, max_rows=8192, heap="cuda"), 8)


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (1, {"experts": 1, "choices": 1, "hidden": 64, "inner": 64}),
        (8, {"experts": 512, "choices": 16, "hidden": 16384, "inner": 64}),
        (2, {"experts": 8, "choices": 2, "hidden": 2880, "inner": 64, "weight_in": "fc2"}),
    ],
)
def test_the_edges(ranks, fields):
    check(MoEConfig(max_rows=17, heap="cuda", **fields), ranks)


def test_what_the_kernels_do_not_move_is_refused_by_name():
    config = MoEConfig(
        experts=8, choices=2, hidden=256, inner=64, max_rows=8, dtype="fp32", heap="cuda"
    )
    with pytest.raises(EpmoeError, match="plain bf16, got plain fp32"):
        Transport(config, layout([config], 1), layer=0, lane=0, words=SimpleNamespace(ranks=1))
