"""The routing kernel compiles without spills, refuses by name, and is the host's twin on a GPU."""

import pytest
import torch

pytest.importorskip("cuda.core")
from epmoe.kernels.route import compiled, launch, outputs
from epmoe.sched.placement import Placement
from epmoe.sched.route import Router, route

DEEPSEEK = Router(choices=8, score="sigmoid", groups=8, keep=4, renormalise=True, scale=2.5)
SHAPES = [  # router, experts, bias
    (DEEPSEEK, 256, True),
    (Router(choices=22, score="sigmoid", renormalise=True, scale=5.0), 512, True),
    (Router(choices=16, score="sigmoid", renormalise=True), 896, True),
    (Router(choices=8, renormalise=True), 128, False),
    (Router(choices=6, scale=1.5), 64, True),
    (Router(choices=2, score="softmax_chosen"), 8, False),
    (Router(choices=4, score="softmax_chosen"), 37, True),
    (Router(choices=32), 1024, False),
    (Router(choices=32, score="sigmoid", groups=32, keep=16), 1024, True),
    (Router(choices=5, score="sigmoid", groups=3, keep=2), 99, True),
    (Router(choices=1, score="sigmoid"), 1, False),
]
NAMES = [f"{r.score}-{e}-{r.choices}-{r.groups}" for r, e, _ in SHAPES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("router", "experts", "bias"), SHAPES, ids=NAMES)
def test_compiles_without_spills(router, experts, bias):
    for dtype in DTYPES:
        for aligned in (16, 2):
            for gather in (False, True)[: 1 + (experts <= 256)]:
                kernel = compiled(router, experts, dtype, bias=bias, aligned=aligned, gather=gather)
                assert kernel.resources.spills == 0
                assert " 0 bytes stack frame" in kernel.log


def test_what_the_kernel_refuses():
    for words, router, experts in (
        ("experts must be at most 1024", Router(choices=2), 1025),
        ("groups must be at most 32", Router(choices=2, score="sigmoid", groups=64), 512),
        ("experts per lane", Router(choices=2, score="sigmoid", groups=17), 17 * 60),
    ):
        with pytest.raises(ValueError, match=words):
            compiled(router, experts, torch.float32, bias=False)
    with pytest.raises(ValueError, match="must be on a GPU"):
        launch(torch.zeros(2, 8), Router(choices=2))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("router", "experts", "bias"), SHAPES, ids=NAMES)
def test_a_hundred_thousand_rows_have_the_bits_of_the_host(router, experts, bias, dtype):
    rows = 100_000 if experts <= 256 and dtype != torch.float16 else 10_000
    x, bias_E = rough(rows, experts, bias, dtype)
    place = Placement.linear(experts, experts + 7, 1)
    tables = {"replicas_EX": place.replicas_EX, "counts_E": place.counts_E}
    loads = torch.full((experts,), 3, dtype=torch.int64)
    there = {n: t.cuda() for n, t in {**tables, "loads_E": loads}.items()}
    want = route(x, router, bias_E=bias_E, first=1000, loads_E=loads, **tables)
    bias_there = None if bias_E is None else bias_E.cuda()
    out = poisoned(outputs(x.cuda(), router, slots=True))
    got = launch(x.cuda(), router, bias_E=bias_there, first=1000, out=out, **there)
    same(got, want)
    assert torch.equal(there["loads_E"].cpu(), loads)
    plain = launch(x.cuda(), router, bias_E=bias_there)
    assert plain.slots_TK is None
    assert torch.equal(plain.ids_TK, got.ids_TK)
    assert torch.equal(plain.weights_TK, got.weights_TK)
    same(route(x.cuda(), router, bias_E=bias_there, first=1000, **there), want)  # host form there


@gpu
@pytest.mark.gpu
def test_any_number_of_rows_and_any_alignment():
    x, bias_E = rough(40, 256, True, torch.bfloat16)
    flat = torch.empty(40 * 256 + 8, dtype=x.dtype, device="cuda")
    for rows in (0, 1, 3, 4, 5, 33):
        for off in (0, 1, 2, 4):  # of two bytes each
            part = flat[off : off + rows * 256].view(rows, 256)
            part.copy_(x[:rows])
            same(
                launch(part, DEEPSEEK, bias_E=bias_E.cuda()),
                route(x[:rows], DEEPSEEK, bias_E=bias_E),
            )


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1023, 1024, 1025, 1031])
def test_choices_are_counted_once_however_they_are_gathered(rows):
    x, bias_E = rough(rows, 256, True, torch.float32)
    live = torch.tensor([rows - 2], dtype=torch.int32)
    want, got = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64).cuda()
    route(x, DEEPSEEK, bias_E=bias_E, live=live, loads_E=want)
    for _ in range(3):
        launch(x.cuda(), DEEPSEEK, bias_E=bias_E.cuda(), live=live.cuda(), loads_E=got)
    assert torch.equal(got.cpu(), want * 3)


@gpu
@pytest.mark.gpu
def test_a_captured_launch_follows_its_inputs_and_tables():
    x, bias_E = rough(64, 256, True, torch.float32)
    there = x.cuda(), bias_E.cuda()
    a, b = (Placement.of(torch.arange(264).roll(i) % 256, experts=256, ranks=8) for i in (0, 9))
    tables = {"replicas_EX": a.replicas(3).cuda(), "counts_E": a.counts_E.cuda()}
    live = torch.tensor([64], dtype=torch.int32, device="cuda")
    loads = torch.zeros(256, dtype=torch.int64, device="cuda")
    out = poisoned(outputs(there[0], DEEPSEEK, slots=True))
    named = {"bias_E": there[1], "live": live, "loads_E": loads, "out": out, **tables}
    launch(there[0], DEEPSEEK, **named)
    loads.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()  # beginning a capture allocates a little
        launch(there[0], DEEPSEEK, **named)
        assert torch.cuda.memory_allocated() == before
    want_loads = torch.zeros(256, dtype=torch.int64)
    for place, rows, scale in ((a, 64, 1.0), (b, 64, 0.5), (b, 5, 2.0), (a, 0, 1.0), (a, 64, -1.0)):
        there[0].copy_(x * scale)
        tables["replicas_EX"].copy_(place.replicas(3))
        tables["counts_E"].copy_(place.counts_E)
        live.fill_(rows)
        graph.replay()
        want = route(
            x * scale,
            DEEPSEEK,
            bias_E=bias_E,
            replicas_EX=place.replicas(3),
            counts_E=place.counts_E,
            live=torch.tensor([rows], dtype=torch.int32),
            loads_E=want_loads,
        )
        same(out, want)
    assert torch.equal(loads.cpu(), want_loads)


@gpu
@pytest.mark.gpu
def test_a_broken_table_leads_nowhere():
    x, _ = rough(16, 64, False, torch.float32)
    table = torch.arange(64, dtype=torch.int32, device="cuda").unsqueeze(1)
    for count in (0, -1, 2, 1 << 30):
        counts = torch.full((64,), count, dtype=torch.int32, device="cuda")
        got = launch(x.cuda(), Router(choices=4), replicas_EX=table, counts_E=counts)
        assert (got.slots_TK == -1).all()


@gpu
@pytest.mark.gpu
def test_what_a_launch_refuses():
    x = torch.zeros(4, 64, device="cuda")
    router = Router(choices=4)
    out = outputs(x, router, slots=False)
    for error, words, logits, named in (
        (ValueError, "contiguous", torch.zeros(64, 4, device="cuda").T, {}),
        (ValueError, "bias_E must be on", x, {"bias_E": torch.zeros(64)}),
        (TypeError, "out.ids_TK", x[:3], {"out": out}),
        (ValueError, "out.slots_TK", x, {"out": outputs(x, router, slots=True)}),
    ):
        with pytest.raises(error, match=words):
            launch(logits, router, **named)


def rough(rows, experts, biased, dtype):
    """Half of the rows with ties everywhere, every eleventh with NaN, infinities and -0."""
    draw = torch.Generator().manual_seed(rows + experts)
    x = torch.randn(rows, experts, generator=draw) * 3
    x[::2] = (x[::2] * 2).round() / 2
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 6e4, -6e4, 0.0, 90.0])
    spoilt = odd[torch.randint(8, (x[::11].shape), generator=draw)]
    x[::11] = torch.where(torch.rand(spoilt.shape, generator=draw) < 0.8, spoilt, x[::11])
    bias = (torch.randn(experts, generator=draw) / 4) if biased else None
    if biased and experts > 8:
        bias[1::3] = bias[1]
        bias[2] = -float("inf")
    return x.to(dtype), bias


def poisoned(out):
    for t in (out.ids_TK, out.weights_TK, out.slots_TK):
        t.fill_(77)
    return out


def same(got, want):
    assert torch.equal(got.ids_TK.cpu(), want.ids_TK)
    assert torch.equal(got.weights_TK.cpu().view(torch.int32), want.weights_TK.view(torch.int32))
    if want.slots_TK is not None:
        assert torch.equal(got.slots_TK.cpu(), want.slots_TK)
