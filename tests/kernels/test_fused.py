"""The fused round compiles for every shape without a GPU; tests/gpu says what it computes."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.core")
from cuda.bindings import nvrtc

from epmoe import EpmoeError, MoEConfig
from epmoe.comm.layout import layout
from epmoe.kernels import fused
from epmoe.kernels.fused import FusedOps, compiled
from epmoe.kernels.sizes import (
    FEW,
    MANY,
    SOME,
    cut_of,
    cuts,
    most_blocks,
    most_slots,
    private_bytes,
    pullers_of,
    refusal,
    refusal_of_gpu,
    ring_blocks,
)

# Each assembler allots registers in its own way; these are judged by those of 13.4 and 13.5.
NEW_COMPILER = nvrtc.nvrtcVersion()[1:] >= (13, 4)

SHAPES = {  # experts, choices, hidden, inner
    "dsv3": (256, 8, 7168, 2048),
    "qwen3-30b": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "gpt-oss": (128, 4, 2880, 2880),
    "smallest": (8, 1, 64, 64),
    "largest": (512, 16, 16384, 16384),
}


def config(shape, **more):
    experts, choices, hidden, inner = SHAPES[shape]
    if shape == "gpt-oss":
        more = {"activation": "gpt_oss", "bias": True, **more}
    return MoEConfig(
        experts=experts,
        choices=choices,
        hidden=hidden,
        inner=inner,
        **{"max_rows": 512, "heap": "cuda", **more},
    )


@pytest.mark.parametrize("cut", [FEW, SOME, MANY], ids=["few", "some", "many"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_compiles_without_spills(shape, cut):
    spills_nowhere(shape, cut, ((8, not cut.tall),))


@pytest.mark.night
@pytest.mark.parametrize("cut", [FEW, SOME, MANY], ids=["few", "some", "many"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_compiles_without_spills_in_every_way(shape, cut):
    spills_nowhere(shape, cut, itertools.product((1, 2, 4, 8), (False, True)))


def spills_nowhere(shape, cut, ways):
    for ranks, counted in ways:
        one = config(shape)
        kernel = compiled(one, ranks, layout([one], ranks), 0, 0, counted=counted, cut=cut)
        assert kernel.resources.spills <= (0 if NEW_COMPILER else 24), (ranks, counted)
        assert "serializ" not in kernel.log


@pytest.mark.parametrize("cut", [FEW, SOME, MANY], ids=["few", "some", "many"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gpt_oss", "relu2"])
def test_other_epilogues_do_not_spill(activation, cut):
    # A debt: two registers of these go to L1 once a tile, outside of the product loop.
    known = {("gelu", "fc2"), ("relu2", "fc2")} if cut == MANY else set()
    for bias, weight_in in ((False, "fc2"), (True, "fc2"), (True, "reduce"))[: 3 if known else 2]:
        one = config("qwen3-30b", activation=activation, bias=bias, weight_in=weight_in)
        kernel = compiled(one, 8, layout([one], 8), 0, 0, cut=cut)
        allowed = 44 if bias and (activation, weight_in) in known else 0
        assert kernel.resources.spills <= (allowed if NEW_COMPILER else 44), (bias, weight_in)
        assert "serializ" not in kernel.log


def test_how_a_round_is_cut_counts_the_rows_of_all_ranks_together():
    dsv3 = config("dsv3", max_rows=1024)
    assert cut_of(dsv3, 8, 128) == FEW  # 32 rows a slot
    assert cut_of(dsv3, 8, 129) == SOME
    assert cut_of(dsv3, 8, 384) == SOME  # 96 rows a slot
    assert cut_of(dsv3, 8, 385) == MANY
    assert cut_of(dsv3, 1, 1024) == FEW
    assert cuts(dsv3, 8) == (FEW, SOME, MANY)
    assert cuts(dsv3, 1) == (FEW,)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_cut_that_a_round_may_want_is_made(shape, ranks):
    for rows in (1, 7, 200, 3000):
        one = config(shape, max_rows=rows)
        assert set(cuts(one, ranks)) == {cut_of(one, ranks, c) for c in range(1, rows + 1)}


def test_one_slot_with_two_blocks_goes_in_smaller_tiles():
    mixtral = config("mixtral", max_rows=8192)
    assert cut_of(mixtral, 8, 128) == SOME  # 32 tiles of 256 columns in the second GEMM
    assert cuts(mixtral, 8) == (FEW, SOME, MANY)


@pytest.mark.parametrize(
    ("shape", "rows", "heap", "private"),
    [("dsv3", 8192, 2.5e9, 1.5e9), ("qwen3-30b", 512, 50e6, 100e6 + 50e6)],
)
def test_memory_does_not_grow_with_what_routing_could_send(shape, rows, heap, private):
    one = config(shape, max_rows=rows)
    slab, work = layout([one], 8).total, private_bytes(one, 8)
    assert slab <= heap
    assert work <= private
    if shape == "qwen3-30b":
        assert slab + work <= 150e6
    assert most_blocks(one, 8) >= 8 * rows * 8 // 128  # all of it on one rank


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_most_slots_have_room_and_one_more_is_refused_by_name(ranks):
    most, cut = most_slots(ranks), FEW  # the cut with least room; rows of 8 a batch take most of it
    assert most >= 512
    for hidden, choices in ((64, 1), (7168, 8)):
        layer = MoEConfig(
            experts=most, choices=choices, hidden=hidden, inner=64, max_rows=8, heap="cuda"
        )
        assert refusal(layer, ranks) is None
        compiled(layer, ranks, layout([layer], ranks), 0, 0, cut=cut, among=(cut,))
    more = MoEConfig(experts=most + ranks, choices=1, hidden=64, inner=64, max_rows=8, heap="cuda")
    assert f"slots must be at most {most} on {ranks} GPUs" in str(refusal(more, ranks))


def test_a_slot_named_twice_has_room_for_both():
    mixtral = config("mixtral", max_rows=512)  # one slot on each of 8 ranks
    assert most_blocks(mixtral, 8) >= 2 * 8 * 512 // 128


def test_the_ring_holds_what_must_be_under_way():
    dsv3 = config("dsv3", max_rows=8192)
    # an even share: 512 blocks of rows, and one more of each of 32 slots
    assert ring_blocks(dsv3, 8, 132, 8, (MANY,)) == 512 + 32
    some = config("dsv3", max_rows=256)
    # 15.5 blocks of lag, two groups of 16, one row of a batch, 16 to spare
    assert ring_blocks(some, 8, 132, 8, (MANY,)) == 16 + 32 + 1 + 16
    small = config("dsv3", max_rows=1)
    assert ring_blocks(small, 8, 132, 8, (MANY,)) == most_blocks(small, 8) == 33


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("grid", [4, 6, 32, 132])
def test_somebody_multiplies_on_a_part_of_a_gpu_too(grid, ranks):
    dsv3, narrow = config("dsv3"), config("qwen3-30b")
    for cut in (FEW, SOME, MANY):
        for one in (dsv3, narrow):
            assert 2 <= pullers_of(one, cut, ranks, grid) <= grid // 2
            assert pullers_of(one, cut, ranks, grid) % 2 == 0
    assert pullers_of(dsv3, FEW, 2, 132) == 48
    assert pullers_of(dsv3, MANY, 8, 132) == 16
    assert pullers_of(narrow, MANY, 8, 132) == 24


def test_a_gpu_whose_processors_would_all_pull_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fused, "processors_of", lambda device: 25)
    known = {"layer": 0, "lane": 0, "words": SimpleNamespace(ranks=2)}
    with pytest.raises(ValueError, match="pullers must be at most 22 here, got 24"):
        FusedOps(config("qwen3-30b"), None, pullers=24, **known)
    monkeypatch.setattr(fused, "processors_of", lambda device: 3)
    with pytest.raises(EpmoeError, match="at least 4 processors of each GPU, got 2"):
        FusedOps(config("qwen3-30b"), None, **known)


def test_processors_that_all_tell_or_tell_too_much_are_refused_by_name():
    """Where as many CTAs tell as there are, nobody stages rows; what one tells is in its memory."""
    few = config("qwen3-30b")
    assert "at least 9 processors" in str(refusal_of_gpu(few, 8, 8))
    assert refusal_of_gpu(few, 8, 9) is None
    said = str(refusal_of_gpu(config("qwen3-30b", max_rows=65536), 8, 32))
    most = int(re.search(r"at most (\d+)", said)[1])
    one = config("qwen3-30b", max_rows=most)
    assert refusal_of_gpu(one, 8, 32) is None
    compiled(one, 8, layout([one], 8), 0, 0, grid=32, cut=FEW)
    assert refusal_of_gpu(config("qwen3-30b", max_rows=most + 1), 8, 32)
