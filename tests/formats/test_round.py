"""A layer over several ranks in every format, equal to the last bit to the emulation of it.

Experts get the rows of all ranks in the order (rank, token, choice), as the layer gives them: a
row of a matrix product may depend on how many rows were in it.
"""

import pytest
import torch
from expert_oracle import MODES, config, emulated, inputs
from ranks import ranks

from epmoe.config import FORMATS
from epmoe.errors import ConfigMismatch
from epmoe.formats import format_of
from epmoe.moe import MoE
from epmoe.sched.placement import Placement

EXPERTS = 3


def batches(c, size):
    """Rows of every rank, one of them without any, some choices -1."""
    torch.manual_seed(size)
    counts = [(3 * rank + 4) % 7 if rank != 1 else 0 for rank in range(size)]
    found = []
    for rows in counts:
        x = torch.randn(rows, c.hidden)
        ids = torch.rand(rows, EXPERTS).argsort(1)[:, : c.choices].contiguous()
        ids[torch.rand(rows, c.choices) < 0.2] = -1
        found.append((x.bfloat16() if c.dtype == "bf16" else x, ids, torch.rand(rows, c.choices)))
    return found


def expected(c, plain, scales, found):
    xs = torch.cat([x.repeat_interleave(c.choices, 0) for x, _, _ in found])
    ids = torch.cat([ids.flatten() for _, ids, _ in found])
    router = torch.cat([weights.flatten() for _, _, weights in found])
    terms = torch.zeros(len(xs), c.hidden)
    for e in range(EXPERTS):
        rows = (ids == e).nonzero().flatten()
        if len(rows):
            terms[rows] = emulated(c, plain, e, xs[rows], router[rows], scales)
    if c.weight_in == "reduce":
        terms = terms * router[:, None]
    terms[ids < 0] = 0
    terms = terms.view(-1, c.choices, c.hidden)
    out = torch.zeros(len(terms), c.hidden)
    for k in range(c.choices):
        out = out + terms[:, k]
    dtype = torch.bfloat16 if c.dtype == "bf16" else torch.float32
    return out.to(dtype).split([len(x) for x, _, _ in found])


def mine(tensors, rank, size):
    each = EXPERTS // size
    return {n: t[rank * each : (rank + 1) * each].clone() for n, t in tensors.items()}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight_in": "fc2", "dtype": "fp32", "activation": "gpt_oss", "bias": True, "clamp": 2.0},
    ],
    ids=["swiglu", "gpt-oss"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
@ranks(1, 3)
def test_equal_to_the_emulation_on_every_rank(rank, group, name, mode, more):
    c = config(name, mode, stall_s=10.0, open_s=20.0, **more)
    plain, _, _, scales = inputs(c)
    found = batches(c, group.size)
    want = expected(c, plain, scales, found)[rank]
    weights = format_of(c).from_plain(c, plain, **scales)
    with MoE.open(c, group) as moe:
        moe.load(**mine(weights, rank, group.size))
        for _ in range(2):
            assert torch.equal(moe(*found[rank]), want)


@ranks(3)
def test_ranks_that_would_read_rows_at_another_scale_are_refused(rank, group):
    c = config("nvfp4", "format", stall_s=10.0, open_s=20.0)
    plain, _, _, scales = inputs(c)
    if rank == 2:
        scales["input_scale"] = scales["input_scale"] * 2
    weights = format_of(c).from_plain(c, plain, **scales)
    with MoE.open(c, group) as moe, pytest.raises(ConfigMismatch, match="input_scale"):
        moe.load(**mine(weights, rank, group.size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
@ranks(3)
def test_all_that_is_declared_moves_with_its_expert(rank, group, name, mode):
    """Alphas, scales and biases differ per expert here: one left behind would change the answer."""
    c = config(name, mode, stall_s=10.0, open_s=20.0, activation="gpt_oss", bias=True)
    plain, _, _, scales = inputs(c)
    found = batches(c, group.size)
    want = expected(c, plain, scales, found)[rank]
    weights = format_of(c).from_plain(c, plain, **scales)
    held = mine(weights, rank, group.size)
    turned = Placement.of([2, 0, 1], experts=EXPERTS, ranks=group.size)
    with MoE.open(c, group) as moe:
        moe.load(**held)
        assert torch.equal(moe(*found[rank]), want)
        moe.place(turned, verify=True)
        assert torch.equal(moe(*found[rank]), want)
    for name_, tensor in held.items():
        expert = weights[name_][turned.expert_of_S[rank]]
        assert torch.equal(tensor[0].view(-1).view(torch.uint8), expert.view(-1).view(torch.uint8))
