"""One layer's contestants on GPUs: the same rows and experts; answers compared, then timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from epmoe.cli.nccl import Nccl, meet
from epmoe.cli.probes import ask_driver
from epmoe.cli.race import LIMIT_S, Race, described
from epmoe.comm.group import Group
from epmoe.comm.layout import layout
from epmoe.comm.words import Words
from epmoe.config import MoEConfig
from epmoe.errors import EpmoeError
from epmoe.kernels.cuda import CudaOps
from epmoe.kernels.gemm import BLOCK
from epmoe.kernels.ops import forward_head
from epmoe.kernels.sizes import most_blocks, private_bytes
from epmoe.moe import MoE

OURS = ("split", "fused")
PEER = "nccl, grouped_mm"
APART = 2e-2  # relative: bf16 router weights of the peer and bf16 results on both sides


@dataclass(frozen=True, slots=True)
class Drawn:
    """This rank's batch."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def make(cls, config: MoEConfig, group: Group, rows: int, *, skew: float, seed: int) -> Self:
        """Distinct experts for each row, expert n of a random order with weight 1 / n^skew."""
        g = torch.Generator(device="cuda").manual_seed(1000 * seed + group.rank)
        common = torch.Generator().manual_seed(seed)  # the popular experts are those of all ranks
        order = torch.randperm(config.experts, generator=common).cuda()
        score_E = -skew * torch.log(1.0 + order)
        noise = torch.rand(rows, config.experts, generator=g, device="cuda")
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        ids = (score_E + gumbel).topk(config.choices).indices
        x = torch.randn(rows, config.hidden, generator=g, device="cuda").bfloat16()
        weights = torch.rand(rows, config.choices, generator=g, device="cuda")
        return cls(x, ids, weights / weights.sum(1, keepdim=True))


@dataclass(frozen=True, slots=True)
class Entry:
    """What was found for one number of rows; times in microseconds, the same on every rank."""

    us: dict[str, dict[str, float]]
    verbs: dict[str, dict[str, float]]
    apart: float  # relative distance of ours and the peer's answer, the largest of all ranks
    busiest: int  # rows of the rank that got most
    memory: dict[str, int]  # bytes of this rank's heap and of its work memory


def gpus() -> int:
    """GPUs of this machine; asked in another process, since ranks are forked from this one."""
    answer = ask_driver()
    if not answer.get("devices"):
        raise EpmoeError(f"no GPU here: {answer.get('error', 'the driver knows no device')}")
    return len(answer["devices"])


@contextmanager
def ready(group: Group) -> Iterator[None]:
    """A GPU for this rank and torch.distributed among all; undone at the end."""
    with group.guarded("take a GPU", LIMIT_S):
        if torch.cuda.device_count() <= group.local_rank:
            raise EpmoeError(
                f"rank {group.rank} needs GPU {group.local_rank}, this machine shows "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(group.local_rank)
    meet(group)
    try:
        yield
    finally:
        dist.destroy_process_group()


def weights(config: MoEConfig, group: Group, seed: int) -> dict[str, Tensor]:
    """Random weights of this rank's slots, of a size that keeps values near 1."""
    g = torch.Generator(device="cuda").manual_seed(7 + 1000 * seed + group.rank)
    slots = config.slots_per_rank(group.size)

    def draw(scale: float, *shape: int) -> Tensor:
        made = torch.empty(slots, *shape, dtype=torch.bfloat16, device="cuda")
        return made.normal_(0.0, scale, generator=g)

    hidden, inner = config.hidden, config.inner
    up = {"w1": (inner, hidden)} | ({"w3": (inner, hidden)} if config.gated else {})
    made = {name: draw(hidden**-0.5, *shape) for name, shape in up.items()}
    made["w2"] = draw(inner**-0.5, hidden, inner)
    if config.bias:
        made |= {name.replace("w", "b"): draw(0.1, inner) for name in up}
        made["b2"] = draw(0.1, hidden)
    return made


def memory(config: MoEConfig, ranks: int) -> dict[str, int]:
    """Bytes of one rank: its slab, and what the fused round keeps beside it."""
    return {"heap": layout([config], ranks).total, "private": private_bytes(config, ranks)}


def check_memory(config: MoEConfig, ranks: int) -> None:
    """``EpmoeError`` if weights, heap, work memory and the peer's temporaries do not fit."""
    local, matrix = config.slots_per_rank(ranks), config.hidden * config.inner * config.itemsize
    # As loaded, interleaved for both of ours, joined for the peer, and one that is being made.
    held = local * matrix * (11 if config.gated else 3)
    passing = config.max_rows * config.choices * config.itemsize
    passing *= 8 * config.hidden + 6 * config.inner
    ours = memory(config, ranks)
    most = most_blocks(config, ranks) * BLOCK  # the split path has room for any routing
    split = most * (2 * config.hidden + config.inner) * config.itemsize
    need = held + passing + ours["heap"] + ours["private"] + split
    torch.cuda.empty_cache()  # a heap takes its memory from the driver, not from torch
    free, _ = torch.cuda.mem_get_info()
    if need > free:
        raise EpmoeError(
            f"{config.name} with {config.max_rows} rows on {ranks} ranks needs about "
            f"{need / 2**30:.0f} GiB of each GPU, {free / 2**30:.0f} GiB are free"
        )


def run(
    config: MoEConfig,
    group: Group,
    held: Mapping[str, Tensor],
    drawn: Drawn,
    rounds: int,
    without: Collection[str] = (),
) -> Entry:
    """Collective: answers compared, then all contestants timed.  ``EpmoeError`` if they differ.

    Ours must have the same bits; the peer may be ``APART``.
    """
    batch = (drawn.x, drawn.ids, drawn.weights)
    torch.cuda.empty_cache()
    with MoE.open(config, group) as moe:
        moe.load(**held)
        contestants: dict[str, Callable[[], Tensor]] = {}
        with group.guarded("make the contestants", LIMIT_S):
            split = _split(moe, config, held)
            contestants["split"] = partial(_by_verbs, split, drawn)
            if "fused" not in without:
                contestants["fused"] = partial(moe, *batch)
            contestants[PEER] = partial(Nccl(config, group, held), *batch)
        answers = {name: call() for name, call in contestants.items()}
        moe.check()
        with group.guarded("compare the answers", LIMIT_S):
            apart = _apart(answers, group.rank)
        race = Race(group)
        us = race.run(contestants, rounds)
        verbs = race.parts({"split": _verbs(split, drawn)}, rounds)
        moe.check()
        came = int(split.slot_rows.sum())
        numbers = group.allgather(f"{apart} {came}".encode(), what="results", limit_s=LIMIT_S)
        said = [tuple(map(float, one.split())) for one in numbers]
    return Entry(
        {name: described(times) for name, times in us.items()},
        {name: described(times) for name, times in verbs.items()},
        max(one[0] for one in said),
        int(max(one[1] for one in said)),
        memory(config, group.size),
    )


def _apart(answers: Mapping[str, Tensor], rank: int) -> float:
    """The relative distance of ours and the peer's; ``EpmoeError`` if it is too far, or if ours
    are not the same bits."""
    ours, peers = answers["split"], answers[PEER].float()
    for name in OURS:
        if name in answers and not torch.equal(answers[name], ours):
            raise EpmoeError(f"rank {rank}: {name} and split give different bits")
    apart = float((ours.float() - peers).norm() / peers.norm())
    if not apart < APART:
        raise EpmoeError(f"rank {rank}: split and {PEER} differ by {apart:.2e} (relative)")
    return apart


def _split(moe: MoE, config: MoEConfig, held: Mapping[str, Tensor]) -> CudaOps:
    """The separate launches on the layer's own lane, between the fused rounds."""
    runtime = moe._runtime
    words = runtime.lanes[0].words
    if isinstance(words, Words):
        raise EpmoeError(f"config.heap must be of GPU memory, got {config.heap}")
    split = CudaOps(config, runtime.placed, layer=0, lane=0, words=words)
    split.adopt(held)
    return split


def _by_verbs(split: CudaOps, drawn: Drawn) -> Tensor:
    out = torch.empty_like(drawn.x)
    slots = drawn.ids.to(torch.int32)
    split.round(drawn.x, slots, drawn.weights, forward_head(split.config.max_rows), out)
    return out


def _verbs(split: CudaOps, drawn: Drawn) -> tuple[tuple[str, Callable[[], Any]], ...]:
    """The split path's launches, one by one, in order."""
    slots, out = drawn.ids.to(torch.int32), torch.empty_like(drawn.x)
    return (
        (
            "stage",
            partial(
                split.stage, drawn.x, slots, drawn.weights, forward_head(split.config.max_rows)
            ),
        ),
        ("pull", split.pull),
        ("experts", split.ffn),
        ("push", split.push),
        ("reduce", partial(split.reduce, slots, drawn.weights, None, out)),
    )
