"""Small checkpoints with the published names and layouts, written by the safetensors library."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from epmoe.checkpoint import family_of, load_experts
from epmoe.config import MoEConfig
from epmoe.formats import format_of, nvfp4
from epmoe.shards import INDEX, Folder

E, H, I, LAYER = 4, 160, 96, 3  # noqa: E741
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def config(format_name="plain", **more):
    settings = {"experts": E, "choices": 2, "hidden": H, "inner": I, "max_rows": 8} | more
    return MoEConfig(format=format_name, **settings)


def publish(folder, tensors, shards=3):
    """Tensors dealt over shards, an index, and names that belong to nobody here."""
    tensors = tensors | {
        f"model.layers.{LAYER}.mlp.gate.weight": torch.zeros(E, H),
        f"model.layers.{LAYER}.mlp.shared_experts.gate_proj.weight": torch.zeros(I, H),
        f"model.layers.{LAYER}0.mlp.experts.0.gate_proj.weight": torch.zeros(1),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(I, H),
    }
    where = {}
    for shard in range(shards):
        mine = {n: t for k, (n, t) in enumerate(tensors.items()) if k % shards == shard}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(mine, folder / file)
        where |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def each(make, names, stem="mlp.experts", prefix="model"):
    """One tensor per expert and projection: ``make(out, in)`` -> leaf -> tensor."""
    shapes = {names[0]: (I, H), names[-1]: (H, I)} | ({names[1]: (I, H)} if names[2:] else {})
    return {
        f"{prefix}.layers.{LAYER}.{stem}.{e}.{name}.{leaf}": value
        for e in range(E)
        for name, shape in shapes.items()
        for leaf, value in make(*shape).items()
    }


def bf16(out, width):
    return {"weight": torch.randn(out, width).bfloat16()}


def deepseek(out, width):
    scales = torch.rand(-(-out // 128), -(-width // 128)) + 0.1
    return {"weight": torch.randn(out, width).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def modelopt(out, width):
    packed, groups = nvfp4.quantise(torch.randn(out, width), torch.tensor(4 / 2688))
    return {
        "weight": packed,
        "weight_scale": groups,
        "weight_scale_2": torch.rand(()) * 1e-4 + 1e-5,
        "input_scale": torch.rand(()) * 1e-3 + 1e-4,
    }


def equal_scales(tensors):
    """Gate and up of an expert with one weight_scale_2, as ModelOpt writes them for MoE."""
    return {
        name: tensors[name.replace(f"{UP}.weight_scale_2", f"{GATE}.weight_scale_2")].clone()
        for name in tensors
    }


def get(tensors, expert, name, leaf="weight", stem="mlp.experts"):
    return tensors[f"model.layers.{LAYER}.{stem}.{expert}.{name}.{leaf}"]


def same(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("experts", [[], [2], [3, 0, 3]])
@pytest.mark.parametrize(
    ("names", "stem"),
    [((GATE, UP, DOWN), "mlp.experts"), (("w1", "w3", "w2"), "block_sparse_moe.experts")],
)
def test_qwen_and_mixtral(tmp_path, names, stem, experts):
    tensors = each(bf16, names, stem)
    got = load_experts(publish(tmp_path, tensors), LAYER, experts, config())
    assert got["w1"].shape == (len(experts), I, H)
    for slot, e in enumerate(experts):
        for mine, name in zip(("w1", "w3", "w2"), names, strict=True):
            assert same(got[mine][slot], get(tensors, e, name, stem=stem))


def test_nemotron_has_no_gate(tmp_path):
    tensors = each(bf16, (UP, DOWN), "mixer.experts", prefix="backbone")
    folder = publish(tmp_path, tensors)
    got = load_experts(folder, LAYER, [1], config(activation="relu2"))
    assert same(got["w1"][0], tensors[f"backbone.layers.{LAYER}.mixer.experts.1.{UP}.weight"])
    assert same(got["w2"][0], tensors[f"backbone.layers.{LAYER}.mixer.experts.1.{DOWN}.weight"])
    with pytest.raises(ValueError, match="config.gated is True"):
        load_experts(folder, LAYER, [1], config())


def test_biases_per_expert_are_loaded_or_refused_never_dropped(tmp_path):
    tensors = each(lambda o, w: bf16(o, w) | {"bias": torch.randn(o).bfloat16()}, (GATE, UP, DOWN))
    folder = publish(tmp_path, tensors)
    got = load_experts(folder, LAYER, [2], config(bias=True))
    for mine, name in (("b1", GATE), ("b3", UP), ("b2", DOWN)):
        assert same(got[mine][0], get(tensors, 2, name, "bias"))
    with pytest.raises(ValueError, match="config.bias is False"):
        load_experts(folder, LAYER, [2], config())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_deepseek_fp8(tmp_path, scale_dtype):
    """DeepSeek writes the scales in fp32, Qwen's fp8 checkpoints in bf16."""
    tensors = {
        n: t.to(scale_dtype) if n.endswith("_inv") else t
        for n, t in each(deepseek, (GATE, UP, DOWN)).items()
    }
    got = load_experts(publish(tmp_path, tensors), LAYER, [3, 1], config("fp8"))
    for slot, e in enumerate((3, 1)):
        for mine, name in (("w1", GATE), ("w3", UP), ("w2", DOWN)):
            assert same(got[mine][slot], get(tensors, e, name))
            scale = get(tensors, e, name, "weight_scale_inv").float()
            assert same(got[mine + "_scale"][slot], scale)


def gpt_oss():
    """Published bytes, and what each expert's gate, up and down are, row by row."""

    def made(*shape):
        return torch.randint(0, 255, shape, dtype=torch.uint8)

    stem = f"model.layers.{LAYER}.mlp.experts."
    return {
        stem + "gate_up_proj_blocks": made(E, 2 * I, H // 32, 16),
        stem + "gate_up_proj_scales": made(E, 2 * I, H // 32),
        stem + "gate_up_proj_bias": torch.randn(E, 2 * I).bfloat16(),
        stem + "down_proj_blocks": made(E, H, I // 32, 16),
        stem + "down_proj_scales": made(E, H, I // 32),
        stem + "down_proj_bias": torch.randn(E, H).bfloat16(),
    }


@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_gpt_oss_mxfp4_has_gate_and_up_in_turns(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("epmoe.shards.PIECE", piece)
    tensors = gpt_oss()
    c = config("mxfp4", activation="gpt_oss", bias=True)
    got = load_experts(publish(tmp_path, tensors), LAYER, [1, 3], c)
    both, down = (f"model.layers.{LAYER}.mlp.experts.{n}_proj_" for n in ("gate_up", "down"))
    for slot, e in enumerate((1, 3)):
        for row in range(I):
            for mine, bias, k in (("w1", "b1", 2 * row), ("w3", "b3", 2 * row + 1)):
                assert same(got[mine][slot, row], tensors[both + "blocks"][e, k].flatten())
                assert same(got[mine + "_scale"][slot, row], tensors[both + "scales"][e, k])
                assert same(got[bias][slot, row], tensors[both + "bias"][e, k])
        assert same(got["w2"][slot], tensors[down + "blocks"][e].flatten(1))
        assert same(got["w2_scale"][slot], tensors[down + "scales"][e])
        assert same(got["b2"][slot], tensors[down + "bias"][e])


def test_gpt_oss_values_are_those_of_the_published_recipe(tmp_path):
    """Low half first, value * 2**(scale - 127): written out, not by the format's own functions."""
    tensors = gpt_oss()
    stem = f"model.layers.{LAYER}.mlp.experts."
    tensors[stem + "gate_up_proj_scales"] = torch.randint(110, 130, (E, 2 * I, H // 32)).byte()
    c = config("mxfp4", activation="gpt_oss", bias=True)
    got = load_experts(publish(tmp_path, tensors), LAYER, [2], c)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    blocks = tensors[stem + "gate_up_proj_blocks"][2].long()
    values = torch.empty(2 * I, H // 32, 32)
    values[..., 0::2] = table[blocks & 15]
    values[..., 1::2] = table[blocks >> 4]
    values = torch.ldexp(values, tensors[stem + "gate_up_proj_scales"][2].int()[..., None] - 127)
    w1, w3, _ = format_of(c).operands(c, got, 0)
    assert torch.equal(w1, values.flatten(1)[0::2])
    assert torch.equal(w3, values.flatten(1)[1::2])


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("in_turns", [True, False])
@pytest.mark.parametrize("sizes", [(24, 10), (20, 10), (10, 10)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fused_bf16_either_way_round(tmp_path, monkeypatch, piece, turned, in_turns, sizes, dtype):
    """(20, 10) and (10, 10) make one of the two matrices square: the other one tells."""
    monkeypatch.setattr("epmoe.shards.PIECE", piece)
    h, i = sizes
    gate, up, down = torch.randn(E, i, h), torch.randn(E, i, h), torch.randn(E, h, i)
    gate, up, down = gate.bfloat16(), up.bfloat16(), down.bfloat16()
    both = torch.stack((gate, up), 2).view(E, 2 * i, h) if in_turns else torch.cat((gate, up), 1)
    stem = f"model.layers.{LAYER}.mlp.experts."
    tensors = {
        stem + "gate_up_proj": (both.mT if turned else both).contiguous(),
        stem + "down_proj": (down.mT if turned else down).contiguous(),
    }
    if in_turns:  # only gpt-oss has biases, only gpt-oss puts gate and up in turns
        tensors[stem + "gate_up_proj_bias"] = torch.randn(E, 2 * i).bfloat16()
        tensors[stem + "down_proj_bias"] = torch.randn(E, h).bfloat16()
    c = config(hidden=h, inner=i, bias=in_turns, dtype=dtype)
    got = load_experts(publish(tmp_path, tensors), LAYER, [2, 0], c)
    for slot, e in enumerate((2, 0)):
        for mine, want in (("w1", gate), ("w3", up), ("w2", down)):
            assert same(got[mine][slot], want[e].to(got[mine].dtype))
        if in_turns:
            bias = tensors[stem + "gate_up_proj_bias"][e].to(got["b1"].dtype)
            assert same(got["b1"][slot], bias[0::2])
            assert same(got["b3"][slot], bias[1::2])
            assert same(got["b2"][slot], tensors[stem + "down_proj_bias"][e].to(got["b2"].dtype))


@pytest.mark.parametrize("mode", ["dtype", "format"])
def test_modelopt_nvfp4(tmp_path, mode):
    tensors = equal_scales(each(modelopt, (GATE, UP, DOWN)))
    got = load_experts(
        publish(tmp_path, tensors), LAYER, [3, 0], config("nvfp4", activations_in=mode)
    )
    rows = max(get(tensors, e, n, "input_scale") for e in range(E) for n in (GATE, UP))
    for slot, e in enumerate((3, 0)):
        for mine, name in (("w1", GATE), ("w3", UP), ("w2", DOWN)):
            assert same(got[mine][slot], get(tensors, e, name))
            assert same(got[mine + "_scale"][slot], get(tensors, e, name, "weight_scale"))
        first, second = (get(tensors, e, n, "weight_scale_2") for n in (GATE, DOWN))
        if mode == "dtype":
            assert (got["alpha1"][slot], got["alpha2"][slot]) == (first, second)
            assert "input_scale" not in got
        else:
            mid = get(tensors, e, DOWN, "input_scale")
            assert got["input_scale"][slot] == rows
            assert got["mid_scale"][slot] == mid
            assert (got["alpha1"][slot], got["alpha2"][slot]) == (rows * first, mid * second)


def test_every_rank_finds_the_same_input_scale(tmp_path):
    folder = publish(tmp_path, equal_scales(each(modelopt, (GATE, UP, DOWN))))
    c = config("nvfp4", activations_in="format")
    found = {load_experts(folder, LAYER, [e], c)["input_scale"].item() for e in range(E)}
    assert len(found) == 1


def test_unequal_gate_and_up_scales_are_refused_or_requantised_by_name(tmp_path):
    tensors = each(modelopt, (GATE, UP, DOWN))
    folder, c = publish(tmp_path, tensors), config("nvfp4")
    with pytest.raises(ValueError, match=r"weight_scale_2 of .*gate_proj.*requantise"):
        load_experts(folder, LAYER, [1], c)
    with pytest.raises(ValueError, match="unequal_scales must be one of"):
        load_experts(folder, LAYER, [1], c, unequal_scales="ignore")
    got = load_experts(folder, LAYER, [1], c, unequal_scales="requantise")
    scales = [get(tensors, 1, n, "weight_scale_2") for n in (GATE, UP)]
    assert got["alpha1"][0] == max(scales)
    for mine, name, scale in zip(("w1", "w3"), (GATE, UP), scales, strict=True):
        groups = get(tensors, 1, name, "weight_scale")
        want = nvfp4.dequantise(get(tensors, 1, name), groups) * scale
        kept = nvfp4.dequantise(got[mine][0], got[mine + "_scale"][0]) * got["alpha1"][0]
        # The larger scale keeps its bytes; the smaller rounds its group scales once more (2**-4).
        assert (kept - want).norm() <= (0 if scale == max(scales) else 0.1) * want.norm()


def test_a_missing_tensor_is_named_with_its_place(tmp_path):
    tensors = equal_scales(each(modelopt, (GATE, UP, DOWN)))
    gone = f"model.layers.{LAYER}.mlp.experts.2.{DOWN}.input_scale"
    folder = publish(tmp_path, {n: t for n, t in tensors.items() if n != gone})
    load_experts(folder, LAYER, [2], config("nvfp4"))  # weight-only has no use for it
    with pytest.raises(ValueError, match=re.escape(gone)):
        load_experts(folder, LAYER, [2], config("nvfp4", activations_in="format"))


def test_what_the_config_says_otherwise_is_refused(tmp_path):
    folder = publish(tmp_path, each(bf16, (GATE, UP, DOWN)))
    with pytest.raises(ValueError, match="config.format is 'fp8', .* has 'plain'"):
        load_experts(folder, LAYER, [0], config("fp8"))
    with pytest.raises(
        ValueError, match=r"gate_proj.weight' in .*safetensors must be .*\(96, 192\)"
    ):
        load_experts(folder, LAYER, [0], config(hidden=192))
    with pytest.raises(ValueError, match="experts must be 0 to 3"):
        load_experts(folder, LAYER, [4], config())
    with pytest.raises(ValueError, match="no experts in layer 7"):
        load_experts(folder, 7, [0], config())


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "g_idx"])
def test_an_unknown_family_is_refused_by_its_names(tmp_path, leaf):
    folder = publish(
        tmp_path, each(lambda o, w: bf16(o, w) | {leaf: torch.ones(1)}, (GATE, UP, DOWN))
    )
    with pytest.raises(ValueError, match=f"no known family.*{leaf}"):
        family_of(Folder(folder), LAYER)


def test_two_stacks_of_layers_are_told_apart_by_name(tmp_path):
    tensors = each(bf16, (GATE, UP, DOWN)) | each(bf16, (GATE, UP, DOWN), prefix="mtp")
    folder = publish(tmp_path, tensors)
    with pytest.raises(ValueError, match="name one by within"):
        load_experts(folder, LAYER, [0], config())
    got = load_experts(folder, LAYER, [0], config(), within="mtp.")
    assert same(got["w1"][0], tensors[f"mtp.layers.{LAYER}.mlp.experts.0.{GATE}.weight"])


def test_only_the_bytes_of_these_experts_are_read(tmp_path):
    folder = Folder(publish(tmp_path, equal_scales(each(modelopt, (GATE, UP, DOWN))), shards=1))
    got = load_experts(folder, LAYER, [1, 2], config("nvfp4"))
    headers = folder.bytes_read - sum(t.nbytes for t in got.values())
    # What is left is the index, one header, and the second of each pair of equal scalars.
    index = (folder.folder / INDEX).stat().st_size
    [file] = folder.folder.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert headers == index + header + 2 * 4


PEAK = """
import pathlib, re, sys, torch
from epmoe.checkpoint import load_experts
from epmoe.config import MoEConfig
folder, format_name, activation, bias = sys.argv[1:]
config = MoEConfig(experts=4, choices=1, hidden=2048, inner=2048, max_rows=1, format=format_name,
                   activation=activation, bias=bias == "True")

def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(key + r":\\s+(\\d+)", text)[1]) * 1024

load_experts(folder, 3, [1], config)  # code pages that come in once per process come in now
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
weights = load_experts(folder, 3, [0, 2], config)
print(status("VmHWM") - before, sum(t.nbytes for t in weights.values()))
"""


@pytest.mark.parametrize("family", ["qwen", "gpt-oss", "gpt-oss in bf16"])
def test_the_peak_is_what_is_kept_and_less_than_a_tenth_more(tmp_path, monkeypatch, family):
    """Resident memory of a fresh process, file pages included; only the page cache is left out."""
    monkeypatch.setitem(globals(), "H", 2048)
    monkeypatch.setitem(globals(), "I", 2048)
    stem = f"model.layers.{LAYER}.mlp.experts."
    if family == "qwen":
        tensors, settings = each(bf16, (GATE, UP, DOWN)), ("plain", "swiglu", "False")
    elif family == "gpt-oss":
        tensors, settings = gpt_oss(), ("mxfp4", "gpt_oss", "True")
    else:
        tensors = {n: t for n, t in gpt_oss().items() if n.endswith("bias")}
        tensors[stem + "gate_up_proj"] = torch.randn(E, H, 2 * I).bfloat16()
        tensors[stem + "down_proj"] = torch.randn(E, I, H).bfloat16()
        settings = ("plain", "gpt_oss", "True")
    publish(tmp_path, tensors)
    command = [sys.executable, "-c", PEAK, str(tmp_path), *settings]
    # What the first load freed must be gone, not kept by malloc for the second.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    peak, kept = map(int, done.stdout.split())
    assert kept <= peak <= 1.1 * kept
