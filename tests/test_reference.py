"""The oracle against arithmetic written out number by number, in Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch

from epmoe.config import ACTIVATIONS, MoEConfig
from epmoe.reference import reference_moe

CONFIG = {"experts": 3, "choices": 2, "hidden": 2, "inner": 3, "max_rows": 4, "dtype": "fp32"}


def act(name, gate, up):
    match name:
        case "swiglu":
            return gate / (1 + math.exp(-gate)) * up
        case "geglu":
            return 0.5 * gate * (1 + math.erf(gate / math.sqrt(2))) * up
        case "gelu":
            return 0.5 * gate * (1 + math.erf(gate / math.sqrt(2)))
        case "gpt_oss":
            return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)
        case "relu2":
            return max(gate, 0.0) ** 2
    raise AssertionError(name)


def by_hand(x, ids, weights, w, config):
    """One row, in double precision."""
    out = [0.0] * config.hidden
    for e, router in zip(ids, weights, strict=True):
        if e < 0:
            continue
        mid = []
        for i in range(config.inner):
            gate = sum(w["w1"][e][i][h] * x[h] for h in range(config.hidden))
            up = sum(w["w3"][e][i][h] * x[h] for h in range(config.hidden)) if "w3" in w else 0.0
            if config.bias:
                gate += w["b1"][e][i]
                up += w["b3"][e][i] if "b3" in w else 0.0
            gate, up = min(gate, config.clamp), max(-config.clamp, min(up, config.clamp))
            mid.append(act(config.activation, gate, up))
        for h in range(config.hidden):
            y = sum(w["w2"][e][h][i] * mid[i] for i in range(config.inner))
            out[h] += router * (y + (w["b2"][e][h] if config.bias else 0.0))
    return out


@pytest.mark.parametrize("weight_in", ["reduce", "fc2"])
@pytest.mark.parametrize("clamp", [math.inf, 0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_by_hand(activation, bias, clamp, weight_in):
    config = MoEConfig(**CONFIG, activation=activation, bias=bias, clamp=clamp, weight_in=weight_in)
    g = torch.Generator().manual_seed(1)
    shapes = {"w1": (3, 3, 2), "w2": (3, 2, 3), "b1": (3, 3), "b2": (3, 2)}
    if config.gated:
        shapes |= {"w3": (3, 3, 2), "b3": (3, 3)}
    w = {n: torch.randn(s, generator=g) for n, s in shapes.items() if bias or n[0] == "w"}
    x = [torch.randn(n, 2, generator=g) for n in (3, 0, 2)]
    ids = [torch.randint(-1, 3, (len(t), 2), generator=g) for t in x]
    weights = [torch.rand(len(t), 2, generator=g) for t in x]
    found = reference_moe(x, ids, weights, w, config)
    plain = {name: tensor.tolist() for name, tensor in w.items()}
    for rank in range(3):
        assert found[rank].shape == (len(x[rank]), 2)
        for t in range(len(x[rank])):
            batch = (x[rank][t].tolist(), ids[rank][t].tolist(), weights[rank][t].tolist())
            want = torch.tensor(by_hand(*batch, plain, config))
            # Doubles against fp32: only rounding may differ.
            assert torch.allclose(found[rank][t], want, rtol=2e-5, atol=2e-5)


def test_what_is_no_number_stays_in_its_row():
    config = MoEConfig(**{**CONFIG, "hidden": 16})
    g = torch.Generator().manual_seed(2)
    shapes = {"w1": (3, 3, 16), "w3": (3, 3, 16), "w2": (3, 16, 3)}
    w = {name: torch.randn(s, generator=g) for name, s in shapes.items()}
    x, ids = torch.randn(6, 16, generator=g), torch.zeros(6, 2, dtype=torch.int64)
    clean = reference_moe([x], [ids], [torch.ones(6, 2)], w, config)[0]
    x[3, 5] = math.nan
    spoiled = reference_moe([x], [ids], [torch.ones(6, 2)], w, config)[0]
    assert spoiled[3].isnan().all()
    assert torch.equal(spoiled[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])


def test_an_unused_choice_counts_nothing_whatever_its_weight():
    config = MoEConfig(**CONFIG)
    w = {"w1": torch.ones(3, 3, 2), "w3": torch.ones(3, 3, 2), "w2": torch.ones(3, 2, 3)}
    ids = torch.tensor([[-1, 1], [-1, -1]])
    weights = torch.tensor([[math.nan, 1.0], [math.inf, math.nan]])
    out = reference_moe([torch.ones(2, 2)], [ids], [weights], w, config)[0]
    assert out[0].isfinite().all()
    assert out[1].tolist() == [0.0, 0.0]


def test_duplicates_count_twice():
    config = MoEConfig(**CONFIG)
    w = {"w1": torch.ones(3, 3, 2), "w3": torch.ones(3, 3, 2), "w2": torch.ones(3, 2, 3)}
    x, once = torch.ones(1, 2), torch.tensor([[1, -1]])
    one = reference_moe([x], [once], [torch.ones(1, 2)], w, config)[0]
    two = reference_moe([x], [torch.tensor([[1, 1]])], [torch.ones(1, 2)], w, config)[0]
    assert torch.equal(two, 2 * one)


def test_whole_numbers_do_not_depend_on_how_rows_are_spread_over_ranks():
    """Small integers are exact in fp32 in any order, so here any grouping must agree."""
    config = MoEConfig(**{**CONFIG, "activation": "relu2", "max_rows": 12})
    rng, g = random.Random(3), torch.Generator().manual_seed(3)
    w = {
        n: torch.randint(-2, 3, s, generator=g).float()
        for n, s in (("w1", (3, 3, 2)), ("w2", (3, 2, 3)))
    }
    x = torch.randint(-3, 4, (12, 2), generator=g).float()
    ids = torch.randint(-1, 3, (12, 2), generator=g)
    weights = torch.randint(0, 3, (12, 2), generator=g).float()
    whole = reference_moe([x], [ids], [weights], w, config)[0]
    for _ in range(20):
        cut = sorted(rng.randrange(13) for _ in range(3))
        spans = [slice(a, b) for a, b in zip([0, *cut], [*cut, 12], strict=True)]
        parts = [[tensor[span] for span in spans] for tensor in (x, ids, weights)]
        assert torch.equal(torch.cat(reference_moe(*parts, w, config)), whole)
