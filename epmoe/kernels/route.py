"""Routing in one launch: checks, then ``cu/route.cu``; bit for bit what ``sched.route`` returns."""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor

from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.launch import CompiledKernel, Launch
from epmoe.sched import score
from epmoe.sched.route import SCORES, Router, Routing, check_route

WARPS = 4  # rows of one block; few, so that a small batch reaches many SMs
# Many rows: 8 rows a block, choices counted in shared memory first.  4096 rows of 256 experts:
# 10.7 -> 8.7 us; 1024: 5.8 -> 5.1; 512: 4.3 -> 4.7.  512 experts, 22 choices: 20.5 -> 22.3.
GATHER_WARPS, GATHER_ROWS, GATHER_EXPERTS = 8, 1024, 256
MOST_EXPERTS = 1024
MOST_RUN = 32  # experts of one lane: what fits its registers


@cache
def compiled(
    router: Router,
    experts: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    aligned: int = 16,
    gather: bool = False,
) -> CompiledKernel:
    """The kernel for this router and shape; needs no GPU.

    ``aligned``: bytes by which logits and bias are; ``gather``: count choices block by block.
    """
    size = router.group_size(experts)
    lanes = 32
    while lanes * router.groups > 32:
        lanes //= 2
    run = -(-size // max(1, lanes))
    for name, value, most in (
        ("experts", experts, MOST_EXPERTS),
        ("groups", router.groups, 32),
        ("experts per lane", run, MOST_RUN),
    ):
        if value > most:
            raise ValueError(f"{name} must be at most {most} in the routing kernel, got {value}")
    item = dtype.itemsize
    wide = gcd(aligned, gcd(run * item, experts * item))
    whole = size == lanes * run and router.groups * lanes == 32
    constants: dict[str, int | str] = {
        "E": experts,
        "K": router.choices,
        "GROUPS": router.groups,
        "KEEP": router.keep,
        "LANES": lanes,
        "RUN": run,
        "SCORE": SCORES.index(router.score),
        "BIAS": int(bias),
        "RENORMALISE": int(router.renormalise),
        "ITEM": item,
        "HALF": int(dtype == torch.float16),
        "WIDE": wide if whole and wide >= 4 else 0,
        "BIAS_WIDE": gcd(aligned, run * 4) if whole and aligned >= 4 else 0,
        "WARPS": GATHER_WARPS if gather else WARPS,
        "GATHER": int(gather),
    }
    for name in ("EXP_LIMIT", "EXP_ROUND", "LOG2_E", "LN2_HIGH", "LN2_LOW"):
        constants[name] = f"{getattr(score, name).hex()}f"
    for i, coefficient in enumerate(score.EXP_Q):
        constants[f"EXP_Q{i}"] = f"{coefficient.hex()}f"
    return compile_kernel("route.cu", "route", constants)


def outputs(logits_TE: Tensor, router: Router, *, slots: bool) -> Routing:
    """Room for the results of ``launch``; written whole by every launch."""
    shape = (logits_TE.shape[0], router.choices)
    ids, weights = (logits_TE.new_empty(shape, dtype=t) for t in (torch.int32, torch.float32))
    return Routing(ids, weights, torch.empty_like(ids) if slots else None)


def launch(
    logits_TE: Tensor,
    router: Router,
    *,
    bias_E: Tensor | None = None,
    replicas_EX: Tensor | None = None,
    counts_E: Tensor | None = None,
    first: int = 0,
    loads_E: Tensor | None = None,
    live: Tensor | None = None,
    out: Routing | None = None,
) -> Routing:
    """``sched.route.route`` on the current stream: one kernel, no sync, no copy.

    Nothing is allocated if ``out`` is given (``outputs``), so a graph can capture it; the first
    call of a router and shape compiles and loads and must come before the capture.  All tables may
    be overwritten in place between replays.  Bounds of the tables are not read back: an expert
    whose count is not in 1..X gets slot -1.
    """
    check_route(logits_TE, router, bias_E, replicas_EX, counts_E, first, loads_E, live)
    if not logits_TE.is_cuda:
        raise ValueError(f"logits_TE must be on a GPU, got {logits_TE.device}; use sched.route")
    if not logits_TE.is_contiguous():
        raise ValueError(f"logits_TE must be contiguous, got strides {logits_TE.stride()}")
    rows = logits_TE.shape[0]
    if rows >= 1 << 31:
        raise ValueError(f"rows must be below 2**31, got {rows}")
    if out is None:
        out = outputs(logits_TE, router, slots=replicas_EX is not None)
    _check_out(out, logits_TE, router, replicas_EX is not None)
    bias_at = bias_E.data_ptr() if bias_E is not None else 0
    aligned = gcd(16, logits_TE.data_ptr(), bias_at)
    experts = logits_TE.shape[1]
    gather = loads_E is not None and rows >= GATHER_ROWS and experts <= GATHER_EXPERTS
    kernel = compiled(
        router,
        experts,
        logits_TE.dtype,
        bias=bias_E is not None,
        aligned=aligned,
        gather=gather,
    )
    warps = GATHER_WARPS if gather else WARPS
    if not rows:
        return out
    width = replicas_EX.shape[1] if replicas_EX is not None else 0
    tables = (bias_E, replicas_EX, counts_E, loads_E, live)
    results = (out.ids_TK, out.weights_TK, out.slots_TK)
    places = [0 if t is None else t for t in (logits_TE, *tables, *results)]
    with torch.cuda.device(logits_TE.device):
        stream = torch.cuda.current_stream().cuda_stream
        args = [*places, rows, width, first, float(router.scale)]
        Launch(kernel, (-(-rows // warps),), warps * 32, args).enqueue(stream)
    return out


def _check_out(out: Routing, logits_TE: Tensor, router: Router, slots: bool) -> None:
    shape = (logits_TE.shape[0], router.choices)
    if slots != (out.slots_TK is not None):
        raise ValueError("out.slots_TK must be given if and only if replicas_EX is")
    for name, dtype in (
        ("ids_TK", torch.int32),
        ("weights_TK", torch.float32),
        ("slots_TK", torch.int32),
    ):
        tensor = getattr(out, name)
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise TypeError(
                f"out.{name} must be contiguous {dtype} {shape}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != logits_TE.device:
            raise ValueError(f"out.{name} must be on {logits_TE.device}, got {tensor.device}")
