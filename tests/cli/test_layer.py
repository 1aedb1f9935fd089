"""The bench of whole layers: its floor, its peer's answers, what it prints and what it refuses."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ranks import HANG_S, several

from epmoe import Group, MoEConfig, reference_moe
from epmoe.cli import contest, layer, main, probes
from epmoe.cli.gloo import open_store
from epmoe.cli.nccl import Nccl
from epmoe.cli.roofline import floor
from epmoe.cli.share import share
from epmoe.comm.layout import layout
from epmoe.errors import EpmoeError
from epmoe.kernels.sizes import private_bytes
from epmoe.shapes import SHAPES, shape

PEER = contest.PEER


@pytest.mark.parametrize(
    ("name", "rows", "us", "bound"),
    [  # the table of published ceilings, eight ranks, bf16
        ("dsv3", 16, 658, "memory"),
        ("dsv3", 512, 719, "memory"),
        ("dsv3", 8192, 8893, "arithmetic"),
        ("qwen3-235b", 512, 250, "arithmetic"),
        ("qwen3-30b", 128, 51, "memory"),
        ("qwen3-30b", 2048, 250, "arithmetic"),
        ("mixtral", 128, 151, "arithmetic"),
        ("gpt-oss", 8192, 2521, "arithmetic"),
        ("kimi-k2", 16, 930, "memory"),
    ],
)
def test_the_floor_of_eight_ranks_is_the_published_one(name, rows, us, bound):
    found = floor(shape(name, max_rows=rows), 8, rows)
    assert (round(found.us), found.bound) == (us, bound)


def test_one_rank_sends_nothing_and_fewer_ranks_read_more():
    config = shape("dsv3", max_rows=128)
    assert floor(config, 1, 128).links == 0
    assert floor(config, 2, 128).memory > 1.9 * floor(config, 4, 128).memory


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shape", "gpt5"], "--shape must name dsv3"),
        (["--rows", "16,x"], "--rows must be numbers above 0"),
        (["--rows", "0"], "--rows must be numbers above 0"),
        (["--rounds", "29"], "--rounds must be at least 30, got 29"),
        (["--skew", "-1"], "--skew must be at least 0, got -1.0"),
        (["--json", "/no/such/r.json"], "--json must lie in a folder that exists, got '/no/such/"),
        (["--csv", "/no/such/r.csv"], "--csv must lie in a folder that exists"),
        (["--plot", "/no/such/r.png"], "--plot must lie in a folder that exists"),
    ],
)
def test_a_wrong_argument_is_named(capsys, argv, said):
    assert main(["bench", "layer", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["layer"], ["transport", "--heap", "cuda"]])
def test_without_a_gpu_it_says_so(monkeypatch, capsys, argv):
    monkeypatch.setattr(contest, "ask_driver", lambda: {"error": "libcuda.so.1 is not here"})
    assert main(["bench", *argv]) == 1
    assert "no GPU here: libcuda.so.1 is not here" in capsys.readouterr().err
    assert callable(probes.ask_driver)


@pytest.fixture
def faked(monkeypatch):
    """The verb on two ranks without GPUs: everything but the contest itself."""

    def run(config, group, weights, drawn, rounds, without):
        assert (weights, drawn) == (config.experts, config.experts)
        if config.max_rows == 666:
            raise EpmoeError("lost in the middle")
        us = {"split": {"median": 100.0, "p10": 90.0, "p90": 110.0}}
        return contest.Entry(us, {"pull": {"median": 1.0}}, 0.0, config.experts, {"heap": 1})

    monkeypatch.setattr(contest, "gpus", lambda: 2)
    monkeypatch.setattr(contest, "ready", lambda group: nullcontext())
    monkeypatch.setattr(contest, "check_memory", lambda config, ranks: None)
    monkeypatch.setattr(contest, "weights", lambda config, group, seed: config.experts)
    make = classmethod(lambda cls, config, group, rows, *, skew, seed: config.experts)
    monkeypatch.setattr(contest.Drawn, "make", make)
    monkeypatch.setattr(contest, "run", run)


def test_the_load_of_eight_is_called_so_wherever_it_is_read(faked, capfd, tmp_path):
    out = tmp_path / "r.json"
    said = ["--json", str(out), "--csv", str(tmp_path / "r.csv")]
    assert main(["bench", "layer", "--shape", "all", "--rows", "128", "--load-of", "8", *said]) == 0
    made = json.loads(out.read_text())
    assert (made["ranks"], made["load_of"]) == (2, 8)
    assert made["warning"][0] == "NOT a layer on 8 GPUs: the load of one rank of 8, on 2"
    assert [e["shape"] for e in made["entries"]] == [f"{name} load-of-8" for name in SHAPES]
    run = share(shape("dsv3", max_rows=128), 2, 8)
    assert made["entries"][0]["experts"] == made["entries"][0]["busiest"] == 64 == run.experts
    assert made["entries"][0]["floor_us"] == round(floor(run, 2, 128).us, 1)
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert lines[1].startswith("dsv3 load-of-8,128,2,8,64,bf16,")
    printed = capfd.readouterr().out
    assert "dsv3 load-of-8 128 rows: floor" in printed
    assert printed.count("NOT 8 GPUs") == 2


def test_without_it_the_layer_is_whole(faked, capfd, tmp_path):
    argv = ["bench", "layer", "--rows", "16", "--json", str(tmp_path / "r.json")]
    assert main(argv) == 0
    made = json.loads((tmp_path / "r.json").read_text())
    assert (made["ranks"], made["load_of"], made["warning"]) == (2, 2, [])
    assert [(e["shape"], e["experts"]) for e in made["entries"]] == [("qwen3-30b", 128)]
    assert "NOT" not in capfd.readouterr().out


def test_what_was_measured_is_kept_if_the_rest_fails(faked, capfd, tmp_path):
    argv = ["bench", "layer", "--rows", "16,666", "--json", str(tmp_path / "r.json")]
    assert main(argv) == 1
    assert [e["rows"] for e in json.loads((tmp_path / "r.json").read_text())["entries"]] == [16]
    assert "lost in the middle" in capfd.readouterr().err


def test_a_load_of_fewer_ranks_is_refused_before_a_gpu_is_taken(faked, monkeypatch, capfd):
    monkeypatch.setattr(contest, "ready", lambda group: pytest.fail("took a GPU"))
    assert main(["bench", "layer", "--load-of", "1"]) != 0
    assert "--load-of must be at least the number of ranks (2), got 1" in capfd.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(layer, "find_spec", lambda name: None)
    assert main(["bench", "layer", "--plot", "r.png"]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_help_says_that_a_part_is_not_the_whole(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "layer", "--help"])
    out = capsys.readouterr().out
    assert "IT IS NOT THE LAYER ON N\nGPUs" in out
    assert "(R-1)/R of the choices cross NVLink" in out


def test_memory_is_the_slab_and_what_the_fused_round_keeps():
    config = shape("dsv3", max_rows=8192, heap="cuda")
    found = contest.memory(config, 8)
    assert found == {"heap": layout([config], 8).total, "private": private_bytes(config, 8)}


def test_a_layer_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 << 30, 140 << 30))
    contest.check_memory(shape("dsv3", max_rows=128), 8)
    with pytest.raises(EpmoeError, match=r"needs about \d+ GiB of each GPU, 40 GiB are free"):
        contest.check_memory(shape("dsv3", max_rows=8192), 2)


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation": "gpt_oss", "bias": True, "clamp": 1.0}, {"activation": "relu2"}],
)
def test_the_peer_computes_the_layer(fields):
    """On gloo: the same calls, the same order of rows; its sums are in bf16, so not bit by bit."""
    config = MoEConfig(experts=8, choices=2, hidden=64, inner=32, max_rows=24, **fields)
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * 0.2).bfloat16()

    weights = {"w1": draw(8, 32, 64), "w2": draw(8, 64, 32)}
    weights |= {"w3": draw(8, 32, 64)} if config.gated else {}
    if config.bias:
        weights |= {"b1": draw(8, 32), "b3": draw(8, 32), "b2": draw(8, 64)}
    x_R = [draw(n, 64) * 5 for n in (24, 17)]
    ids_R = [torch.rand(len(x), 8, generator=g).topk(2).indices for x in x_R]
    weights_R = [torch.rand(len(x), 2, generator=g).bfloat16().float() for x in x_R]
    want = reference_moe(x_R, ids_R, weights_R, weights, config)

    def body(rank):
        with Group.from_env() as group:
            store = open_store(0, serve=True) if rank == 0 else None
            said = group.allgather(
                str(store.port).encode() if store else b"", what="port", limit_s=HANG_S
            )
            store = store or open_store(int(said[0]), serve=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            mine = {n: w[4 * rank : 4 * rank + 4] for n, w in weights.items()}
            y = Nccl(config, group, mine)(x_R[rank], ids_R[rank], weights_R[rank])
            dist.destroy_process_group()
        return float((y.float() - want[rank].float()).norm() / want[rank].float().norm())

    for outcome in several(2, body):
        assert outcome.result < 1e-2  # bf16 products and sums; a wrong order gives above 1


def test_ours_must_have_the_same_bits_and_the_peer_must_be_near():
    g = torch.Generator().manual_seed(1)
    y = torch.randn(4, 8, generator=g).bfloat16()
    near = (y.float() * 1.004).bfloat16()
    assert 1e-4 < contest._apart({"split": y, "fused": y.clone(), PEER: near}, 0) < 1e-2
    with pytest.raises(EpmoeError, match="rank 3: fused and split give different bits"):
        contest._apart({"split": y, "fused": near, PEER: near}, 3)
    with pytest.raises(EpmoeError, match="rank 0: split and nccl.* differ by"):
        contest._apart({"split": y, PEER: y.roll(1, 0)}, 0)
    with pytest.raises(EpmoeError, match="differ by nan"):
        contest._apart({"split": y, PEER: y * float("nan")}, 0)
