"""What a caller may hand to a forward: every mistake is named with argument, value and limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from epmoe.comm.heap import MOST_DEVICE_RANKS
from epmoe.config import MoEConfig
from epmoe.context import ForwardContext
from epmoe.formats import DTYPE, SlotTensor
from epmoe.sched.freight import PIECE
from epmoe.sched.placement import Placement

MATRICES = ("w1", "w3", "w2")
Wanted = tuple[tuple[int, ...], torch.dtype]


def check_together(configs: Sequence[MoEConfig]) -> None:
    """Layers that share a heap: its kind and its limits are the heap's, not a layer's."""
    for name in ("heap", "stall_s", "open_s"):
        found = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(found) > 1:
            raise ValueError(
                f"{name} must be equal for layers that share a heap, got {found[0]} and {found[1]}"
            )


def check_ranks(config: MoEConfig, ranks: int) -> None:
    """A layer that so many ranks can share."""
    config.slots_per_rank(ranks)
    if config.heap == "host":
        return
    if ranks > MOST_DEVICE_RANKS:
        raise ValueError(
            f"ranks must be at most {MOST_DEVICE_RANKS} on a {config.heap} heap, got {ranks}"
        )
    if config.lanes > 1 and ranks > 1:
        raise ValueError(
            f"lanes must be 1 on a {config.heap} heap of {ranks} ranks, got {config.lanes}: a "
            "round fills its GPU, and two ranks that begin their lanes' rounds in different order "
            "would wait for each other"
        )


def check_batch(
    config: MoEConfig,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    context: ForwardContext | None,
    rank: int,
    ranks: int,
    device: torch.device,
) -> None:
    """``TypeError`` or ``ValueError`` for the first thing that is not as promised.

    Nothing is converted and nothing copied in silence.  NaN in ``x`` or ``weights`` is not an
    error: it stays in its own row.
    """
    _check_tensor("x", x, 2, (DTYPE[config.dtype],), device)
    check_start("x", x, device.type)
    _check_tensor("ids", ids, 2, (torch.int32, torch.int64), device)
    _check_tensor("weights", weights, 2, (torch.float32,), device)
    if x.shape[1] != config.hidden:
        raise ValueError(f"x must have hidden ({config.hidden}) columns, got {x.shape[1]}")
    for name, tensor in (("ids", ids), ("weights", weights)):
        if tensor.shape != (x.shape[0], config.choices):
            raise ValueError(
                f"{name} must have shape ({x.shape[0]}, {config.choices}): the rows of x, the "
                f"choices of the config; got {tuple(tensor.shape)}"
            )
    check_context(config, context, x.shape[0], rank, ranks)
    if device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= config.experts:
            raise ValueError(
                f"ids must be in -1..{config.experts - 1}, got {low if low < -1 else high}"
            )


def check_context(
    config: MoEConfig, context: ForwardContext | None, rows: int, rank: int, ranks: int
) -> None:
    """Rows against capacity, and the context against this rank."""
    if context is not None and not isinstance(context, ForwardContext):
        raise TypeError(f"context must be a ForwardContext, got {type(context).__name__}")
    if context is not None and context.capacity is not None:
        most = max(rows, *(context.rows or (0,)))
        if not most <= context.capacity <= config.max_rows:
            raise ValueError(
                f"context.capacity must hold {most} rows and be at most max_rows "
                f"({config.max_rows}), got {context.capacity}"
            )
    if context is None or context.rows is None:
        if rows > config.max_rows:
            raise ValueError(
                f"x has {rows} rows, max_rows is {config.max_rows}; more rows need a context with "
                "the rows of every rank, so that all ranks cut the same chunks"
            )
        return
    if len(context.rows) != ranks:
        raise ValueError(f"context.rows must name {ranks} ranks, got {len(context.rows)}")
    if context.rows[rank] != rows:
        raise ValueError(
            f"context.rows[{rank}] is {context.rows[rank]}, but x has {rows} rows on this rank"
        )


def check_epoch(context: ForwardContext | None, epoch: int) -> None:
    """A caller that routed for one placement must not be served by another."""
    if context is not None and context.epoch and context.epoch != epoch:
        raise ValueError(
            f"context.epoch must be 0 or that of the placement in force ({epoch}), "
            f"got {context.epoch}"
        )


def check_placement(
    config: MoEConfig, placement: Placement, budget: int | None, ranks: int
) -> None:
    """A placement of this layer's experts on its slots, and a budget that a round can carry."""
    if not isinstance(placement, Placement):
        raise TypeError(f"placement must be a Placement, got {type(placement).__name__}")
    for name, wanted in (("experts", config.experts), ("slots", config.places), ("ranks", ranks)):
        if getattr(placement, name) != wanted:
            raise ValueError(f"placement must have {wanted} {name}, got {getattr(placement, name)}")
    half = config.freight // 2
    if half < PIECE:
        raise ValueError(
            f"freight must be at least {2 * PIECE} bytes for experts to move, got {config.freight}"
        )
    if budget is not None:
        check_budget(config, budget)


def check_budget(config: MoEConfig, budget: int) -> None:
    """Bytes that the forwards of this layer can carry."""
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise TypeError(f"budget must be an int, got {type(budget).__name__}")
    half = config.freight // 2
    if not PIECE <= budget <= half:
        raise ValueError(f"budget must be in {PIECE}..{half} (half of freight), got {budget}")
    if config.lanes > 1:
        # Rounds of different lanes have no common order: they could not switch together.
        raise ValueError(f"budget needs a layer with one lane, got {config.lanes} lanes")


def check_weights(
    declared: Sequence[SlotTensor],
    shared: Sequence[SlotTensor],
    given: Mapping[str, Tensor],
    slots: int,
    device: torch.device,
) -> None:
    """Exactly the declared tensors, each with the slots of this rank in front.

    A matrix in fp32 or bf16 may be a view whose rows lie apart, as gate and up do that are stored
    as one tensor: every reader goes row by row.  All else must be contiguous, on a GPU also what
    its kernels read as it was given.  A kernel that needs more says so itself.  On a GPU gate and
    up may also come as the one tensor that its kernels read: ``w13`` instead of ``w1`` and ``w3``,
    ``b13`` with it (``interleave_``).
    """
    wanted = {t.name: ((slots, *t.shape), t.dtype) for t in declared}
    if "w13" in given and device.type != "cpu":
        wanted = _joined(wanted)
    wanted |= {t.name: (t.shape, t.dtype) for t in shared}
    # What a GPU's kernels read and what moves whole: gate and up apart are copied before that, and
    # shared experts are torch's.
    as_given = set() if device.type == "cpu" else {t.name for t in declared} | {"w13", "b13"}
    if "w3" in wanted:
        as_given -= {"w1", "w3", "b1", "b3"}
    if missing := sorted(wanted.keys() - given.keys()):
        raise ValueError(f"load needs {', '.join(missing)}; wanted are {', '.join(wanted)}")
    if extra := sorted(given.keys() - wanted.keys()):
        raise ValueError(f"load got {', '.join(extra)}; wanted are {', '.join(wanted)}")
    for name, (shape, dtype) in wanted.items():
        tensor = given[name]
        rows_apart = name not in as_given and name in MATRICES and dtype in DTYPE.values()
        _check_tensor(name, tensor, len(shape), (dtype,), device, rows_apart=rows_apart)
        if name in as_given:
            check_start(name, tensor, device.type)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_start(name: str, tensor: Tensor, kind: str) -> None:
    """Kernels read rows and matrices 16 bytes at a time, biases 4; a view may begin anywhere."""
    least = 4 if name.startswith("b") else 16
    if kind != "cpu" and tensor.data_ptr() % least:
        raise ValueError(
            f"{name} must begin at a multiple of {least} bytes on a GPU, got address "
            f"{tensor.data_ptr():#x}: a view that begins inside of a tensor?"
        )


def _joined(wanted: Mapping[str, Wanted]) -> dict[str, Wanted]:
    """What is wanted when gate and up come as one.

    >>> _joined({"w1": ((4, 8, 16), torch.bfloat16), "w3": ((4, 8, 16), torch.bfloat16)})
    {'w13': ((4, 16, 16), torch.bfloat16)}
    """
    found: dict[str, Wanted] = {}
    for name, (shape, dtype) in wanted.items():
        if name in ("w1", "b1") and name[0] + "3" in wanted:
            found[name + "3"] = ((shape[0], 2 * shape[1], *shape[2:]), dtype)
        elif name not in ("w3", "b3"):
            found[name] = (shape, dtype)
    return found


def _check_tensor(
    name: str,
    tensor: Tensor,
    dims: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    rows_apart: bool = False,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got {tensor.dim()}")
    if not (tensor.is_contiguous() or (rows_apart and _in_rows(tensor))):
        whole = "have contiguous rows that do not overlap" if rows_apart else "be contiguous"
        raise ValueError(
            f"{name} must {whole}, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; nothing is copied in silence"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad: epmoe computes forward only, use torch.no_grad()")


def _in_rows(tensor: Tensor) -> bool:
    """Whether every row is contiguous and no two share a byte: slots are written to, one by one.

    >>> _in_rows(torch.zeros(2, 6, 4)[:, ::2]), _in_rows(torch.zeros(1, 3, 4).expand(2, 3, 4))
    (True, False)
    """
    _, rows, columns = tensor.shape
    slot, row, column = tensor.stride()
    return column == 1 and row >= columns and slot >= (rows - 1) * row + columns
