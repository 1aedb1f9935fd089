"""How benchmarks/generate.py times a model that writes text: alike on all ranks, medians."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import StaticCache

from epmoe import Group


class Bench:
    """The ranks, and how they time something together."""

    def __init__(self, group: Group, asked: argparse.Namespace, vocab: int) -> None:
        self.group, self.asked, self.vocab = group, asked, vocab
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
        ids = torch.cat([torch.randint(self.vocab, (rows, tokens), generator=d) for d in dice])
        return ids.to(self.device)


def plain(tensor: Any) -> torch.Tensor:
    """Tensor-parallel models answer in DTensors."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def experts_by(model: Any, how: str) -> Iterator[None]:
    """Experts computed by another implementation of transformers."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(how)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """``generate`` decodes with the experts it prefills with, not with batched_mm."""
    model._optimize_model_for_decode = nullcontext
    try:
        yield
    finally:
        del model._optimize_model_for_decode


def named(prefix: str, found: dict[str, Any]) -> dict[str, Any]:
    """Figures of another way to the same."""
    return {f"{prefix}_{name}": value for name, value in found.items()}


@torch.no_grad()
def measured(
    bench: Bench, model: Any, rows: int, *, theirs: bool, shared: bool = False
) -> dict[str, Any]:
    """Prefill, generate and a captured decode step of one batch of ``rows`` prompts a rank;
    ``theirs``: the last two by transformers' two implementations."""
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
    found: dict[str, Any] = {
        "prefill_tokens_s": sequences * asked.prompt / bench.seconds(prefill, 5)
    }
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

    def generated() -> dict[str, float]:
        first_s = bench.seconds(lambda: generate(1), 5)
        all_s = bench.seconds(lambda: generate(asked.new), 5)
        return {
            "generate_decode_tokens_s": sequences * (asked.new - 1) / (all_s - first_s),
            "generate_tokens_s": sequences * asked.new / all_s,
        }

    def replayed(how: str | None = None) -> dict[str, Any]:
        try:
            replays, _ = decode_step(bench, model, cache, prefill, how)
        except RuntimeError as error:  # torch's word for a step that cannot be captured
            if not shared:
                raise
            return {"graph": f"not captured: {error}".split("\n")[0]}
        step_s = bench.seconds(replays, 5) / (asked.new - 1)
        return {"graph_decode_tokens_s": sequences / step_s, "graph_step_us": step_s * 1e6}

    found |= generated() | {"text": texts[0][:, asked.prompt :].tolist()}
    if bench.on_gpu:
        found |= replayed() | {"memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    if theirs:
        with unchanged(model):
            found |= named("grouped", generated())
        if bench.on_gpu:
            found |= named("batched", replayed("batched_mm"))
            torch.cuda.reset_peak_memory_stats()
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
    bench: Bench,
    model: Any,
    cache: StaticCache,
    prefill: Callable[[], torch.Tensor],
    how: str | None = None,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """``new - 1`` replays of a captured step that feeds itself; and one.  ``how``: its experts,
    if by another implementation than those of the prefill."""
    asked, ids = bench.asked, prefill().argmax(-1, keepdim=True)
    length = asked.prompt + asked.new + 4
    position = torch.full((1, 1), asked.prompt, device=bench.device)
    places = torch.arange(length, device=bench.device)

    def step() -> None:
        mask = (places <= position[0, 0]).view(1, 1, 1, length).expand(len(ids), 1, 1, length)
        out = model(ids, position_ids=position, attention_mask=mask, past_key_values=cache)
        ids.copy_(plain(out.logits)[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    with experts_by(model, how) if how else nullcontext():
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


def brief(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:,.0f}" for k, v in found.items() if isinstance(v, float))


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
