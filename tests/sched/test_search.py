"""Local search: every step must make the fullest rank lighter and break nothing."""

from __future__ import annotations

import numpy as np
import pytest

from epmoe.sched.search import _highest_elsewhere, improve, rank_loads, replica_counts


def some(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Loads of 4 layers and a random placement for them, spare slots and twins included."""
    random = np.random.default_rng(seed)
    experts, ranks = int(random.integers(1, 12)), int(random.integers(1, 7))
    slots = (-(-experts // ranks) + int(random.integers(0, 3))) * ranks
    loads = random.exponential(size=(4, experts)) ** 2
    loads[0] = random.integers(0, 3, experts)
    loads[0, 0] = 1
    extra = random.integers(0, experts, (4, slots - experts))
    held = np.concatenate([np.tile(np.arange(experts), (4, 1)), extra], axis=1)
    return loads, random.permuted(held, axis=1), ranks


def plain_rank_loads(loads: np.ndarray, held: np.ndarray, ranks: int) -> list[float]:
    each = [loads[e] / list(held).count(e) for e in held]
    size = len(held) // ranks
    return [sum(each[r * size : (r + 1) * size]) for r in range(ranks)]


@pytest.mark.parametrize("seed", range(20))
def test_rank_loads_share_an_expert_equally_over_its_replicas(seed):
    loads, held, ranks = some(seed)
    got = rank_loads(loads, held, ranks)
    for n in range(4):  # another order of adding: equal up to rounding only
        np.testing.assert_allclose(got[n], plain_rank_loads(loads[n], held[n], ranks), rtol=1e-12)


def test_renaming_slots_and_ranks_changes_no_bit_of_the_maximum():
    loads, _, _ = some(3)
    random = np.random.default_rng(0)
    loads = random.random((1, 40)) * 1e5
    held = random.permutation(40)[None, :]
    renamed = np.stack([random.permutation(rank) for rank in held.reshape(4, 10)[::-1]])
    one, two = rank_loads(loads, held, 4), rank_loads(loads, renamed.reshape(1, 40), 4)
    assert one[0].tolist() == two[0, ::-1].tolist()


@pytest.mark.parametrize("seed", range(150))
def test_every_step_lightens_the_fullest_rank_and_lifts_none_to_it(seed):
    loads, held, ranks = some(seed)
    nothing = np.zeros(4)
    for _ in range(12):
        after = improve(loads, held, ranks, enough_N=nothing, steps=1)
        one, two = rank_loads(loads, held, ranks), rank_loads(loads, after, ranks)
        assert (replica_counts(after, loads.shape[1]) > 0).all()
        for n in range(4):
            if (after[n] == held[n]).all():
                continue
            full = one[n].argmax()
            assert (after[n] != held[n]).sum() <= 2
            assert two[n, full] < one[n, full]
            assert (two[n][two[n] > one[n] + 1e-12] < one[n, full]).all()
        held = after


def a_swap_helps(loads: np.ndarray, held: np.ndarray, ranks: int) -> bool:
    before = plain_rank_loads(loads, held, ranks)
    full, size = int(np.argmax(before)), len(held) // ranks
    for a in range(full * size, (full + 1) * size):
        for b in range(len(held)):
            swapped = held.copy()
            swapped[[a, b]] = swapped[[b, a]]
            after = plain_rank_loads(loads, swapped, ranks)
            if max(after[full], after[b // size]) < before[full] * (1 - 1e-6):
                return True
    return False


@pytest.mark.parametrize("seed", range(40))
def test_a_layer_is_given_up_only_when_no_swap_helps(seed):
    loads, held, ranks = some(seed)
    after = improve(loads, held, ranks, enough_N=np.zeros(4), steps=200)
    for n in range(4):
        assert not a_swap_helps(loads[n], after[n], ranks)


def test_each_kind_of_change_is_found_where_only_it_helps():
    def after(loads: list[float], held: list[int], ranks: int) -> list[int]:
        return improve(np.array([loads]), np.array([held]), ranks, enough_N=np.zeros(1), steps=1)[
            0
        ].tolist()

    assert sorted(after([4, 3, 2, 1], [0, 1, 2, 3], 2)[:2]) in ([0, 3], [1, 2])  # swap
    assert after([8, 1, 1], [0, 1, 2, 2], 4) == [0, 1, 0, 2]  # gift: 2 has two, 0 needs two
    assert after([9, 9, 1, 1], [0, 1, 0, 2, 1, 3], 2)[:3] != [0, 1, 0]  # twins on rank 0 part


def test_a_layer_that_is_good_enough_is_left_alone():
    loads, held, ranks = some(5)
    top = rank_loads(loads, held, ranks).max(1)
    top[1] *= 0.999
    after = improve(loads, held, ranks, enough_N=top, steps=50)
    assert [(after[n] == held[n]).all() for n in (0, 2, 3)] == [True] * 3


def test_no_layers_is_no_work():
    none = np.zeros((0, 4))
    assert improve(none, none.astype(int), 2, enough_N=np.zeros(0), steps=5).shape == (0, 4)


def test_highest_elsewhere_is_the_plain_definition():
    random = np.random.default_rng(1)
    held, rank = random.integers(0, 4, (5, 12)), random.integers(0, 3, (5, 12))
    value = random.integers(1, 6, (5, 12)).astype(float)
    got = _highest_elsewhere(held, rank, value, 4)
    for n, s in np.ndindex(5, 12):
        others = (o for o in range(12) if held[n, o] == held[n, s] and rank[n, o] != rank[n, s])
        assert got[n, s] == max((value[n, o] for o in others), default=0)
