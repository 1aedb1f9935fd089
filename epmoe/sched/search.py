"""Local search for balance: from a placement that works to one that balances, change by change.

All layers are searched at once (axis N of every array): one layer alone is too small to keep numpy
busy.  Every change starts at the fullest rank of its layer:

* *swap*: one of its slots against a slot of another rank; two slots move;
* *gift*: one of its experts gets one more replica, in the place of a replica of an expert that has
  several; one slot moves.

A change must lower the fullest rank and lift no rank to where that was, so the search ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
GAIN = 1e-9  # of the mean rank load; a smaller gain could be rounding, and that could go in circles


def replica_counts(expert_NS: Ints, experts: int) -> Ints:
    """How many slots hold each expert, [N, E]."""
    layers = len(expert_NS)
    bins_NS = expert_NS + np.arange(layers)[:, None] * experts
    return np.bincount(bins_NS.ravel(), minlength=layers * experts).reshape(layers, experts)


def rank_loads(loads_NE: Floats, expert_NS: Ints, ranks: int) -> Floats:
    """The load of every rank, [N, R]: an expert's load is shared equally by its replicas.

    Added in ascending order, so that renaming slots or ranks changes no bit of the maximum.
    """
    counts_NE = replica_counts(expert_NS, loads_NE.shape[1])
    each_NS = np.take_along_axis(loads_NE / counts_NE, expert_NS, 1)
    shape = (len(expert_NS), ranks, expert_NS.shape[1] // ranks)
    sums_NR: Floats = np.sort(each_NS.reshape(shape), axis=2).sum(axis=2)
    return sums_NR


def improve(loads_NE: Floats, expert_NS: Ints, ranks: int, *, enough_N: Floats, steps: int) -> Ints:
    """Change slots until the fullest rank of layer n is at most ``enough_N[n]``, or none helps.

    Each step makes, in every layer that is not done, the change that gains most; of equal ones
    (all that reach ``enough_N`` are equal) the one that moves one slot, not two.
    """
    expert_NS = expert_NS.copy()
    open_N = np.arange(len(expert_NS))
    least_N = loads_NE.sum(1) / ranks * GAIN
    for _ in range(steps):
        if not len(open_N):
            break
        top_N, kinds = _offers(loads_NE[open_N], expert_NS[open_N], ranks)
        score_KN = np.maximum([kind.score_N for kind in kinds], enough_N[open_N])
        best_N = score_KN.argmin(0)
        go_N = top_N - score_KN.min(0) > least_N[open_N]
        for kind, offer in enumerate(kinds):
            mine_N = go_N & (best_N == kind)
            expert_NS[open_N[mine_N][:, None], offer.slots[mine_N]] = offer.experts[mine_N]
        open_N = open_N[go_N]
    return expert_NS


class _Offer(NamedTuple):
    """The best change of one kind in every layer."""

    score_N: Floats  # at least the highest load of the fullest rank and of every rank that rises
    slots: Ints  # [N, 1 or 2]
    experts: Ints  # what they would hold


def _offers(loads_NE: Floats, expert_NS: Ints, ranks: int) -> tuple[Floats, list[_Offer]]:
    """Load of the fullest rank, and the best gift and swap (only a swap if nobody has replicas).

    P counts the slots of experts with several replicas.
    """
    layers, slots = expert_NS.shape
    per_rank = slots // ranks
    n, n1 = np.arange(layers), np.arange(layers)[:, None]
    counts_NE = replica_counts(expert_NS, loads_NE.shape[1])
    each_NE = loads_NE / counts_NE
    more_NE = loads_NE / (counts_NE + 1)  # load per replica if there were one more
    each_NS = each_NE[n1, expert_NS]
    load_NR = np.sort(each_NS.reshape(layers, ranks, per_rank), axis=2).sum(axis=2)
    full_N = load_NR.argmax(1)
    top_N = load_NR[n, full_N]
    mine_NL = full_N[:, None] * per_rank + np.arange(per_rank)
    at_NS = np.repeat(load_NR, per_rank, axis=1)

    # A swap inside the fullest rank scores that rank's load or more, so it needs no mask.
    shift_NLS = each_NS[n1, mine_NL][:, :, None] - each_NS[:, None, :]
    score_NLS = np.maximum(top_N[:, None, None] - shift_NLS, at_NS[:, None, :] + shift_NLS)
    score_N, a_N, b_N = _lowest(score_NLS)
    pair = np.stack([mine_NL[n, a_N], b_N], axis=1)
    swap = _Offer(score_N, pair, expert_NS[n1, pair[:, ::-1]])

    many_NS = counts_NE[n1, expert_NS] > 1
    most = int(many_NS.sum(1).max())
    if not most:
        return top_N, [swap]
    spare_NP = np.argsort(~many_NS, axis=1, kind="stable")[:, :most]
    held_NP, rank_NP = expert_NS[n1, spare_NP], spare_NP // per_rank
    lost_NP = loads_NE[n1, held_NP] / np.maximum(counts_NE[n1, held_NP] - 1, 1)
    rise_NP = lost_NP - each_NE[n1, held_NP]
    beside_NPL = expert_NS.reshape(layers, ranks, per_rank)[n1, rank_NP]
    twins_NP = (beside_NPL == held_NP[:, :, None]).sum(2) - 1
    on_NP = at_NS[n1, spare_NP]
    freed_NP = on_NP - each_NS[n1, spare_NP] + twins_NP * rise_NP
    raised_NP = on_NP + (twins_NP + 1) * rise_NP  # if the expert loses a replica on another rank
    others_NP = _highest_elsewhere(held_NP, rank_NP, raised_NP, loads_NE.shape[1])
    others_NP[~many_NS[n1, spare_NP]] = np.inf  # the last one of its expert stays

    hot_NL = expert_NS[n1, mine_NL]
    more_NL = more_NE[n1, hot_NL]
    eased_NL = top_N[:, None] - each_NE[n1, hot_NL] + more_NL
    score_NLP = np.maximum(freed_NP[:, None, :] + more_NL[:, :, None], others_NP[:, None, :])
    score_NLP = np.maximum(score_NLP, eased_NL[:, :, None])
    score_NLP[hot_NL[:, :, None] == held_NP[:, None, :]] = np.inf
    score_N, a_N, b_N = _lowest(score_NLP)
    gift = _Offer(score_N, spare_NP[n, b_N][:, None], hot_NL[n, a_N][:, None])
    return top_N, [gift, swap]


def _lowest(score_NAB: Floats) -> tuple[Floats, Ints, Ints]:
    """The lowest score of every layer, and where it is."""
    flat = score_NAB.reshape(len(score_NAB), -1)
    at_N = flat.argmin(1)
    return flat[np.arange(len(flat)), at_N], *np.divmod(at_N, score_NAB.shape[2])


def _highest_elsewhere(held_NP: Ints, rank_NP: Ints, value_NP: Floats, experts: int) -> Floats:
    """For every slot the highest value among the slots of other ranks that hold its expert."""
    key_NP = held_NP + np.arange(len(held_NP))[:, None] * experts
    size = len(held_NP) * experts
    first, second, where = np.zeros(size), np.zeros(size), np.full(size, -1)
    np.maximum.at(first, key_NP, value_NP)
    leads_NP = value_NP == first[key_NP]
    np.maximum.at(where, key_NP[leads_NP], rank_NP[leads_NP])
    apart_NP = rank_NP != where[key_NP]
    np.maximum.at(second, key_NP[apart_NP], value_NP[apart_NP])
    highest_NP: Floats = np.where(apart_NP, first[key_NP], second[key_NP])
    return highest_NP
