"""A config is checked once; equal configs have equal fingerprints, and no others."""

from __future__ import annotations

import dataclasses
import math

import pytest

from epmoe.config import MoEConfig

GOOD = {"experts": 8, "choices": 2, "hidden": 64, "inner": 32, "max_rows": 16}
COUNTS = ("experts", "choices", "hidden", "inner", "max_rows", "lanes")
MAY_BE_NONE = ("slots", "shared_inner", "freight")
NAMES = ("dtype", "format", "activations_in", "activation", "weight_in", "heap")
TIMES = ("stall_s", "open_s")

WRONG = [
    *(({name: 0}, ValueError, f"{name} must be at least 1, got 0") for name in COUNTS),
    *(({name: -1}, ValueError, f"{name} must be at least [01], got -1") for name in COUNTS),
    *(({name: -1}, ValueError, f"{name} must be at least 0, got -1") for name in MAY_BE_NONE),
    *(({name: 2.0}, TypeError, f"{name} must be an int, got float") for name in COUNTS),
    *(({name: True}, TypeError, f"{name} must be an int, got bool") for name in COUNTS),
    *(({name: "2"}, TypeError, f"{name} must be an int, got str") for name in MAY_BE_NONE),
    *(({name: "no such"}, ValueError, f"{name} must be one of .*'no such'") for name in NAMES),
    *(({name: None}, ValueError, f"{name} must be one of .*None") for name in NAMES),
    *(({name: 0}, ValueError, f"{name} must be a number above 0, got 0") for name in TIMES),
    *(({name: math.nan}, ValueError, f"{name} must be a number above 0") for name in TIMES),
    *(({name: "9"}, ValueError, f"{name} must be a number above 0, got '9'") for name in TIMES),
    *(({name: math.inf}, ValueError, f"{name} must be at most 1000000") for name in TIMES),
    ({"clamp": 0.0}, ValueError, "clamp must be a number above 0, got 0.0"),
    ({"clamp": math.nan}, ValueError, "clamp must be a number above 0, got nan"),
    ({"bias": 1}, TypeError, "bias must be a bool, got int"),
    ({"choices": 9}, ValueError, r"choices must be at most experts \(8\), got 9"),
    ({"slots": 7}, ValueError, r"slots must be 0 or at least experts \(8\), got 7"),
    ({"max_rows": 1 << 30}, ValueError, r"max_rows \* choices must be below 2\*\*31"),
    ({"format": "fp8", "hidden": 40}, ValueError, "hidden must be a multiple of 32 .*, got 40"),
    ({"format": "nvfp4", "inner": 8}, ValueError, "inner must be a multiple of 32 .*, got 8"),
    ({"name": ""}, ValueError, "name must have 1 to 64 bytes of printable text, got ''"),
    ({"name": "n" * 65}, ValueError, "name must have 1 to 64 bytes"),
    ({"name": "層" * 22}, ValueError, "name must have 1 to 64 bytes"),
    ({"name": "a\nb"}, ValueError, "name must have 1 to 64 bytes"),
    ({"name": 5}, TypeError, "name must be a str, got int"),
]


@pytest.mark.parametrize(("given", "error", "text"), WRONG, ids=[str(g) for g, _, _ in WRONG])
def test_what_is_wrong_is_named_with_its_value_and_limit(given, error, text):
    with pytest.raises(error, match=text):
        MoEConfig(**{**GOOD, **given})


def test_equal_configs_have_equal_fingerprints():
    one, other = (MoEConfig(**GOOD, stall_s=s, clamp=c) for s, c in ((30, 7), (30.0, 7.0)))
    assert one == other
    assert one.fingerprint() == other.fingerprint()


def test_every_field_is_in_the_fingerprint():
    base = MoEConfig(**GOOD)
    assert base.fingerprint() == MoEConfig(**GOOD).fingerprint()
    assert set(base.described()) == {field.name for field in dataclasses.fields(MoEConfig)}
    other = {"experts": 9, "choices": 1, "slots": 16, "bias": True, "name": "b", "clamp": 7.0}
    prints = {MoEConfig(**{**GOOD, name: value}).fingerprint() for name, value in other.items()}
    assert len(prints | {base.fingerprint()}) == len(other) + 1


def test_slots_divide_over_the_ranks_or_say_why_not():
    config = MoEConfig(**GOOD)
    assert [config.slots_per_rank(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"slots \(8\) must be a multiple .* \(3\)"):
        config.slots_per_rank(3)
    assert MoEConfig(**GOOD, slots=9).slots_per_rank(3) == 3


def test_arguments_have_names_and_the_config_cannot_change():
    with pytest.raises(TypeError, match="positional"):
        MoEConfig(8, 2, 64, 32, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(**GOOD).experts = 9
