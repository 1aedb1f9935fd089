"""Routing against loops that share no code with it: same ids, same bits of every weight."""

import numpy as np
import pytest
import torch

from epmoe.sched.placement import Placement, choose_slots
from epmoe.sched.route import Router, route
from epmoe.sched.score import exp, sigmoid

F = np.float32
ROUTERS = {
    "softmax": (Router(choices=3), 40, False),
    "softmax renormalised": (Router(choices=4, renormalise=True), 33, False),
    "softmax with bias": (Router(choices=3, renormalise=True, scale=1.5), 70, True),
    "softmax of the chosen": (Router(choices=2, score="softmax_chosen"), 8, False),
    "softmax of the chosen with bias": (Router(choices=4, score="softmax_chosen"), 12, True),
    "sigmoid": (Router(choices=1, score="sigmoid"), 16, False),
    "sigmoid with bias": (
        Router(choices=6, score="sigmoid", renormalise=True, scale=5.0),
        20,
        True,
    ),
    "noaux_tc": (
        Router(choices=4, score="sigmoid", groups=4, keep=2, renormalise=True, scale=2.5),
        24,
        True,
    ),
    "noaux_tc of three groups": (Router(choices=5, score="sigmoid", groups=3, keep=2), 15, True),
}


def test_vector_a4():
    x = [2, 1, 0, -1, 0.5, 0.4, 0.3, 0.2, 3, -3, -3, -3, 1.5, 1.4, -2, -2]
    bias = torch.zeros(16)
    bias[[5, 6]] = 0.3
    router = Router(choices=4, score="sigmoid", groups=4, keep=2, renormalise=True, scale=2.5)
    got = route(torch.tensor([x]), router, bias_E=bias)
    assert got.ids_TK.tolist() == [[5, 6, 12, 13]]  # not 8, the best single score
    # allclose: the vector is printed with five digits
    assert np.allclose(got.weights_TK, [[0.5359, 0.5142, 0.73184, 0.71806]], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_ten_thousand_rows_equal_the_oracle(name):
    router, experts, biased = ROUTERS[name]
    for seed in range(10):
        x, bias = rough_logits(seed, 1000, experts, biased)
        got = route(
            torch.from_numpy(x), router, bias_E=None if bias is None else torch.tensor(bias)
        )
        ids, weights = oracle(x, router, bias)
        assert torch.equal(got.ids_TK, torch.from_numpy(ids)), seed
        assert torch.equal(got.weights_TK, torch.from_numpy(weights)), seed


@pytest.mark.parametrize("name", ROUTERS)
def test_no_rows_and_rows_of_nan(name):
    router, experts, biased = ROUTERS[name]
    bias = torch.zeros(experts) if biased else None
    none = route(torch.empty(0, experts), router, bias_E=bias)
    assert none.ids_TK.shape == none.weights_TK.shape == (0, router.choices)
    assert (none.ids_TK.dtype, none.weights_TK.dtype) == (torch.int32, torch.float32)
    for value in (float("nan"), float("inf"), -float("inf")):
        got = route(torch.full((2, experts), value), router, bias_E=bias)
        assert (got.ids_TK == -1).all()
        assert (got.weights_TK == 0).all()


def test_a_nan_harms_only_its_expert_and_its_row():
    router = Router(choices=2, renormalise=True)
    x = torch.tensor([[1.0, 5.0, 3.0], [1.0, float("nan"), 3.0]])
    got = route(x, router)
    assert got.ids_TK.tolist() == [[1, 2], [2, 0]]
    assert torch.equal(got.weights_TK[1], route(torch.tensor([[1.0, 3.0]]), router).weights_TK[0])


def test_fewer_finite_experts_than_choices():
    x = torch.full((1, 6), -float("inf"))
    x[0, 4] = 2.0
    got = route(x, Router(choices=3, score="sigmoid", renormalise=True, scale=2.0))
    assert got.ids_TK.tolist() == [[4, -1, -1]]
    assert got.weights_TK.tolist() == [[2.0, 0.0, 0.0]]


def test_negative_scores_do_not_lose_to_experts_outside_the_groups():
    bias = torch.full((8,), -2.0)
    bias[:4] = -1.9
    router = Router(choices=3, score="sigmoid", groups=2, keep=1)
    assert route(torch.zeros(1, 8), router, bias_E=bias).ids_TK.tolist() == [[0, 1, 2]]


def test_the_worst_group_still_beats_an_empty_one():
    x = torch.zeros(1, 8)
    x[0, :4] = float("nan")
    bias = torch.full((8,), -3.4e38)  # two of them add up to -inf
    got = route(x, Router(choices=2, score="sigmoid", groups=2, keep=1), bias_E=bias)
    assert got.ids_TK.tolist() == [[4, 5]]


def test_ties_go_to_the_lower_index_and_minus_zero_is_zero():
    x = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    for score in ("softmax", "softmax_chosen", "sigmoid"):
        assert route(x, Router(choices=3, score=score)).ids_TK.tolist() == [[0, 1, 2]]


def test_logits_that_round_to_one_probability_keep_their_order():
    x = torch.tensor([[0.0, -200.0, -199.0, -300.0]])  # the last three have the same fp32 softmax
    assert route(x, Router(choices=4)).ids_TK.tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_logits_are_widened_first(dtype):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    router = Router(choices=4, score="sigmoid", renormalise=True)
    a, b = route(x, router), route(x.float(), router)
    assert torch.equal(a.ids_TK, b.ids_TK)
    assert torch.equal(a.weights_TK, b.weights_TK)


def test_the_redundant_form_adds_slots_and_counts_and_changes_nothing_else():
    router, experts, _ = ROUTERS["noaux_tc"]
    x, _ = rough_logits(3, 500, experts, False)
    x[5] = np.nan
    x, bias = torch.from_numpy(x), torch.tensor([0.1, 0.0, -0.1]).repeat(experts // 3)
    place = Placement.linear(experts, 36, 4)
    loads = torch.full((experts,), 7, dtype=torch.int64)
    tables = {"replicas_EX": place.replicas_EX, "counts_E": place.counts_E}
    plain = route(x, router, bias_E=bias)
    got = route(x, router, bias_E=bias, loads_E=loads, **tables)
    assert torch.equal(got.ids_TK, plain.ids_TK)
    assert torch.equal(got.weights_TK, plain.weights_TK)
    flat_ids, flat_slots = got.ids_TK.flatten().tolist(), got.slots_TK.flatten().tolist()
    assert -1 in flat_ids
    for expert, slot in zip(flat_ids, flat_slots, strict=True):
        assert slot == -1 if expert < 0 else place.expert_of_S[slot] == expert
    assert loads.tolist() == [7 + flat_ids.count(e) for e in range(experts)]
    used = {s for s in flat_slots if s >= 0}
    assert used == set(range(36))  # every replica gets some


def test_the_same_token_gets_the_same_slot_on_every_rank():
    router = Router(choices=4)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    place = Placement.linear(16, 40, 2)
    tables = {"replicas_EX": place.replicas_EX, "counts_E": place.counts_E}
    whole = route(x, router, **tables)
    part = route(x[20:], router, first=20, **tables)
    assert torch.equal(whole.slots_TK[20:], part.slots_TK)
    assert torch.equal(whole.slots_TK, choose_slots(whole.ids_TK, place, tokens_T=torch.arange(50)))
    assert not torch.equal(whole.slots_TK[20:], route(x[20:], router, **tables).slots_TK)


def test_without_spare_slots_a_slot_is_the_expert():
    place = Placement.linear(16, 16, 2)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    got = route(x, Router(choices=4), replicas_EX=place.replicas_EX, counts_E=place.counts_E)
    assert torch.equal(got.slots_TK, got.ids_TK)


def test_rows_past_the_live_count_go_nowhere_and_are_not_counted():
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    loads = torch.zeros(16, dtype=torch.int64)
    live = torch.tensor([6], dtype=torch.int32)
    got, all_live = (
        route(x, Router(choices=4), live=live, loads_E=loads),
        route(x, Router(choices=4)),
    )
    assert torch.equal(got.ids_TK[:6], all_live.ids_TK[:6])
    assert (got.ids_TK[6:] == -1).all()
    assert (got.weights_TK[6:] == 0).all()
    assert loads.sum() == 24


def test_exp_and_sigmoid_are_close_to_the_truth_and_the_same_in_every_position():
    every_bf16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    z = torch.cat([every_bf16[every_bf16.abs() <= 87], torch.linspace(-87, 87, 200_001)])
    z = z.sort().values
    for mine, truth, bound in (
        (exp(z), np.exp(z.double().numpy()), 1.1),
        (sigmoid(z), 1 / (1 + np.exp(-z.double().numpy())), 2.5),
    ):
        off = np.abs(mine.double().numpy() - truth) / np.spacing(truth.astype(F))
        assert off.max() <= bound
        assert (mine[1:] >= mine[:-1]).all()  # observed on these numbers, not proven for all
    x = z[::311]
    assert torch.equal(sigmoid(x), torch.cat([sigmoid(one) for one in x.split(1)]))
    assert sigmoid(torch.tensor([-1e30, 1e30])).tolist() == [sigmoid(torch.tensor(-87.0)).item(), 1]


def test_what_a_router_refuses():
    for fault, words in (
        ({"choices": 0}, "choices must be at least 1"),
        ({"choices": 33}, "choices must be at most 32"),
        ({"choices": 2, "score": "top"}, "score"),
        ({"choices": 2, "groups": 2, "keep": 3, "score": "sigmoid"}, "keep must be at most groups"),
        ({"choices": 2, "groups": 2}, "groups must be 1"),
        ({"choices": 2, "score": "softmax_chosen", "renormalise": True}, "renormalise"),
        ({"choices": 2, "scale": float("nan")}, "scale"),
        ({"choices": 2, "scale": 0.0}, "scale"),
    ):
        with pytest.raises(ValueError, match=words):
            Router(**fault)
    with pytest.raises(TypeError, match="choices"):
        Router(choices=2.0)


def test_what_route_refuses():
    x, router = torch.zeros(3, 8), Router(choices=2)
    table, counts = torch.zeros(8, 1, dtype=torch.int32), torch.ones(8, dtype=torch.int32)
    grouped = Router(choices=3, score="sigmoid", groups=4, keep=1)
    for error, words, args, named in (
        (TypeError, "logits_TE", (x.double(), router), {}),
        (TypeError, "logits_TE", (x[0], router), {}),
        (ValueError, "choices must be at most", (x, Router(choices=9)), {}),
        (ValueError, "choices must be at most", (x, grouped), {}),
        (ValueError, "multiple of groups", (torch.zeros(3, 9), grouped), {}),
        (TypeError, "bias_E", (x, router), {"bias_E": torch.zeros(7)}),
        (TypeError, "bias_E", (x, router), {"bias_E": torch.zeros(8, dtype=torch.bfloat16)}),
        (TypeError, "loads_E", (x, router), {"loads_E": torch.zeros(8, dtype=torch.int32)}),
        (TypeError, "live", (x, router), {"live": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "together", (x, router), {"replicas_EX": table}),
        (ValueError, "counts_E", (x, router), {"replicas_EX": table, "counts_E": counts * 2}),
        (ValueError, "counts_E", (x, router), {"replicas_EX": table, "counts_E": counts * 0}),
        (ValueError, "counts_E", (x, router), {"replicas_EX": table - 1, "counts_E": counts}),
        (ValueError, "first", (x, router), {"first": -1}),
    ):
        with pytest.raises(error, match=words):
            route(*args, **named)


def rough_logits(seed, rows, experts, biased):
    """Coarse numbers, so that ties are everywhere; a tenth of the rows with NaN, inf and -0."""
    draw = np.random.default_rng(seed)
    fine = draw.standard_normal((rows, experts)).astype(F) * F(3)
    x = np.where(np.arange(rows)[:, None] % 2, np.round(fine), fine).astype(F)
    spoilt = draw.random((rows, experts)) < np.where(draw.random(rows) < 0.1, 0.7, 0.0)[:, None]
    odd = draw.choice(np.array([np.nan, np.inf, -np.inf, -0.0, 3e38, -3e38], F), (rows, experts))
    bias = draw.choice(np.array([0.0, 0.25, -0.25, -1.5, 0.1], F), experts) if biased else None
    if biased and seed % 3 == 0:
        bias[draw.integers(experts)] = [-np.inf, np.nan][seed % 2]
    return np.where(spoilt, odd, x).astype(F), bias


def oracle(x, router, bias):
    """Row by row, expert by expert, in the words of the definition."""
    ids = np.full((len(x), router.choices), -1, np.int32)
    weights = np.zeros((len(x), router.choices), F)
    with np.errstate(all="ignore"):
        scores = oracle_scores(x, router)
        select = x if router.score == "softmax" and bias is None else scores
        select = select if bias is None else select + bias
        usable = np.isfinite(x) & np.isfinite(select)
        for t in range(len(x)):
            candidates = [e for e in range(x.shape[1]) if usable[t, e]]
            by = select[t].tolist()
            if router.groups > 1:
                kept = oracle_groups(select[t], candidates, router)
                candidates = [e for e in candidates if e // (x.shape[1] // router.groups) in kept]
            chosen = []
            while candidates and len(chosen) < router.choices:
                winner = candidates[0]
                for e in candidates:
                    if by[e] > by[winner]:
                        winner = e
                chosen.append(winner)
                candidates.remove(winner)
            ids[t, : len(chosen)] = chosen
            weights[t, : len(chosen)] = oracle_weights([scores[t, e] for e in chosen], router)
    return ids, weights


def oracle_groups(select, candidates, router):
    size = len(select) // router.groups
    worth = {}
    for g in range(router.groups):
        mine = sorted((select[e] for e in candidates if e // size == g), reverse=True)
        if mine:
            worth[g] = mine[0] + (mine[1] if len(mine) > 1 else F(0))
    kept = []
    while worth and len(kept) < router.keep:
        best = max(worth.values())
        kept.append(min(g for g in worth if worth[g] == best))
        del worth[kept[-1]]
    return kept


def oracle_weights(scores, router):
    if not scores:
        return []
    if router.score == "softmax_chosen":
        scores = [oracle_exp(s - max(scores)) for s in scores]
    if router.renormalise or router.score == "softmax_chosen":
        total = oracle_sum(scores + [F(0)] * (32 - len(scores)))
        scores = [F(s / F(total + F(1e-20))) for s in scores]
    return [F(s * F(router.scale)) for s in scores]


def oracle_scores(x, router):
    if router.score == "sigmoid":
        return F(1) / (oracle_exp(-x) + F(1))
    if router.score == "softmax_chosen":
        return x
    finite = np.isfinite(x)
    most = np.where(finite, x, -np.inf).max(1, keepdims=True)
    e = np.where(finite, oracle_exp(x - most), F(0))
    run = (x.shape[1] + 31) // 32
    lane = [F(0) + np.zeros(len(x), F) for _ in range(32)]
    for i in range(x.shape[1]):
        lane[i // run] = lane[i // run] + e[:, i]
    return e / oracle_sum(lane)[:, None]


def oracle_sum(lane):
    for step in (16, 8, 4, 2, 1):
        lane = [lane[i] + lane[i ^ step] for i in range(32)]
    return lane[0]


def oracle_exp(z):
    z = np.minimum(np.maximum(z, F(-87)), F(87))
    n = np.rint(z * F(1.442695))
    r = (z - n * F(0.693359375)) - n * F(-0.00021219444)
    q = F(0.0013814599)
    for c in (0.008368717, 0.04166839, 0.16666521, 0.49999994):
        q = F(q * r) + F(c) if np.ndim(r) == 0 else q * r + F(c)
    value = (r * r * q + r) + F(1)
    return np.ldexp(value, np.nan_to_num(n).astype(np.int32)).astype(F)
