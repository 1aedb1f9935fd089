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
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import DistributedConfig, DynamicCache, Qwen3MoeForCausalLM, StaticCache

import epmoe.transformers
from epmoe import Group
from epmoe.cli.machine import machine

CHECKED = (2, 96, 8)  # prompts, tokens of each, of which the last few go one by one


class Bench:
    """The ranks, and how they time something together."""

    def __init__(self, group: Group, asked: argparse.Namespace) -> None:
        self.group, self.asked = group, asked
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", group.local_rank) if self.on_gpu else torch.device("cpu")

    def say(self, *words: object) -> None:
        if self.group.rank == 0:
            print(*words, flush=True)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """Median over repeats, after one that warms up, of the slowest rank."""
        taken = []
        for _ in range(repeats + 1):
            self.wait()
            self.group.allgather(b"", what="start of a measurement", limit_s=300)
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - start)
        said = self.group.allgather(json.dumps(taken[1:]).encode(), what="times", limit_s=300)
        slowest = [max(times) for times in zip(*map(json.loads, said), strict=True)]
        return statistics.median(slowest)

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """``step`` as a CUDA graph, after two runs on a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def prompts(self, rows: int, tokens: int, *, shared: bool = False) -> torch.Tensor:
        """Random ones, other on each rank; ``shared``: those of all ranks."""
        ranks = range(self.group.size) if shared else [self.group.rank]
        dice = [torch.Generator().manual_seed(100 + rank) for rank in ranks]
        vocab = config_of(self.asked).vocab_size
        ids = torch.cat([torch.randint(vocab, (rows, tokens), generator=d) for d in dice])
        return ids.to(self.device)


def config_of(asked: argparse.Namespace) -> Any:
    """Qwen3-30B-A3B with fewer layers; ``--tiny`` is for a CPU."""
    width = (
        {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "vocab_size": 512}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
        if asked.tiny
        else {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
        | {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128}
    )
    return transformers.Qwen3MoeConfig(
        num_hidden_layers=asked.layers,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        intermediate_size=6144,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=None,
        **width,
    )


def whole_model(bench: Bench) -> Any:
    """The same random weights on every rank, spread wide enough that routing matters."""
    torch.manual_seed(0)
    with bench.device:
        model = Qwen3MoeForCausalLM._from_config(
            config_of(bench.asked), dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of every position: most in one forward, the last few one by one from the cache."""
    cache, alone = DynamicCache(config=model.config), CHECKED[2]
    out = [plain(model(ids[:, :-alone], past_key_values=cache).logits)]
    for at in range(ids.shape[1] - alone, ids.shape[1]):
        out.append(plain(model(ids[:, at : at + 1], past_key_values=cache).logits))
    return torch.cat(out, 1).float()


def plain(tensor: Any) -> torch.Tensor:
    """Tensor-parallel models answer in DTensors."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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


@torch.no_grad()
def measured(bench: Bench, model: Any, rows: int, *, shared: bool = False) -> dict[str, Any]:
    """Prefill, generate and a captured decode step of one batch of ``rows`` prompts a rank."""
    asked, ids = bench.asked, bench.prompts(rows, bench.asked.prompt, shared=shared)
    sequences = rows * bench.group.size
    cache = StaticCache(config=model.config, max_cache_len=asked.prompt + asked.new + 4)

    def prefill() -> torch.Tensor:
        cache.reset()
        return plain(model(ids, past_key_values=cache, logits_to_keep=1).logits)[:, -1]

    if asked.profile:  # alone: what it leaves in the driver makes every later launch slower
        return {
            "text": [[0]],
            "kernels_us": kernels_of(decode_step(bench, model, cache, prefill)[1]),
        }
    prefill_s = bench.seconds(prefill, 5)
    texts: list[torch.Tensor] = []

    def generate(new: int) -> None:
        texts[:] = [
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        ]

    first_s = bench.seconds(lambda: generate(1), 5)
    all_s = bench.seconds(lambda: generate(asked.new), 5)
    found: dict[str, Any] = {
        "prefill_tokens_s": sequences * asked.prompt / prefill_s,
        "generate_decode_tokens_s": sequences * (asked.new - 1) / (all_s - first_s),
        "generate_tokens_s": sequences * asked.new / all_s,
        "text": texts[0][:, asked.prompt :].tolist(),
    }
    if bench.on_gpu:
        try:
            replays, _ = decode_step(bench, model, cache, prefill)
        except RuntimeError as error:  # torch's word for a step that cannot be captured
            if not shared:
                raise
            return found | {"graph": f"not captured: {error}".split("\n")[0]}
        step_s = bench.seconds(replays, 5) / (asked.new - 1)
        found |= {"graph_decode_tokens_s": sequences / step_s, "graph_step_us": step_s * 1e6}
    return found


def kernels_of(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of the kernels that take most, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for one in seen.key_averages():
        times[one.key[:60]] = times.get(one.key[:60], 0.0) + one.self_device_time_total
    return dict(sorted(times.items(), key=lambda one: -one[1])[:14])


def decode_step(
    bench: Bench, model: Any, cache: StaticCache, prefill: Callable[[], torch.Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """``new - 1`` replays of a captured step that feeds itself; and one."""
    asked, ids = bench.asked, prefill().argmax(-1, keepdim=True)
    length = asked.prompt + asked.new + 4
    position = torch.full((1, 1), asked.prompt, device=bench.device)
    places = torch.arange(length, device=bench.device)

    def step() -> None:
        mask = (places <= position[0, 0]).view(1, 1, 1, length).expand(len(ids), 1, 1, length)
        out = model(ids, position_ids=position, attention_mask=mask, past_key_values=cache)
        ids.copy_(plain(out.logits)[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    replay = bench.captured(step)

    def replays() -> None:
        position.fill_(asked.prompt)
        for layer in cache.layers:
            layer.cumulative_length.fill_(asked.prompt)
        for _ in range(asked.new - 1):
            replay()

    return replays, replay


@torch.no_grad()
def experts_alone(bench: Bench, model: Any, rows: int) -> dict[str, float]:
    """Microseconds of one layer's experts for random rows that its own router sends."""
    layers = [layer.mlp for layer in model.model.layers]
    dice = torch.Generator().manual_seed(bench.group.rank)
    x = torch.randn(rows, model.config.hidden_size, generator=dice).to(bench.device, torch.bfloat16)
    routed = []
    for mlp in layers:
        weight = plain(mlp.gate.weight)
        scores = torch.nn.functional.linear(x, weight).softmax(-1, dtype=torch.float)
        top, ids = scores.topk(model.config.num_experts_per_tok)
        routed.append((ids, (top / top.sum(-1, keepdim=True)).bfloat16()))

    def step() -> None:
        for mlp, (ids, top) in zip(layers, routed, strict=True):
            mlp.experts(x, ids, top)

    replay = bench.captured(step) if bench.on_gpu else step
    for _ in range(3):
        step()
    bench.wait()
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    per_layer = 1e6 / len(layers)
    return {"us": bench.seconds(replay, 9) * per_layer, "host_us": host * per_layer}


def side(bench: Bench, name: str, model: Any, *, shared: bool = False) -> dict[str, Any]:
    """All figures of one way to compute the experts."""
    found: dict[str, Any] = {"batches": {}, "experts": {}}
    for rows in bench.asked.batch:
        one = found["batches"][rows] = measured(bench, model, rows, shared=shared)
        bench.say(f"{name}, {rows} a rank: {brief(one)}")
    if not shared and not bench.asked.profile:
        for rows in sorted({*bench.asked.batch, bench.asked.prompt * max(bench.asked.batch)}):
            found["experts"][rows] = experts_alone(bench, model, rows)
            bench.say(f"{name}, experts of {rows} rows: {brief(found['experts'][rows])}")
    if bench.on_gpu:
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def brief(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:,.0f}" for k, v in found.items() if isinstance(v, float))


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


def load(bench: Bench, weights: dict[str, torch.Tensor], where: DistributedConfig) -> Any:
    """A model of this rank's part of ``weights``; other experts than eager are grouped_mm."""
    return Qwen3MoeForCausalLM.from_pretrained(
        None,
        config=config_of(bench.asked),
        state_dict=weights,
        dtype=torch.bfloat16,
        distributed_config=where,
    ).eval()


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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
        bench = Bench(group, asked)
        if bench.on_gpu:
            torch.cuda.set_device(bench.device)
        if group.size > 1:
            folder = group.allgather(own.encode(), what="where to meet", limit_s=300)[0].decode()
            os.environ.setdefault("LOCAL_RANK", str(group.local_rank))
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
