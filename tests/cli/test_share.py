"""The load of one rank of many: which experts are left, what must be said about it."""

import pytest

from epmoe.cli.roofline import floor
from epmoe.cli.share import share, warning
from epmoe.shapes import SHAPES, shape


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_every_rank_holds_what_a_rank_of_eight_does(name, ranks):
    whole = shape(name, max_rows=128)
    made = share(whole, ranks, 8)
    if (name, ranks) != ("mixtral", 1):
        assert made.slots_per_rank(ranks) == whole.slots_per_rank(8)
    assert made.choices == whole.choices <= made.experts
    assert made.name == f"{name} load-of-8"
    same = {"experts", "name"}
    assert {n: v for n, v in made.described().items() if n not in same} == {
        n: v for n, v in whole.described().items() if n not in same
    }


def test_a_row_keeps_as_many_experts_as_it_wants_and_the_warning_says_so():
    mixtral = shape("mixtral", max_rows=16)
    assert share(mixtral, 1, 8).experts == 2
    assert share(mixtral, 2, 8).experts == 2
    assert "(a rank of 8 holds 1: not its load)" in warning([mixtral], 1, 8)[-1]
    assert "not its load" not in warning([mixtral], 2, 8)[-1]


def test_choices_are_rounded_up_to_whole_ranks():
    """8 choices on 3 ranks of 128: one expert a rank would be 3, so each keeps 3: 9."""
    assert share(shape("qwen3-30b", max_rows=16), 3, 128).experts == 9


def test_as_many_as_there_are_is_the_layer_itself():
    whole = shape("dsv3", max_rows=16)
    assert share(whole, 8, 8) is whole
    assert share(whole, 3, 3) is whole  # 256 do not divide: open says it, in its own words
    assert warning([whole], 8, 8) == []


def test_fewer_than_there_are_and_what_does_not_divide_are_refused():
    whole = shape("dsv3", max_rows=16)
    with pytest.raises(ValueError, match=r"--load-of must be at least .* \(4\), got 2"):
        share(whole, 4, 2)
    with pytest.raises(ValueError, match=r"--load-of must divide the experts of dsv3 \(256\)"):
        share(whole, 4, 6)
    with pytest.raises(ValueError, match="got 0"):
        warning([whole], 1, 0)


def test_the_warning_names_ranks_links_and_experts():
    assert warning([shape(name, max_rows=1) for name in ("dsv3", "kimi-k2")], 2, 8) == [
        "NOT a layer on 8 GPUs: the load of one rank of 8, on 2",
        "1/2 of the choices cross NVLink, not 7/8; a round waits for 2 ranks, not for 8",
        "dsv3: 64 of 256 experts, 32 a rank",
        "kimi-k2: 96 of 384 experts, 48 a rank",
    ]


def test_the_floor_is_that_of_the_layer_as_it_is_run():
    """As much arithmetic and as many weights as on eight, fewer bytes over links."""
    whole = shape("dsv3", max_rows=128)
    of_eight, run = floor(whole, 8, 128), floor(share(whole, 2, 8), 2, 128)
    assert run.arithmetic == of_eight.arithmetic
    assert run.memory == pytest.approx(of_eight.memory, rel=0.05)
    assert run.links < 0.25 * of_eight.links  # a row visits 1.0 other rank, not 4.6
