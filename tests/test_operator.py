"""torch.compile keeps a forward as one operator: same bits, no break, none left out."""

import pytest
import torch

from epmoe import EpmoeError, ForwardContext, Group, MoE, MoEConfig

CONFIG = MoEConfig(experts=4, choices=2, hidden=64, inner=32, max_rows=8, dtype="fp32")
BACKENDS = ["eager", "aot_eager", "inductor"]


def loaded(group, **changed):
    moe = MoE.open(CONFIG, group)
    slots = CONFIG.slots_per_rank(group.size)
    g = torch.Generator().manual_seed(group.rank)
    moe.load(
        w1=torch.randn(slots, 32, 64, generator=g),
        w3=torch.randn(slots, 32, 64, generator=g),
        w2=torch.randn(slots, 64, 32, generator=g),
    )
    return moe


def batch(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, CONFIG.experts, generator=g).topk(CONFIG.choices).indices
    return torch.randn(rows, 64, generator=g), ids, torch.rand(rows, 2, generator=g)


@pytest.fixture
def alone():
    torch.compiler.reset()
    with Group.alone() as group, loaded(group) as moe:
        yield moe
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_holds_the_layer_and_gives_its_bits(alone, backend):
    def model(x, ids, weights):
        return alone(x * 2, ids, weights) + x

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (8, 3, 0, 5):
        one = batch(rows, seed=rows)
        assert torch.equal(compiled(*one), model(*one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_whose_result_nobody_reads_is_run_all_the_same(alone, backend):
    def model(x, ids, weights):
        alone(x, ids, weights)
        return x + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(*batch(5))
    assert alone.loads().sum() == 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_equal_forwards_are_two_rounds(alone, backend):
    def model(x, ids, weights):
        return alone(x, ids, weights) + alone(x, ids, weights)

    torch.compile(model, fullgraph=True, backend=backend)(*batch(5))
    assert alone.loads().sum() == 20


def test_what_a_forward_knows_goes_with_it(alone):
    context = ForwardContext(phase="decode", rows=(20,))
    one = batch(20)

    def model(x, ids, weights):
        return alone(x, ids, weights, context=context)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*one), model(*one)), "20 rows are 3 chunks of 8"
    piece = context.chunked(8)[1]

    def cut(x, ids, weights):
        return alone(x, ids, weights, context=piece)

    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*batch(7)), cut(*batch(7)))


def test_row_counts_that_change_compile_twice_and_no_more(alone):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def model(x, ids, weights, context):
        return alone(x, ids, weights, context=context)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (5, 9, 20, 3, 7):
        known = ForwardContext(rows=(rows,))
        assert torch.equal(compiled(*batch(rows), known), model(*batch(rows), known))
    assert len(graphs) == 2


def test_the_call_is_a_proper_operator(alone):
    torch.library.opcheck(torch.ops.epmoe.forward, (*batch(5), alone.number, 0))
    rest = ("decode", [5], [0, 0, 1], None)
    torch.library.opcheck(torch.ops.epmoe.forward, (*batch(5), alone.number, 0, *rest))


def test_a_refused_batch_raises_what_it_raises_without_a_graph(alone):
    compiled = torch.compile(lambda *one: alone(*one), fullgraph=True, backend="aot_eager")
    x, ids, weights = batch(5)
    with pytest.raises(TypeError, match="rank 0: x must be"):
        compiled(x.double(), ids, weights)
    assert torch.equal(compiled(x, ids, weights), alone(x, ids, weights))


def test_a_graph_that_outlives_its_layer_says_so():
    with Group.alone() as group:
        number = loaded(group).number
    with pytest.raises(EpmoeError, match=f"layer {number} .* is gone"):
        torch.ops.epmoe.forward(*batch(5), number, 0)
