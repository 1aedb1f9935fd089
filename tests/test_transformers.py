"""Models of the real transformers package with their experts on epmoe's ranks: eager is the oracle.

Logits are compared to 1e-5 of the largest one: transformers multiplies the same fp32 numbers in
other batches and sums them in another order.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ranks, world_of_mpi

import epmoe.transformers
from epmoe import BalanceRule, EpmoeError, local
from epmoe.transformers.activation import activation_of
from epmoe.transformers.device import device_of, fields_for
from epmoe.transformers.weights import Shape, slots_of

CLOSE = 1e-5
HOOKS = ()
with contextlib.suppress(EpmoeError):
    HOOKS = epmoe.transformers.register()
one_rank = pytest.mark.skipif(
    "experts_implementation" not in HOOKS, reason="transformers 5.8 or later is not installed"
)
many_ranks = pytest.mark.skipif(
    "ep_implementation" not in HOOKS,
    reason="the expert-parallel hook needs transformers 5.23 or later, which is not installed",
)


@pytest.fixture(autouse=True)
def options_of_a_test_are_its_own():
    """Under mpirun all tests run in one process."""
    yield
    with contextlib.suppress(EpmoeError):
        epmoe.transformers.register()


COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "Qwen3MoeConfig": {
        "num_experts": 8,
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
    },
    "MixtralConfig": {"num_local_experts": 8, "intermediate_size": 32},
    "DeepseekV3Config": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "GptOssConfig": {"num_local_experts": 8, "head_dim": 16, "intermediate_size": 32},
    # no gate, a squared ReLU, and experts in a latent space, between layers of Mamba
    "NemotronHConfig": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "n_routed_experts": 8,
        "moe_latent_size": 32,
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "n_groups": 2,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "chunk_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
}


def batch(rank):
    """Rows that differ from rank to rank: 5, 16, 11, 28."""
    dice = torch.Generator().manual_seed(rank)
    return torch.randint(0, 64, (1 + rank % 2, 5 + 3 * rank), generator=dice)


def make(family, **changes):
    """A random model of one family, large enough in its weights that routing errors show."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    fields = {k: v for k, v in (COMMON | FAMILIES[family] | changes).items() if v is not None}
    if "layers_block_type" in fields:
        del fields["num_hidden_layers"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(0.01)
    return model.float().eval()


@torch.no_grad()
def logits(model, ids):
    found = model(ids).logits
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def distance(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def folder():
    """Every family's checkpoint, and what eager transformers says to the batches of four ranks."""
    with tempfile.TemporaryDirectory() as path:
        for family in FAMILIES:
            model = make(family)
            model.save_pretrained(Path(path) / family)
            model.set_experts_implementation("eager")
            torch.save([logits(model, batch(r)) for r in range(4)], Path(path) / family / "eager")
        yield Path(path)


@contextlib.contextmanager
def torch_ranks(group):
    """torch.distributed over the ranks of a group, as an engine would bring it along."""
    with tempfile.TemporaryDirectory() as own:
        said = group.allgather(own.encode(), what="store", limit_s=30)
        store = dist.FileStore(f"{said[0].decode()}/store", group.size)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
        try:
            yield
            group.allgather(b"", what="done", limit_s=60)
        finally:
            dist.destroy_process_group()


def load(folder, family, **where):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder / family, **where).eval()


# --- what needs no transformers ---


class Gated(torch.nn.Module):
    """A module of experts as far as the activation goes."""

    def __init__(self, function):
        super().__init__()
        self._apply_gate = function


def halves(x):
    return x.chunk(2, dim=-1)


def silu_clamped(x):
    gate, up = halves(x)
    return torch.nn.functional.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)


def clamped_below_too(x):
    gate, up = halves(x)
    return torch.nn.functional.silu(gate.clamp(-7.0, 7.0)) * up.clamp(-7.0, 7.0)


def oss(x):
    gate, up = x[..., ::2].clamp(max=5.5), x[..., 1::2].clamp(-5.5, 5.5)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def tanh_gelu(x):
    gate, up = halves(x)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: torch.nn.functional.silu(halves(x)[0]) * halves(x)[1], ("swiglu", math.inf, 0)),
        (lambda x: torch.nn.functional.gelu(halves(x)[0]) * halves(x)[1], ("geglu", math.inf, 0)),
        (silu_clamped, ("swiglu", 7.0, 0)),
        (oss, ("gpt_oss", 5.5, 1)),
    ],
)
def test_an_activation_is_known_by_what_it_computes(function, found):
    assert activation_of(Gated(function), gated=True) == found


@pytest.mark.parametrize("function", [clamped_below_too, tanh_gelu, lambda x: x[..., ::2]])
def test_an_activation_that_is_a_little_different_is_refused(function):
    with pytest.raises(ValueError, match="computes an activation that epmoe does not have"):
        activation_of(Gated(function), gated=True)


def experts(gate_up, down, **flags):
    module = torch.nn.Module()
    module.gate_up_proj = torch.nn.Parameter(gate_up)
    module.down_proj = torch.nn.Parameter(down)
    vars(module).update({"has_gate": True, "has_bias": False, "is_transposed": False} | flags)
    return module


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_slots_are_the_stored_bytes(interleaved, transposed):
    both, down = torch.randn(3, 8, 6), torch.randn(3, 6, 4)  # (E, 2I, H) and (E, H, I)
    stored = [t.transpose(1, 2).contiguous() if transposed else t.clone() for t in (both, down)]
    module = experts(*(t.clone() for t in stored))
    module.is_transposed = transposed
    before = [p.untyped_storage().data_ptr() for p in module.parameters()]
    slots = slots_of(module, interleaved=interleaved, restride=True)
    w1, w3 = (both[:, ::2], both[:, 1::2]) if interleaved else (both[:, :4], both[:, 4:])
    for name, wanted in (("w1", w1), ("w3", w3), ("w2", down)):
        assert torch.equal(slots[name], wanted)
        assert slots[name].stride(-1) == 1
    for parameter, was, at in zip(module.parameters(), stored, before, strict=True):
        assert parameter.untyped_storage().data_ptr() == at
        assert torch.equal(parameter, was)
    held = {t.untyped_storage().data_ptr() for t in slots.values()}
    assert held == set(before)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_slots_of_a_gpu_are_the_stored_bytes_in_another_order(interleaved, transposed):
    both, down, bias = torch.randn(3, 32, 6), torch.randn(3, 6, 16), torch.randn(3, 32)
    stored = [t.transpose(1, 2).contiguous() if transposed else t.clone() for t in (both, down)]
    module = experts(*stored, is_transposed=transposed, has_bias=True)
    module.gate_up_proj_bias = torch.nn.Parameter(bias.clone())
    module.down_proj_bias = torch.nn.Parameter(torch.randn(3, 6))
    before = [p.untyped_storage().data_ptr() for p in module.parameters()]
    slots = slots_of(module, interleaved=interleaved, restride=True, joined=True)
    assert set(slots) == {"w13", "w2", "b13", "b2"}
    # Gate 9 and up 9 of every slot: the second block of eight, its second row.
    gate, up = (18, 19) if interleaved else (9, 16 + 9)
    for name, stored_rows in (("w13", both), ("b13", bias)):
        assert torch.equal(slots[name][:, 17], stored_rows[:, gate])
        assert torch.equal(slots[name][:, 25], stored_rows[:, up])
    assert torch.equal(slots["w2"], down)
    assert all(t.is_contiguous() for t in slots.values())
    assert [slots[n].untyped_storage().data_ptr() for n in ("w13", "w2")] == before[:2]
    assert module.gate_up_proj.dim() == 4  # what else computes with it raises
    assert torch.equal(module.gate_up_proj_bias, bias)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float32}, "on a cuda device must be in torch.bfloat16, got torch.float32"),
        ({"inner": 96}, "multiples of 64, got 128 and 96"),
        ({}, "heap must fit experts on a cuda device, got 'host'"),
    ],
)
def test_what_a_gpu_does_not_compute_is_refused_by_name(change, said):
    shape = Shape(4, 128, 64, torch.bfloat16, torch.device("cuda", 0))
    assert fields_for(shape, {}) == {"heap": "cuda", "max_rows": 4096, "dtype": "bf16"}
    with pytest.raises(ValueError, match=said):
        fields_for(shape._replace(**change), {} if change else {"heap": "host"})


def test_experts_of_one_heap_are_on_one_device():
    here = Shape(4, 128, 64, torch.bfloat16, torch.device("cpu"))
    assert device_of([here, here]) == here.device
    with pytest.raises(ValueError, match="one CPU or CUDA device, got cpu, cuda:1"):
        device_of([here, here._replace(device=torch.device("cuda", 1))])
    with pytest.raises(ValueError, match="one CPU or CUDA device, got meta"):
        device_of([here._replace(device=torch.device("meta"))])


def test_importing_the_adapter_does_not_import_transformers():
    code = "import epmoe.transformers, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("version", ["4.57.0", "5.6.2"])
def test_an_old_version_is_told_which_one_it_takes(monkeypatch, version):
    old = types.ModuleType("transformers")
    old.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(EpmoeError, match=rf"transformers {version} has no ExpertsInterface.* 5\.8"):
        epmoe.transformers.register()
    with pytest.raises(EpmoeError, match=r"has no EPImplementationInterface.* 5\.23"):
        epmoe.transformers.spread("anywhere", 2)


# --- one rank ---


@one_rank
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_says_what_eager_says(family):
    model = make(family)
    model.set_experts_implementation("eager")
    wanted = logits(model, batch(1))
    stored = {n: t.clone() for n, t in model.state_dict().items()}
    model.set_experts_implementation("epmoe")
    assert distance(logits(model, batch(1)), wanted) < CLOSE
    after = model.state_dict()
    assert stored.keys() == after.keys()
    assert all(torch.equal(stored[n], after[n]) for n in stored)
    model.set_experts_implementation("eager")
    assert distance(logits(model, batch(1)), wanted) < CLOSE  # turned weights, the same values


@one_rank
@pytest.mark.parametrize("opened_first", [False, True])
def test_one_graph_holds_the_whole_model(opened_first):
    model = make("GptOssConfig")
    model.set_experts_implementation("eager")
    wanted = logits(model, batch(1))
    model.set_experts_implementation("epmoe")
    if opened_first:
        assert len(epmoe.transformers.layers(model)) == 2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert distance(logits(compiled, batch(1)), wanted) < CLOSE
    torch.compiler.reset()


@one_rank
def test_the_call_is_a_proper_operator():
    model = make("Qwen3MoeConfig")
    model.set_experts_implementation("epmoe")
    logits(model, batch(0))
    number = model.model.layers[0].mlp.experts.epmoe_number
    args = (torch.randn(3, 64), torch.tensor([[0, 1], [2, 8], [7, 3]]), torch.rand(3, 2), number)
    torch.library.opcheck(torch.ops.epmoe.experts, args)


@one_rank
def test_a_backward_pass_raises():
    model = make("MixtralConfig")
    model.set_experts_implementation("epmoe")
    with pytest.raises(EpmoeError, match="forward only"):
        model(batch(0)).logits.sum().backward()


@one_rank
def test_a_model_whose_heap_is_closed_says_so():
    model = make("MixtralConfig")
    model.set_experts_implementation("epmoe")
    epmoe.transformers.layers(model)
    epmoe.transformers.close(model)
    with pytest.raises(EpmoeError, match="closed"):
        logits(model, batch(0))


@one_rank
def test_options_that_a_model_decides_are_refused():
    with pytest.raises(ValueError, match="options must be .* got hidden"):
        epmoe.transformers.register(hidden=4)


# --- many ranks ---


@many_ranks
@ranks(2, 4)
def test_every_rank_says_what_eager_says_to_its_own_batch(group, folder):
    with torch_ranks(group):
        for family in FAMILIES:
            model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
            wanted = torch.load(folder / family / "eager")[group.rank]
            for _ in range(2):
                assert distance(logits(model, batch(group.rank)), wanted) < CLOSE, family
            assert sum(int(moe.loads().sum()) for moe in epmoe.transformers.layers(model)) > 0
            epmoe.transformers.close(model)


@many_ranks
@ranks(2)
def test_a_batch_that_all_ranks_share_is_computed_once(group, folder):
    with torch_ranks(group):
        for family in FAMILIES:
            where = epmoe.transformers.spread(folder / family, group.size, shared=True)
            model = load(folder, family, **where)
            wanted = torch.load(folder / family / "eager")[1]
            assert distance(logits(model, batch(1)), wanted) < CLOSE, family
            for moe in epmoe.transformers.layers(model):
                assert int(moe.loads().sum()) == batch(1).numel() * moe.config.choices
            epmoe.transformers.close(model)


@many_ranks
@ranks(2)
def test_fsdp_beside_the_experts(group, folder):
    from transformers import DistributedConfig

    size = group.size
    with torch_ranks(group):
        for family in ("Qwen3MoeConfig", "GptOssConfig"):
            where = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="epmoe")
            model = load(folder, family, distributed_config=where)
            wanted = torch.load(folder / family / "eager")[group.rank]
            for _ in range(3):
                assert distance(logits(model, batch(group.rank)), wanted) < CLOSE, family
            epmoe.transformers.close(model)


@many_ranks
@ranks(2)
def test_one_graph_on_every_rank(group, folder):
    with torch_ranks(group):
        family = "Qwen3MoeConfig"
        model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
        epmoe.transformers.layers(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        wanted = torch.load(folder / family / "eager")[group.rank]
        for _ in range(2):
            assert distance(logits(compiled, batch(group.rank)), wanted) < CLOSE


@many_ranks
@ranks(2)
def test_the_hook_for_one_rank_refuses_experts_that_another_hook_spread(group, folder):
    family = "Qwen3MoeConfig"
    with torch_ranks(group):
        where = epmoe.transformers.spread(folder / family, group.size)
        where["distributed_config"].ep_implementation = "all_reduce"
        model = load(folder, family, experts_implementation="epmoe", **where)
        with pytest.raises(EpmoeError, match='use ep_implementation="epmoe"'):
            logits(model, batch(0))


@many_ranks
@ranks(2)
def test_experts_that_epmoe_cannot_compute_are_an_error_on_all_ranks(group, folder):
    family = "MixtralConfig"
    with torch_ranks(group):
        where = epmoe.transformers.spread(folder / family, group.size)
        model = load(folder, family, hidden_act="tanh", **where)
        with pytest.raises(ValueError, match="MixtralExperts computes an activation that epmoe"):
            logits(model, batch(0))


@many_ranks
@ranks(4)
def test_more_rows_than_a_round_holds(group, folder):
    family = "DeepseekV3Config"
    with torch_ranks(group):
        epmoe.transformers.register(max_rows=4)
        model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
        wanted = torch.load(folder / family / "eager")[group.rank]
        assert distance(logits(model, batch(group.rank)), wanted) < CLOSE


@many_ranks
@ranks(2)
def test_without_an_exchange_too_many_rows_are_refused_and_peers_are_served(group, folder):
    family = "DeepseekV3Config"
    with torch_ranks(group):
        epmoe.transformers.register(max_rows=8, exchange=False)  # rank 0 has 5, rank 1 has 16
        model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
        wanted = torch.load(folder / family / "eager")[group.rank]
        if group.rank == 0:
            assert distance(logits(model, batch(0)), wanted) < CLOSE
        else:
            with pytest.raises(ValueError, match="x has 16 rows, max_rows is 8"):
                logits(model, batch(1))


@many_ranks
@ranks(4)
def test_experts_move_and_nothing_else_changes(group, folder):
    family = "GptOssConfig"
    with torch_ranks(group):
        epmoe.transformers.register(freight=1 << 16)
        model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
        rule = BalanceRule(interval=2, threshold=1.0, gain=0.01, budget=1 << 12)
        (balancer,) = epmoe.transformers.balance(model, rule)
        wanted = torch.load(folder / family / "eager")[group.rank]
        for _ in range(30):
            assert distance(logits(model, batch(group.rank)), wanted) < CLOSE
        assert balancer.moved
        assert any(moe.epoch for moe in epmoe.transformers.layers(model))
        with pytest.raises(EpmoeError, match="save before the first forward"):
            model.state_dict()


MEMORY = """
import json, sys, threading, time
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
import epmoe.transformers
from epmoe import Group

def held():
    names = ("Pss_Anon", "Pss_Shmem")
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(l.split()[1]) for l in lines if l.split(":")[0] in names) * 1024

folder, most, stop = sys.argv[1], [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        most[0] = max(most[0], held())

torch.set_num_threads(1)
with Group.from_env() as group:
    store = dist.FileStore(folder + "/store", group.size)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
    epmoe.transformers.register(max_rows=256)
    where = epmoe.transformers.spread(folder, group.size)
    torch.randn(64, 64) @ torch.randn(64, 64)
    group.allgather(b"", what="base", limit_s=60)
    base = held()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(folder, **where).eval()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randint(0, 500, (2, 32)))
    stop.set()
    watcher.join()
    group.allgather(b"", what="measured", limit_s=60)
print(json.dumps(most[0] - base))
"""


@many_ranks
@pytest.mark.skipif(world_of_mpi() > 1, reason="starts its own ranks")
@pytest.mark.parametrize("family", ["Qwen3MoeConfig", "GptOssConfig"])
def test_experts_are_held_once(family, tmp_path):
    """Twelve layers: transformers' loader holds the parts of one or two layers beside the whole."""
    changes = {"vocab_size": 500, "hidden_size": 512, "intermediate_size": 256, "head_dim": 64}
    many = {"GptOssConfig": {"num_local_experts": 16}}.get(
        family, {"num_experts": 16, "moe_intermediate_size": 256}
    )
    with torch.device("meta"):
        model = make(family, **changes, **many, num_hidden_layers=12, num_attention_heads=8)
    model.to_empty(device="cpu")
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    model.save_pretrained(tmp_path)
    del model
    (tmp_path / "run.py").write_text(MEMORY)
    # Freed tensors go back at once: what counts is what is held, not what malloc keeps for later.
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    job = local.run(
        4, [sys.executable, str(tmp_path / "run.py"), str(tmp_path)], limit_s=100, env=env
    )
    assert job.first is None, job.first.log
    most = sum(json.loads(o.log.splitlines()[-1]) for o in job.outcomes)
    limit = 1.15 * (4 * (sum(sizes.values()) - routed) + routed)
    assert most <= limit, f"{most / 2**20:.0f} MiB for a limit of {limit / 2**20:.0f} MiB"
