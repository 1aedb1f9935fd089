"""What is accepted is accepted as it is.  What is refused has its cell in test_moe.MISTAKES."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epmoe.accept import check_batch, check_start, check_weights
from epmoe.config import MoEConfig
from epmoe.context import ForwardContext
from epmoe.formats import format_of

CONFIG = MoEConfig(experts=8, choices=2, hidden=16, inner=8, max_rows=4)
CPU, META = torch.device("cpu"), torch.device("meta")


def check(rows, context=None, ids=None, ids_dtype=torch.int64, rank=0):
    ids = torch.full((rows, 2), 7, dtype=ids_dtype) if ids is None else ids
    x, weights = torch.ones(rows, 16, dtype=torch.bfloat16), torch.ones(rows, 2)
    check_batch(CONFIG, x, ids, weights, context, rank, 2, CPU)


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_number_of_rows_up_to_the_limit(rows, dtype):
    check(rows, ids_dtype=dtype)
    check(rows, ForwardContext(phase="decode"), ids_dtype=dtype)


def test_a_context_with_rows_lifts_the_limit():
    check(40, ForwardContext(rows=(40, 0)))
    check(0, ForwardContext(rows=(40, 0)), rank=1)
    with pytest.raises(ValueError, match="x has 40 rows, max_rows is 4; more rows need a context"):
        check(40)


def test_unused_and_repeated_choices_and_what_is_no_number():
    check(3, ids=torch.tensor([[-1, -1], [3, 3], [0, 7]]))
    x = torch.full((2, 16), float("nan"), dtype=torch.bfloat16)
    weights = torch.tensor([[float("inf"), float("nan")], [-1.0, 0.0]])
    check_batch(CONFIG, x, torch.zeros(2, 2, dtype=torch.int64), weights, None, 0, 2, CPU)


def test_nothing_is_changed():
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    ids, weights = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)
    before = [t.clone() for t in (x, ids, weights)]
    check_batch(CONFIG, x, ids, weights, None, 0, 2, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, ids, weights), strict=True))


def test_a_parameter_is_taken_where_no_grad_is_asked_for():
    x = torch.ones(2, 16, dtype=torch.bfloat16, requires_grad=True)
    batch = (x, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), None, 0, 2, CPU)
    with pytest.raises(ValueError, match="x requires grad"):
        check_batch(CONFIG, *batch)
    with torch.no_grad():
        check_batch(CONFIG, *batch)


BOTH = torch.zeros(4, 16, 16, dtype=torch.bfloat16)  # gate and up of 4 slots, as models store them
WHOLE = torch.zeros(4, 8, 16, dtype=torch.bfloat16)


def check_load(w1, w3=WHOLE):
    w2 = torch.zeros(4, 16, 8, dtype=torch.bfloat16)
    check_weights(format_of(CONFIG).tensors(CONFIG), (), {"w1": w1, "w3": w3, "w2": w2}, 4, CPU)


def test_halves_of_one_stored_tensor_are_taken_as_they_lie():
    check_load(BOTH[:, :8], BOTH[:, 8:])
    check_load(BOTH[:, ::2], BOTH[:, 1::2])


@pytest.mark.parametrize(
    "w1",
    [
        BOTH.mT[:, :8, ::1],  # columns lie apart
        WHOLE[:1].expand(4, 8, 16),  # all slots are one
        WHOLE[:, :1].expand(4, 8, 16),  # all rows are one
        torch.zeros(4, 16, 32, dtype=torch.bfloat16)[:, ::2, ::2],
    ],
)
def test_rows_that_are_torn_or_shared_are_refused(w1):
    with pytest.raises(ValueError, match="w1 must have contiguous rows that do not overlap, got"):
        check_load(w1)


def check_joined(device=META, **changes):
    """As on a GPU: gate and up as one tensor, the biases as one."""
    config = replace(CONFIG, bias=True)
    shapes = {"w13": (4, 16, 16), "b13": (4, 16), "w2": (4, 16, 8), "b2": (4, 16)} | changes
    given = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device)
        for name, shape in shapes.items()
        if shape
    }
    check_weights(format_of(config).tensors(config), (), given, 4, device)


def test_gate_and_up_may_come_as_one_on_a_gpu():
    check_joined()
    with pytest.raises(ValueError, match=r"w13 must have shape \(4, 16, 16\), got \(4, 8, 16\)"):
        check_joined(w13=(4, 8, 16))
    with pytest.raises(ValueError, match="load needs b13; wanted are w13, w2, b13, b2"):
        check_joined(b13=None)
    with pytest.raises(ValueError, match="load got w1; wanted are w13"):
        check_joined(w1=(4, 8, 16))
    with pytest.raises(ValueError, match="load needs b1, b3, w1, w3"):
        check_joined(CPU)


def test_what_a_gpu_reads_begins_at_16_bytes():
    whole = torch.empty(129, dtype=torch.bfloat16)
    for good in (whole, whole[8:], whole[:0]):
        check_start("x", good, "cuda")
    check_start("x", whole[1:], "cpu")
    check_start("b2", whole[2:], "cuda")
    with pytest.raises(ValueError, match="b2 must begin at a multiple of 4 bytes on a GPU, got"):
        check_start("b2", whole[1:], "cuda")
    with pytest.raises(ValueError, match="x must begin at a multiple of 16 bytes on a GPU, got"):
        check_start("x", whole[1:], "cuda")


def test_gpus_take_no_matrix_in_rows_that_they_would_read_as_it_was_given():
    declared = format_of(CONFIG).tensors(CONFIG)
    whole = {t.name: torch.empty(2, *t.shape, dtype=t.dtype, device="meta") for t in declared}
    check_weights(declared, (), whole, 2, META)
    apart = {n: torch.cat((w, w), 2)[:, :, : w.shape[2]] for n, w in whole.items()}
    check_weights(declared, (), whole | {"w1": apart["w1"]}, 2, META)  # copied, with w3 into one
    with pytest.raises(ValueError, match="w2 must be contiguous"):
        check_weights(declared, (), whole | {"w2": apart["w2"]}, 2, META)
