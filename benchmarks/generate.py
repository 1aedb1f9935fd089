"""A random Qwen3-30B-shaped model writes text: experts by epmoe beside transformers' own ways.

    python benchmarks/generate.py --json benchmarks/results/generate-h200.json
    launch/torchrun.sh 4 python benchmarks/generate.py --layers 4 --json FILE

One process a GPU.  On one rank the peer is ``experts_implementation="grouped_mm"``, on the same
weights.  On N ranks epmoe runs attention data-parallel and the experts spread; its peers are N
replicas that hold all experts each (grouped_mm), and transformers' own expert parallelism
("auto": the model's tensor-parallel plan, one batch of all ranks' prompts, all-reduce).

First the logits of prefill and decode in bf16 are compared with a float32 run of the same weights,
beside transformers' eager experts.  Times are medians, on N ranks of the slowest rank:
  prefill   one forward of all prompts, last logits only
  generate  ``model.generate``, greedy, a growing cache: (all tokens - the first) / time of these
  graph     one decode step with a static cache, captured in a CUDA graph, replayed
  experts   all layers of experts alone, captured, by layer; "host" is what a call costs in Python
``generate`` of transformers changes grouped_mm to batched_mm after the prefill; "grouped" generate
does not, and "batched" graph and experts are what it changes to.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from generate_model import config_of, load, whole_model
from generate_times import (
    Bench,
    brief,
    empty,
    experts_alone,
    experts_by,
    measured,
    named,
    plain,
)
from transformers import DistributedConfig, DynamicCache

import epmoe.transformers
from epmoe import Group
from epmoe.cli.machine import machine
from epmoe.local import NO_MULTICAST

CHECKED = (2, 96, 8)  # prompts, tokens of each, of which the last few go one by one


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of every position: most in one forward, the last few one by one from the cache."""
    cache, alone = DynamicCache(config=model.config), CHECKED[2]
    out = [plain(model(ids[:, :-alone], past_key_values=cache).logits)]
    for at in range(ids.shape[1] - alone, ids.shape[1]):
        out.append(plain(model(ids[:, at : at + 1], past_key_values=cache).logits))
    return torch.cat(out, 1).float()


def apart(got: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Relative error of the prefilled and the decoded positions: the median one, and the whole.

    The whole is of those tokens whose router was torn between two experts and chose otherwise.
    """
    cut, found = CHECKED[1] - CHECKED[2], {}
    for name, at in (("prefill", slice(cut)), ("decode", slice(cut, None))):
        wrong, right = (got - wanted)[:, at].norm(dim=-1), wanted[:, at].norm(dim=-1)
        found[name] = float((wrong / right).median())
        found[name + ", whole"] = float(wrong.norm() / right.norm())
    return found


def side(bench: Bench, name: str, model: Any, *, shared: bool = False) -> dict[str, Any]:
    """All figures of one way to compute the experts."""
    found: dict[str, Any] = {"batches": {}, "experts": {}}
    theirs = name != "epmoe"
    for rows in bench.asked.batch:
        one = found["batches"][rows] = measured(bench, model, rows, theirs=theirs, shared=shared)
        bench.say(f"{name}, {rows} a rank: {brief(one)}")
    if not shared and not bench.asked.profile:
        for rows in sorted({*bench.asked.batch, bench.asked.prompt * max(bench.asked.batch)}):
            found["experts"][rows] = experts_alone(bench, model, rows)
            if theirs and rows in bench.asked.batch:  # prefills of it take terabytes
                with experts_by(model, "batched_mm"):
                    found["experts"][rows] |= named("batched", experts_alone(bench, model, rows))
            bench.say(f"{name}, experts of {rows} rows: {brief(found['experts'][rows])}")
    if bench.on_gpu and not bench.asked.profile:
        found["memory_gib"] = max(one["memory_gib"] for one in found["batches"].values())
    return found


def same_text(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Tokens before the first that differs, mean over texts, as a share of all tokens."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        equal = [x == y for x, y in zip(a, b, strict=True)]
        shares.append((equal + [False]).index(False) / len(a))
    return {"mean": statistics.mean(shares), "whole texts": shares.count(1.0) / len(shares)}


def run(bench: Bench) -> dict[str, Any]:
    """Peers first: loading epmoe rearranges the weights."""
    asked, group = bench.asked, bench.group
    epmoe.transformers.register(max_rows=asked.max_rows)
    model, errors = whole_model(bench), {}
    ids = bench.prompts(CHECKED[0], CHECKED[1])
    exact = None
    if asked.layers <= 16:  # four bytes a weight beside two
        reference = copy.deepcopy(model).float()
        reference.set_experts_implementation("eager")
        exact = logits_of(reference, ids)
        del reference
    for how in ("eager", "grouped_mm"):
        model.set_experts_implementation(how)
        logits = logits_of(model, ids)
        if exact is not None:
            errors[how] = apart(logits, exact)
    alone = "grouped_mm" if group.size == 1 else "replicas, grouped_mm"
    empty()
    sides = {alone: side(bench, alone, model)}
    if group.size == 1:
        model.set_experts_implementation("epmoe")
    else:
        weights = {n: t.clone() for n, t in model.state_dict().items()}
        del model
        empty()
        name = "transformers' expert parallelism, auto"
        where = DistributedConfig(tp_size=group.size, ep_size=group.size)
        sides[name] = side(bench, name, load(bench, weights, where), shared=True)
        empty()
        spread = epmoe.transformers.spread(config_of(asked), group.size)
        model = load(bench, weights, spread["distributed_config"])
        del weights
    empty()
    opened = time.perf_counter()
    epmoe.transformers.layers(model)
    bench.wait()
    opened = time.perf_counter() - opened
    if exact is not None:
        errors["epmoe"] = apart(logits_of(model, ids), exact)
    else:  # the last logits are grouped_mm's
        errors["epmoe, from grouped_mm"] = apart(logits_of(model, ids), logits)
    bench.say("relative error of logits from float32", errors)
    sides["epmoe"] = side(bench, "epmoe", model)
    for moe in epmoe.transformers.layers(model):
        moe.check()
    peers = sides[alone]["batches"]
    same = {
        rows: same_text(one["text"], peers[rows]["text"])
        for rows, one in sides["epmoe"]["batches"].items()
    }
    for found in sides.values():
        for one in found["batches"].values():
            del one["text"]
    epmoe.transformers.close(model)
    return {"errors": errors, "same_text": same, "opened_s": opened, "sides": sides}


def main() -> None:
    """Run, print, write."""
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    line.add_argument("--layers", type=int, default=8)
    line.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="prompts a rank")
    line.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    line.add_argument("--new", type=int, default=64, help="tokens written for each")
    line.add_argument("--max-rows", type=int, default=8192)
    line.add_argument(
        "--profile", action="store_true", help="kernels of the captured step, instead of times"
    )
    line.add_argument("--json", type=Path)
    line.add_argument("--tiny", action="store_true", help="a small model, also without a GPU")
    asked = line.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with Group.from_env() as group, tempfile.TemporaryDirectory() as own:
        bench = Bench(group, asked, config_of(asked).vocab_size)
        if bench.on_gpu:
            torch.cuda.set_device(bench.device)
        if group.size > 1:
            folder = group.allgather(own.encode(), what="where to meet", limit_s=300)[0].decode()
            os.environ.setdefault("LOCAL_RANK", str(group.local_rank))
            os.environ.update(NO_MULTICAST)
            dist.init_process_group(
                "nccl" if bench.on_gpu else "gloo",
                store=dist.FileStore(f"{folder}/store", group.size),
                rank=group.rank,
                world_size=group.size,
            )
        found = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "gpu": torch.cuda.get_device_name() if bench.on_gpu else "none",
            "transformers": transformers.__version__,
            "ranks": group.size,
            "asked": {k: v for k, v in vars(asked).items() if k != "json"},
            **run(bench),
        }
        bench.say(json.dumps(found["errors"]), json.dumps(found["same_text"]))
        if asked.json and group.rank == 0:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
        group.allgather(b"", what="the end", limit_s=300)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
