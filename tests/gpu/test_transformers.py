"""transformers' models on GPUs, their experts on epmoe: float32 and eager bf16 are the oracles."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import epmoe.transformers
from epmoe import EpmoeError, local
from epmoe.comm import cuda

HOOKS: tuple[str, ...] = ()
with contextlib.suppress(EpmoeError):
    HOOKS = epmoe.transformers.register()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(cuda.why_not()), reason=f"no cuda heap: {cuda.why_not()}"),
    pytest.mark.skipif(not HOOKS, reason="transformers 5.8 or later is not installed"),
]

COMMON = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "head_dim": 32,
}
FAMILIES = {
    "Qwen3MoeConfig": {"num_experts": 16, "moe_intermediate_size": 64, "intermediate_size": 64},
    "MixtralConfig": {"num_local_experts": 8, "intermediate_size": 64},
    "GptOssConfig": {"num_local_experts": 8, "intermediate_size": 64},  # biases, clamp, transposed
}
MAX_ROWS = 64


def make(family="Qwen3MoeConfig", **changes):
    """A random bf16 model on the GPU."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    epmoe.transformers.register(max_rows=MAX_ROWS)
    torch.manual_seed(0)
    config = getattr(transformers, family)(**(COMMON | FAMILIES[family] | changes))
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def tokens(rows=2, length=12):
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(1)).cuda()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.float()


def apart(got, wanted):
    """Relative error of the row in the middle: a few are routed otherwise, where experts tie."""
    return float(((got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 48, 200])
@torch.no_grad()
def test_experts_are_as_close_to_float32_as_eager_is(family, rows):
    """The same routing for all, so that nothing but arithmetic is compared; 200 rows are cut."""
    model = make(family)
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    dice = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 128, generator=dice).cuda().bfloat16()
    ids = torch.rand(rows, experts.num_experts, generator=dice).topk(2).indices.cuda()
    weights = torch.rand(rows, 2, generator=dice).cuda().bfloat16()
    exact = copy.deepcopy(experts).float()(x.float(), ids, weights.float())
    theirs = apart(experts(x, ids, weights), exact)
    model.set_experts_implementation("epmoe")
    epmoe.transformers.layers(model)
    assert apart(experts(x, ids, weights), exact) <= 1.1 * theirs
    for moe in epmoe.transformers.layers(model):
        moe.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_the_cut_prefill(family):
    model = make(family)
    exact = copy.deepcopy(model).float()
    for one in (model, exact):
        one.set_experts_implementation("eager")
    ids = tokens(6, 40)  # 240 rows: four rounds of at most 64
    wanted = logits(exact, ids)
    theirs = apart(logits(model, ids), wanted)
    model.set_experts_implementation("epmoe")
    ours = logits(model, ids)
    assert apart(ours, wanted) <= 1.1 * theirs
    assert torch.equal(ours, logits(model, ids))


def test_loading_makes_no_second_copy():
    model = make(hidden_size=512, moe_intermediate_size=256, num_hidden_layers=4)
    model.set_experts_implementation("epmoe")
    layer = sum(p.numel() * 2 for p in model.model.layers[0].mlp.experts.parameters())
    epmoe.transformers.register(max_rows=4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    epmoe.transformers.layers(model)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < layer


def test_what_was_rearranged_is_not_mistaken_for_a_checkpoint():
    model = make()
    model.set_experts_implementation("epmoe")
    logits(model, tokens())
    with pytest.raises(EpmoeError, match="save before the first forward"):
        model.state_dict()
    for other in ("eager", "grouped_mm"):
        model.set_experts_implementation(other)
        with pytest.raises((RuntimeError, ValueError)):
            logits(model, tokens())


def test_other_types_are_refused():
    model = make().float()
    model.set_experts_implementation("epmoe")
    with pytest.raises(ValueError, match=r"must be in torch\.bfloat16, got torch\.float32"):
        logits(model, tokens())


@torch.no_grad()
def test_a_forward_waits_for_nothing():
    model = make()
    model.set_experts_implementation("epmoe")
    logits(model, tokens())
    experts = model.model.layers[1].mlp.experts
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(5, 2, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x, ids, torch.ones_like(ids, dtype=torch.bfloat16))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_compiled_decode_replays():
    """One graph for the whole model, recorded by torch's own CUDA graphs."""
    from transformers import StaticCache

    model = make()
    model.set_experts_implementation("epmoe")
    epmoe.transformers.layers(model)
    ids, said = tokens(3, 8), []
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for run in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=32)
        out = [model(ids, past_key_values=cache).logits[:, -1:].clone()]
        for at in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            step = run(tokens(3, 14)[:, 8 + at : 9 + at], past_key_values=cache)
            out.append(step.logits.clone())
        said.append(torch.cat(out, 1).float())
    torch.compiler.reset()
    assert apart(said[1], said[0]) < 0.05  # inductor fuses what it finds around the experts


@torch.no_grad()
def test_a_captured_forward_replays_with_new_tokens():
    model = make()
    model.set_experts_implementation("epmoe")
    epmoe.transformers.layers(model)
    ids = tokens(2, 8)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(ids, use_cache=False)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(ids, use_cache=False).logits
    for shift in range(3):
        ids.copy_((tokens(2, 8) + shift) % 128)
        graph.replay()
        assert torch.equal(out, model(ids, use_cache=False).logits)


RANKS = """
import json, os, sys, tempfile
import torch, torch.distributed as dist
import transformers
import epmoe.transformers
from epmoe import Group
sys.path.insert(0, sys.argv[1])
from test_transformers import apart, logits, make, tokens

with Group.from_env() as group:
    torch.cuda.set_device(group.local_rank)
    os.environ["LOCAL_RANK"] = str(group.local_rank)
    said = group.allgather(tempfile.mkdtemp().encode(), what="store", limit_s=60)
    store = dist.FileStore(said[0].decode() + "/store", group.size)
    dist.init_process_group("nccl", store=store, rank=group.rank, world_size=group.size)
    whole = make()
    mine = tokens(1 + group.rank, 40)  # up to 160 rows: three rounds of at most 64
    wanted = logits(whole.float(), mine)
    whole = make()
    theirs = apart(logits(whole, mine), wanted)
    weights = {n: t.clone() for n, t in whole.state_dict().items()}
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(
        None, config=whole.config, state_dict=weights, dtype=torch.bfloat16,
        **epmoe.transformers.spread(whole.config, group.size)).eval()
    ours = [apart(logits(model, mine), wanted) for _ in range(2)]
    ids = tokens(2, 8)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            model(ids, use_cache=False)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = model(ids, use_cache=False).logits
        graph.replay()
        same = torch.equal(out, model(ids, use_cache=False).logits)
    for moe in epmoe.transformers.layers(model):
        moe.check()
    print("@@" + json.dumps({"theirs": theirs, "ours": ours, "same": same}), flush=True)
    group.allgather(b"", what="end", limit_s=60)
    epmoe.transformers.close(model)
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.skipif("ep_implementation" not in HOOKS, reason="needs transformers 5.23 or later")
def test_many_ranks(ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    (tmp_path / "run.py").write_text(RANKS)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    argv = [sys.executable, str(tmp_path / "run.py"), str(here)]
    job = local.run(ranks, argv, limit_s=200, env={"PYTHONPATH": path})
    assert job.first is None, job.first.log
    for outcome in job.outcomes:
        line = next(x for x in outcome.log.splitlines() if x.startswith("@@"))
        found = json.loads(line.removeprefix("@@"))
        assert found["same"]
        assert max(found["ours"]) <= 1.1 * found["theirs"]
