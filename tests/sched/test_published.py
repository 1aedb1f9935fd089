"""The published planner: its own vectors, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epmoe.sched.published import published

README = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_hierarchical_vector():
    got = published(README, slots=16, ranks=8, groups=4, hosts=2)
    assert [p.expert_of_S for p in got] == [
        (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
        (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
    ]


def test_global_vector_also_when_groups_do_not_divide_over_hosts():
    for hosts, groups in ((2, 3), (1, 1)):
        got = published(torch.tensor(README), slots=16, ranks=8, groups=groups, hosts=hosts)
        assert [p.expert_of_S for p in got] == [
            (10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1),
            (1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7),
        ]
        assert got[0].counts_E.tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]


def one_at_a_time(loads: list[float], slots: int, ranks: int) -> list[int]:
    """The global algorithm with float32 scalars and plain loops, from its description."""
    weight = np.array(loads, np.float32)
    experts, counts = list(range(len(loads))), [1] * len(loads)
    while len(experts) < slots:
        each = [w / np.float32(c) for w, c in zip(weight, counts, strict=True)]
        experts.append(each.index(max(each)))
        counts[experts[-1]] += 1
    if slots == ranks:
        return experts
    each = [weight[e] / np.float32(counts[e]) for e in experts]
    packs: list[list[int]] = [[] for _ in range(ranks)]
    sums = [np.float32(0)] * ranks
    for slot in sorted(range(slots), key=lambda s: -each[s]):
        open_packs = [r for r in range(ranks) if len(packs[r]) < slots // ranks]
        lightest = min(open_packs, key=lambda r: sums[r])
        packs[lightest].append(experts[slot])
        sums[lightest] += each[slot]
    return [expert for pack in packs for expert in pack]


@pytest.mark.parametrize("seed", range(30))
def test_many_layers_at_once_equal_one_at_a_time(seed):
    random = np.random.default_rng(seed)
    ranks, experts = int(random.integers(1, 9)), int(random.integers(1, 20))
    slots = -(-experts // ranks) * ranks + ranks * int(random.integers(0, 4))
    loads = random.exponential(size=(4, experts)) ** 3 * 1000
    loads[0] = np.round(loads[0] / 500)  # ties and zeros
    loads[0, 0] += 1
    got = published(loads, slots=slots, ranks=ranks)
    assert [list(p.expert_of_S) for p in got] == [one_at_a_time(w, slots, ranks) for w in loads]


def test_a_tie_in_float32_is_a_tie():
    third = float(np.float32(1) / np.float32(3))  # in float64 this is more than 1 / 3
    (got,) = published([1, third], slots=4, ranks=2)
    assert got.expert_of_S == (0, 0, 1, 0)


def test_no_load_at_all_is_planned_as_equal_loads():
    (got,) = published([0.0] * 6, slots=12, ranks=4)
    assert got.counts_E.tolist() == [2] * 6


@pytest.mark.parametrize(
    ("loads", "options", "says"),
    [
        ([1, float("nan")], {}, "got nan for expert 1 of layer 0"),
        ([[1, 1], [-1, 1]], {}, "got -1.0 for expert 0 of layer 1"),
        ([1, float("inf")], {}, "got inf"),
        ([1, 1, 1, 1, 1], {}, "slots must be at least experts"),
        ([1, 1], {"slots": 5}, "multiple of ranks"),
        ([1, 1], {"groups": 3}, "groups must divide experts"),
        ([1, 1], {"hosts": 3}, "hosts must divide ranks"),
        ([1, 1], {"ranks": 0}, "ranks must be at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(loads, options, says):
    with pytest.raises(ValueError, match=says):
        published(loads, **{"slots": 4, "ranks": 2} | options)
