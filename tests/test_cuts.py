"""What benchmarks/cuts.py understands; what it measures needs GPUs."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
cuts = importlib.import_module("cuts")


def test_a_case_names_a_shape_rows_and_ways():
    case = cuts.Case.parse("mixtral:128:SOME,MANY@8,split")
    assert (case.shape, case.rows, case.ways) == ("mixtral", 128, ("SOME", "MANY@8", "split"))
    assert cuts.Case.parse("dsv3:16").ways == ("split", "auto")
    assert case.config(ranks=4, of=8).experts == 4


def test_a_way_says_what_the_round_is_told():
    assert cuts.how("split") is None
    assert cuts.how("auto") == {}
    assert cuts.how("MANY@8") == {"cut": cuts.sizes.MANY, "pullers": 8}
    assert cuts.how("auto@32") == {"pullers": 32}


@pytest.mark.parametrize("text", ["dsv3", "dsv3:x", "dsv3:1:WIDE", "dsv3:1:split:2"])
def test_what_is_no_case_is_refused(text):
    with pytest.raises(ValueError, match="must be"):
        cuts.Case.parse(text)
