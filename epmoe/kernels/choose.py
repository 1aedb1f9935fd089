"""Experts to slots on a GPU, in one launch, from tables that a placement overwrites in place."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.launch import CompiledKernel, Launch
from epmoe.sched.placement import Placement

CELLS_PER_BLOCK = 512
MOST_EXPERTS = 1024  # counts of every warp, in the shared memory that every block has


class Chooser:
    """``choose_slots`` for the rows of one rank; int32 slots.  An id that no expert has gives -2.

    The tables never move: a captured graph chooses by the placement in force when it is replayed.
    """

    def __init__(self, config: MoEConfig, placement: Placement, rank: int) -> None:
        self._width = placement.slots - placement.experts + 1  # fits every placement of these
        self._rank = rank
        self._kernels = {
            dtype: compiled(config, dtype, self._width) for dtype in (torch.int32, torch.int64)
        }
        self._replicas = placement.replicas(self._width).cuda()
        self._counts = placement.counts_E.cuda()
        self._launches: dict[torch.dtype, Launch] = {}

    @property
    def table(self) -> Tensor | None:
        """int32, the slot of every expert, if there are no more slots than experts."""
        return self._replicas.view(-1) if self._width == 1 else None

    def place(self, placement: Placement) -> None:
        """From here on in the current stream; waits for nothing."""
        replicas, counts = placement.replicas(self._width), placement.counts_E.clone()
        self._replicas.copy_(replicas.pin_memory(), non_blocking=True)
        self._counts.copy_(counts.pin_memory(), non_blocking=True)

    def slots(self, ids_TK: Tensor) -> Tensor:
        """The slot of every choice."""
        slots_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=ids_TK.device)
        cells = ids_TK.numel()
        if cells:
            args = [ids_TK, slots_TK, self._replicas, self._counts, cells, self._rank]
            launch = self._launches.get(ids_TK.dtype)
            if launch is None:
                kernel = self._kernels[ids_TK.dtype]
                launch = Launch(kernel, (1,), CELLS_PER_BLOCK, [0, 0, *args[2:]])
                self._launches[ids_TK.dtype] = launch
            stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
            launch.enqueue(int(stream), *args, blocks=-(-cells // CELLS_PER_BLOCK))
        return slots_TK


def compiled(config: MoEConfig, dtype: torch.dtype, width: int) -> CompiledKernel:
    """The kernel for ids of this dtype; needs no GPU."""
    if config.experts > MOST_EXPERTS:
        raise ValueError(f"experts must be at most {MOST_EXPERTS} on a GPU, got {config.experts}")
    defines: dict[str, int | str] = {
        "EXPERTS": config.experts,
        "WIDTH": width,
        "CELLS_PER_BLOCK": CELLS_PER_BLOCK,
        "ID": "long long" if dtype == torch.int64 else "int",
    }
    return compile_kernel("choose.cu", "choose", defines)
