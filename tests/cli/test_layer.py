"""The bench of whole layers: its floor, its peer's answers, what it prints and what it refuses."""

import csv
import json

import pytest
import torch
import torch.distributed as dist
from ranks import HANG_S, several

from epmoe import Group, MoEConfig, reference_moe
from epmoe.cli import contest, layer, main, probes
from epmoe.cli.gloo import open_store
from epmoe.cli.nccl import Nccl
from epmoe.cli.roofline import floor
from epmoe.comm.layout import layout
from epmoe.errors import EpmoeError
from epmoe.kernels.sizes import private_bytes
from epmoe.shapes import shape

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


def report(ranks=2):
    entries = [
        {
            "shape": name,
            "rows": rows,
            "floor_us": 50.0,
            "bound": "memory",
            "us": {
                "split": {"median": 100.0 + rows, "p10": 90.0, "p90": 110.0},
                PEER: {"median": 400.0, "p10": 390.0, "p90": 410.0},
            },
            "verbs_us": {verb: {"median": 20.0} for verb in ("stage", "pull", "experts")},
        }
        for name in ("qwen3-30b", "mixtral")
        for rows in (16, 100)
    ]
    head = {"ranks": ranks, "format": "bf16", "skew": 0.0, "rounds": 30, "date": "2026-01-01"}
    return head | {"gpu": "a GPU", "machine": {"cores": "2 cores"}, "entries": entries}


def test_csv_has_a_line_for_each_contestant():
    lines = list(csv.DictReader(layer.lines_of(report())))
    assert len(lines) == 8
    assert lines[2] | {"contestant": ""} == {
        "shape": "qwen3-30b",
        "rows": "100",
        "ranks": "2",
        "format": "bf16",
        "skew": "0.0",
        "contestant": "",
        "median_us": "200.0",
        "p10_us": "90.0",
        "p90_us": "110.0",
        "floor_us": "50.0",
    }


def test_the_table_has_the_ratio_to_the_peer_and_to_the_floor(capsys):
    layer.print_tables(report())
    line = next(x for x in capsys.readouterr().out.splitlines() if "mixtral" in x and "100" in x)
    assert line.split() == ["mixtral", "100", "50", "200", "400", "0.50", "4.00"]


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    layer.plot(report(), tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shape", "gpt5"], "--shape must name dsv3"),
        (["--rows", "16,x"], "--rows must be numbers above 0"),
        (["--rows", "0"], "--rows must be numbers above 0"),
        (["--rounds", "29"], "--rounds must be at least 30, got 29"),
        (["--skew", "-1"], "--skew must be at least 0, got -1.0"),
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


def test_json_holds_every_entry(tmp_path, monkeypatch):
    made = report()
    args = type("Args", (), {"json": str(tmp_path / "r.json"), "csv": None, "plot": None})
    layer._publish(made, args)
    assert json.loads((tmp_path / "r.json").read_text()) == made


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
