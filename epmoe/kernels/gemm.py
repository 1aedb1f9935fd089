"""The grouped GEMM: rows of each slot times that slot's weights, with the activation in it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from epmoe.config import GATED
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.launch import Launch, checked

BLOCK = 128  # rows of a block; a slot's rows begin at a multiple of it
TILE_N = 256
THREADS = 384
SHARED_WIDE = 4 * 49152 + 2 * 16384  # stages, staging; barriers and tables come on top
BARRIERS = 2 * 6 * 8 + 48  # of at most 6 stages, and cu/order.cuh ORDER_BYTES
SHARED_NARROW = {64: 6 * 32768 + 2 * 64 * 144, 128: 4 * 49152 + 2 * 64 * 144}


def interleave(gate_LIH: Tensor, up_LIH: Tensor) -> Tensor:
    """w1 and w3 as one (L, 2I, H): 8 rows of the gate, then the same 8 of up, and so on.

    The epilogue then finds a value's gate and up in one thread.  Row 19 of the gate (2 * 8 + 3) is
    row 2 * 16 + 3 = 35 of the result, row 19 of up is row 2 * 16 + 8 + 3 = 43.
    """
    slots, inner, *rest = gate_LIH.shape
    if inner % 8:
        raise ValueError(f"inner must be a multiple of 8, got {inner}")
    eights = (slots, inner // 8, 8, *rest)
    both = torch.stack((gate_LIH.reshape(eights), up_LIH.reshape(eights)), 2)
    return both.reshape(slots, 2 * inner, *rest)


def interleave_(gate_up_LNH: Tensor, *, in_turns: bool = False) -> Tensor:
    """``interleave`` within the bytes of one tensor (L, 2I, ...): what ``MoE.load`` takes as w13.

    It holds all rows of the gate and then all of up, or with ``in_turns`` gate 0, up 0, gate 1 and
    so on.  Slot by slot: beside the tensor itself never more than one slot exists.  With 2I = 32,
    row 9 (gate 9) ends up in row 17, row 16 (up 0) in row 8.
    """
    n = gate_up_LNH.shape[1]
    if n % 16:
        raise ValueError(f"rows of gate_up must be a multiple of 16, got {n}")
    with torch.no_grad():
        for slot in gate_up_LNH:
            gate, up = (slot[::2], slot[1::2]) if in_turns else slot.split(n // 2)
            slot.copy_(interleave(gate.unsqueeze(0), up.unsqueeze(0))[0])
    return gate_up_LNH


def parted(both_LNH: Tensor) -> tuple[Tensor, Tensor]:
    """The gate and the up part of what ``interleave`` made."""
    slots, n, *rest = both_LNH.shape
    parts = both_LNH.reshape(slots, n // 16, 2, 8, *rest)
    gate, up = (parts[:, :, i].reshape(slots, n // 2, *rest) for i in (0, 1))
    return gate, up


def starts(counts: list[int]) -> list[int]:
    """First row in the pool of every slot, and the rows of the pool in all.

    >>> starts([130, 0, 5])
    [0, 256, 256, 384]
    """
    found = [0]
    for count in counts:
        found.append(found[-1] + -(-count // BLOCK) * BLOCK)
    return found


def grouped_gemm(
    rows_PK: Tensor,
    weights_LNK: Tensor,
    out_PN: Tensor,
    counts_L: Tensor,
    *,
    activation: str | None = None,
    clamp: float = math.inf,
    bias_LN: Tensor | None = None,
    scale_P: Tensor | None = None,
    tall: int = 0,
    shares: Tensor | None = None,
    processors: int = 0,
) -> Launch:
    """A launch of out[rows of slot] = act(rows[rows of slot] @ weights[slot]^T); nothing waits.

    Rows of slot s lie in the pools from ``starts(counts)[s]``; ``counts_L`` (int32) is read by the
    kernel, so it may be written by an earlier launch.  Rows past a count are neither used nor
    written.  With an activation of GATED the weights are ``interleave``d and ``out_PN`` is half as
    wide.  ``scale_P`` (fp32) multiplies a row after the activation, or the bias without one.

    ``tall`` 0 is the wide path (many rows a slot), 64 or 128 the narrow one.  ``shares`` (two int32
    zeros) makes tiles go by a counter; ``processors`` limits the SMs, 0 takes all.
    """
    slots, n, k = weights_LNK.shape
    pool = rows_PK.shape[0]
    width = n // 2 if activation in GATED else n
    for name, tensor, shape, dtype in (
        ("rows_PK", rows_PK, (pool, k), torch.bfloat16),
        ("weights_LNK", weights_LNK, (slots, n, k), torch.bfloat16),
        ("out_PN", out_PN, (pool, width), torch.bfloat16),
        ("counts_L", counts_L, (slots,), torch.int32),
        ("bias_LN", bias_LN, (slots, n), torch.bfloat16),
        ("scale_P", scale_P, (pool,), torch.float32),
        ("shares", shares, (2,), torch.int32),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if not tensor.is_contiguous() or not tensor.is_cuda:
            raise ValueError(f"{name} must be contiguous and on a GPU")
    for name, value in (("N", n), ("K", k), ("width", width)):
        if value % 64 or not 64 <= value <= 32768:
            raise ValueError(f"{name} must be a multiple of 64 up to 32768, got {value}")
    if pool % BLOCK or not 1 <= slots <= 512 or tall not in (0, 64, 128):
        raise ValueError(
            f"the pool must be whole blocks of {BLOCK} rows (got {pool}), slots 1 to 512 "
            f"(got {slots}), tall 0, 64 or 128 (got {tall})"
        )
    kernel = compile_kernel(
        "grouped_gemm.cu",
        "grouped_gemm",
        constants(
            slots,
            n,
            k,
            activation,
            bias_LN is not None,
            scale_P is not None,
            tall,
            shares is not None,
        ),
    )
    rows, weights = rows_PK.unsqueeze(0), weights_LNK
    if tall:
        maps = [tensor_map(rows, 8), tensor_map(rows, 32), tensor_map(weights, tall)]
    else:
        maps = [tensor_map(rows, 64), tensor_map(weights, 128), tensor_map(out_PN.unsqueeze(0), 64)]
    grid = processors or processors_of(rows_PK.device.index)
    return Launch(
        kernel,
        (grid // 2 * 2,),
        THREADS,
        [
            *maps,
            counts_L,
            out_PN,
            _or_null(bias_LN),
            _or_null(scale_P),
            float(clamp),
            _or_null(shares),
        ],
        cluster=1 if tall else 2,
        shared=shared_bytes(slots, tall),
    )


def shared_bytes(slots: int, tall: int) -> int:
    """Shared memory of a CTA; cu/grouped_gemm.cu checks it."""
    if tall:
        return SHARED_NARROW[tall] + BARRIERS + 8 * (slots + 1)
    return SHARED_WIDE + BARRIERS + 4 * (slots + 1)


def constants(
    slots: int,
    n: int,
    k: int,
    activation: str | None = None,
    bias: bool = False,
    scale: bool = False,
    tall: int = 0,
    counted: bool = False,
) -> dict[str, int | str]:
    """The ``-D`` constants of one grouped GEMM."""
    return {
        "SLOTS": slots,
        "N": n,
        "K": k,
        "ACT": (activation or "none").upper(),
        "BIAS": int(bias),
        "SCALE": int(scale),
        "COUNTED": int(counted),
        "TALL": tall,
        "SHARED": shared_bytes(slots, tall),
    }


def tensor_map(tensor: Tensor, rows: int) -> bytes:
    """How the copy engine sees a contiguous bf16 tensor: boxes of 64 columns x ``rows`` rows.

    Boxes land with the 128-byte swizzle that the tensor cores read; what lies past an edge is zero
    on the way in and dropped on the way out.
    """
    from cuda.bindings import driver as d

    sizes = list(reversed(tensor.shape))
    strides = [s * 2 for s in reversed(tensor.stride())][1:]
    made = checked(
        d.cuTensorMapEncodeTiled(
            d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            tensor.data_ptr(),
            [d.cuuint64_t(s) for s in sizes],
            [d.cuuint64_t(s) for s in strides],
            [d.cuuint32_t(b) for b in (64, rows, 1)[: len(sizes)]],
            [d.cuuint32_t(1)] * len(sizes),
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return b"".join(int(word).to_bytes(8, "little") for word in made.opaque)


@functools.cache
def processors_of(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _or_null(tensor: Tensor | None) -> Any:
    return 0 if tensor is None else tensor
