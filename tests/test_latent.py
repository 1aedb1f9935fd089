"""Latent experts: what travels is latent, what the shared expert reads is not."""

from dataclasses import dataclass, field

import pytest
import torch
from ranks import ranks

from epmoe import MoE
from epmoe.comm.layout import layout
from epmoe.config import MoEConfig
from epmoe.context import ForwardContext
from epmoe.formats import format_of
from epmoe.latent import Latent
from epmoe.reference import reference_moe

HIDDEN, LATENT, EXPERTS, CHOICES = 32, 8, 6, 3


@dataclass
class OneRank:
    """A layer on one rank: the reference, and what it was called with."""

    config: MoEConfig
    experts: dict
    calls: list = field(default_factory=list)

    def __call__(self, x, ids, weights, *, context=None, lane=0):
        self.calls.append((x.shape, context, lane))
        return reference_moe([x], [ids], [weights], self.experts, self.config)[0]


def config(**more):
    settings = {"hidden": LATENT, "inner": 16, "dtype": "fp32", "activation": "relu2"} | more
    return MoEConfig(experts=EXPERTS, choices=CHOICES, max_rows=8, **settings)


def whole(*shape):
    """Small integers in fp32: every sum is exact in any order, so equal means equal."""
    return torch.randint(-2, 3, shape).float()


def made(rows=5, **more):
    torch.manual_seed(0)
    moe = OneRank(config(), {"w1": whole(EXPERTS, 16, LATENT), "w2": whole(EXPERTS, LATENT, 16)})
    layer = Latent(moe, down=whole(LATENT, HIDDEN), up=whole(HIDDEN, LATENT), **more)
    ids = torch.stack(
        [torch.randperm(EXPERTS)[:CHOICES] for _ in range(rows)] or [torch.empty(0, 3)]
    )
    ids = ids.long().reshape(rows, CHOICES)
    return moe, layer, whole(rows, HIDDEN), ids, whole(rows, CHOICES)


@ranks(2)
def test_a_refused_batch_costs_the_peers_nothing(rank, group):
    one = config(stall_s=20.0, open_s=20.0)
    with MoE.open(one, group) as moe:
        moe.load(w1=torch.ones(3, 16, LATENT), w2=torch.ones(3, LATENT, 16))
        layer = Latent(moe, down=torch.ones(LATENT, HIDDEN), up=torch.ones(HIDDEN, LATENT))
        x, ids, weights = torch.ones(2, HIDDEN), torch.zeros(2, 3).long(), torch.ones(2, 3)
        for wrong, error in ((x[:, :5], ValueError), (x.double(), TypeError), (None, TypeError)):
            if rank == 0:
                with pytest.raises(error, match="x must"):
                    layer(wrong, ids, weights)
            else:
                assert torch.isfinite(layer(x, ids, weights)).all()
        assert torch.isfinite(layer(x, ids, weights)).all()
        group.allgather(b"", what="done", limit_s=20)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("rows", [0, 5])
def test_equal_to_the_unsplit_computation(rows, biases):
    """Unsplit: every expert takes and gives full-width rows, its matrices multiplied out."""
    more = {"down_bias": whole(LATENT), "up_bias": whole(HIDDEN)} if biases else {}
    moe, layer, x, ids, weights = made(rows, **more)
    w1 = torch.einsum("eil,lh->eih", moe.experts["w1"], layer.down)
    w2 = torch.einsum("hl,eli->ehi", layer.up, moe.experts["w2"])
    want = torch.zeros(rows, HIDDEN)
    for t in range(rows):
        for k in range(CHOICES):
            e = ids[t, k]
            inner = w1[e] @ x[t]
            if biases:
                inner = inner + moe.experts["w1"][e] @ more["down_bias"]
            want[t] += weights[t, k] * (w2[e] @ torch.relu(inner) ** 2)
        if biases:
            want[t] += more["up_bias"]  # once, not once per choice
    assert torch.equal(layer(x, ids, weights), want)
    assert moe.calls == [((rows, LATENT), None, 0)]


def test_the_shared_expert_reads_the_full_width_and_the_context():
    context, seen = ForwardContext(phase="decode"), []

    def shared(x, *, context):
        seen.append((x, context))
        return 2 * x

    moe, layer, x, ids, weights = made(shared=shared)
    alone = Latent(moe, down=layer.down, up=layer.up)
    got = layer(x, ids, weights, context=context, lane=1)
    assert torch.equal(got, alone(x, ids, weights) + 2 * x)
    assert seen == [(x, context)]
    assert moe.calls[0] == ((5, LATENT), context, 1)


def test_only_latent_rows_travel():
    """Nemotron-3 Super: hidden 4,096, latent 1,024."""
    c = config(hidden=1024, inner=64, dtype="bf16")
    moe = OneRank(c, {})
    layer = Latent(moe, down=torch.zeros(1024, 4096), up=torch.zeros(4096, 1024))
    [part] = format_of(layer.config).wire(layer.config)
    assert part.shape == (1024,)
    regions = layout([layer.config], ranks=2).lanes[0][0]
    assert regions["rows"].shape == (c.max_rows, 1024 * 2)
    assert regions["results"].shape == (c.max_rows * CHOICES, 1024)


def test_what_does_not_fit_or_would_be_ignored_is_refused():
    moe, layer, x, ids, weights = made()
    good = {"down": layer.down, "up": layer.up}
    for name, wrong in (
        ("down", torch.zeros(LATENT + 1, HIDDEN)),
        ("up", torch.zeros(LATENT, HIDDEN)),
        ("down_bias", torch.zeros(HIDDEN)),
        ("up_bias", torch.zeros(LATENT)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            Latent(moe, **good | {name: wrong})
    with pytest.raises(ValueError, match="shared_inner must be 0"):
        Latent(OneRank(config(shared_inner=16), {}), **good)
    with pytest.raises(TypeError):
        Latent(moe, layer.down, layer.up)
    with pytest.raises(ValueError, match="x must have shape"):
        layer(x[:, :LATENT], ids, weights)
    with pytest.raises(TypeError):
        layer(x, ids, weights, forward_meta=1)
    with pytest.raises(TypeError):
        layer(x, ids, weights, ForwardContext())
    narrow = Latent(moe, **good, shared=lambda x, *, context: x[:, :LATENT])
    with pytest.raises(ValueError, match="shared must return shape"):
        narrow(x, ids, weights)
