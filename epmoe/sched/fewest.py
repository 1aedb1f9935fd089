"""Few moves: ways from the placement in force, change by change, the most promising ones kept.

The local search of ``search.py`` eases the fullest rank until that is enough; it needs few steps
but not the fewest moves.  Here a placement on the way is judged by its *excess*, the load above the
limit summed over all ranks, so a change that eases many ranks a little counts for what it is.
Placements are taken up in the order of the moves they need; the first without excess ends it.

W counts the placements that are looked at together, O experts with several slots, K what is kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from epmoe.sched.moves import aligned
from epmoe.sched.placement import Placement
from epmoe.sched.search import GAIN, Floats, Ints, rank_loads

Names = npt.NDArray[np.uint64]
# Placements kept for each number of moves, in searches one after the other.
WIDTHS = (4, 16, 64, 256)
EFFORT = 16_000_000  # scores for a layer that would move all its slots, 0.1 s; others in proportion
TURN = 20_000  # scores that one more number of moves costs as much as, whatever the width


def fewest(loads_E: Floats, old: Placement, limit: float, below: int) -> Placement | None:
    """A placement that moves less than ``below`` slots and fills no rank above ``limit``.

    None if none was found.  That proves nothing, but for one move: all those have been tried.
    Small layers are searched widely; large ones (256 experts on 32 ranks) are not searched.

    >>> old = Placement(expert_of_S=(0, 1, 2, 0), experts=3, ranks=2)
    >>> fewest(np.array([1.0, 1.0, 4.0]), old, 3.5, below=3).expert_of_S  # 1.5 and 4.5 before
    (2, 1, 2, 0)
    """
    spare = min(old.experts, old.slots - old.experts)
    # Gifts, and swaps with the slots of full ranks, say a quarter.
    scores = spare * old.experts * old.ranks + old.slots**2 // 4
    effort, found = EFFORT * below / old.slots, None
    for width in WIDTHS:
        turn = TURN + width * scores
        turns = int(effort / turn)
        if below <= 1 or turns * 4 < below - 1:  # what is found needs far less moves, or nothing is
            break
        search = _Search(loads_E, old, limit, min(below - 1, turns), width)
        row = search.found()
        effort -= search.turns * turn
        if row is not None:
            found = aligned(old, Placement.of(row, experts=old.experts, ranks=old.ranks))
            below = sum(a != b for a, b in zip(old.expert_of_S, found.expert_of_S, strict=True))
    return found


class _Search:
    """One search of a given width for at most ``most`` moves."""

    def __init__(
        self, loads_E: Floats, old: Placement, limit: float, most: int, width: int
    ) -> None:
        self.loads_E, self.limit, self.most, self.width = loads_E, limit, most, width
        self.experts, self.ranks = old.experts, old.ranks
        self.rank_S = np.arange(old.slots) // old.slots_per_rank
        start_1S = np.array([old.expert_of_S])
        self.old_RE = self.held(start_1S)[0]
        # What a rank holds and held is a sum of marks; the sum of those, mixed, names a placement.
        self.mark_E = _mixed(np.arange(1, self.experts + 1, dtype=np.uint64))
        self.was_R = _mixed(self.marks(self.old_RE))
        # By moves: excess [K], names [K] and placements [K, S] that some change led to.
        self.waiting: list[list[tuple[Floats, Names, Ints]]] = [[] for _ in range(most + 1)]
        self.waiting[0].append((np.array([np.inf]), np.zeros(1, np.uint64), start_1S))
        self.turns = 0  # numbers of moves looked at

    def found(self) -> Ints | None:
        """The slots of the first placement that keeps the limit."""
        for moved in range(self.most + 1):
            if not self.waiting[moved]:
                continue
            excess_K, name_K, rows_KS = map(np.concatenate, zip(*self.waiting[moved], strict=True))
            done_KS = rows_KS[excess_K <= GAIN * self.limit]
            loads_KE = np.tile(self.loads_E, (len(done_KS), 1))
            top_K = rank_loads(loads_KE, done_KS, self.ranks).max(1)
            done_KS = done_KS[top_K <= self.limit]  # by the additions that the limit came from
            if len(done_KS):
                first_S: Ints = done_KS[0]
                return first_S
            if moved < self.most:
                self.change(moved, rows_KS[self.lowest(excess_K, name_K)[: self.width]])
            self.waiting[moved].clear()
        return None

    def change(self, moved: int, rows_WS: Ints) -> None:
        """All changes of these placements; the best ones wait for their turn."""
        self.turns += 1
        held_WRE = self.held(rows_WS)
        count_WE = held_WRE.sum(1)
        over_WR = (held_WRE * (self.loads_E / count_WE)[:, None]).sum(2) - self.limit
        comes_WRE = (held_WRE >= self.old_RE).astype(np.int64)  # moves that one more costs
        goes_WRE = (held_WRE > self.old_RE).astype(np.int64)  # and that one less saves
        marks_WR = self.marks(held_WRE) + self.was_R
        part_WR = _mixed(marks_WR)
        name_W = part_WR.sum(1)

        def changed(w_K: Ints, rank_K: Ints, out_K: Ints, into_K: Ints) -> tuple[Ints, Names]:
            """The moves that this adds, and to the name."""
            costs_K = comes_WRE[w_K, rank_K, into_K] - goes_WRE[w_K, rank_K, out_K]
            marks_K = marks_WR[w_K, rank_K] + self.mark_E[into_K] - self.mark_E[out_K]
            return costs_K, _mixed(marks_K) - part_WR[w_K, rank_K]

        excess_K, w_K, rank_K, out_K, into_K = self.gifts(held_WRE, count_WE, over_WR)
        slot_K = ((rows_WS[w_K] == out_K[:, None]) & (self.rank_S == rank_K[:, None])).argmax(1)
        costs_K, adds_K = changed(w_K, rank_K, out_K, into_K)
        name_K = name_W[w_K] + adds_K
        self.wait(moved, costs_K, excess_K, name_K, rows_WS, w_K, (slot_K, into_K))

        excess_K, w_K, slot_K, other_K = self.swaps(rows_WS, self.loads_E / count_WE, over_WR)
        out_K, into_K = rows_WS[w_K, slot_K], rows_WS[w_K, other_K]
        costs_K, adds_K = changed(w_K, self.rank_S[slot_K], out_K, into_K)
        more_K, too_K = changed(w_K, self.rank_S[other_K], into_K, out_K)
        name_K = name_W[w_K] + adds_K + too_K
        both = (slot_K, into_K), (other_K, out_K)
        self.wait(moved, costs_K + more_K, excess_K, name_K, rows_WS, w_K, *both)

    def wait(
        self,
        moved: int,
        costs_K: Ints,
        excess_K: Floats,
        name_K: Names,
        rows_WS: Ints,
        w_K: Ints,
        *changes: tuple[Ints, Ints],
    ) -> None:
        """Carry out the best changes (slots, experts); leave out those that go back."""
        k = self.lowest(excess_K, name_K)[: 2 * self.width]
        rows_KS = rows_WS[w_K[k]]
        for slot_K, expert_K in changes:
            rows_KS[np.arange(len(k)), slot_K[k]] = expert_K[k]
        for cost in range(1, min(2, self.most - moved) + 1):
            if (at := costs_K[k] == cost).any():
                found = (excess_K[k][at], name_K[k][at], rows_KS[at])
                self.waiting[moved + cost].append(found)

    def gifts(
        self, held_WRE: Ints, count_WE: Ints, over_WR: Floats
    ) -> tuple[Floats, Ints, Ints, Ints, Ints]:
        """A slot of an expert that has several gets another expert, from [W, O, E, R] scores.

        Returns excess, placement, rank, old expert, new expert of the best.
        """
        w1 = np.arange(len(held_WRE))[:, None]
        most = int((count_WE > 1).sum(1).max())
        out_WO = np.argsort(-count_WE, axis=1, kind="stable")[:, :most]
        each_WE, more_WE = self.loads_E / count_WE, self.loads_E / (count_WE + 1)
        fewer_WO = self.loads_E[out_WO] / np.maximum(count_WE[w1, out_WO] - 1, 1)
        held_WER = held_WRE.transpose(0, 2, 1)
        held_WOR = held_WER[w1, out_WO]
        lost_WOR = held_WOR * (fewer_WO - each_WE[w1, out_WO])[:, :, None]
        won_WER = held_WER * (more_WE - each_WE)[:, :, None]
        over_WOER = (over_WR[:, None] + lost_WOR)[:, :, None] + won_WER[:, None]
        itself_WOE = more_WE[:, None] - fewer_WO[:, :, None]  # the slot that changes
        score_WOER = np.maximum(over_WOER + itself_WOE[..., None], 0)
        np.maximum(over_WOER, 0, out=over_WOER)
        score_WOER -= over_WOER
        score_WOER += over_WOER.sum(3, keepdims=True)
        score_WOER[w1, np.arange(most), out_WO] = np.inf
        none_WOR = (held_WOR == 0) | (count_WE[w1, out_WO] < 2)[:, :, None]
        score_WOER += np.where(none_WOR, np.inf, 0)[:, :, None]
        score_K, (w_K, o_K, into_K, rank_K) = self.some(score_WOER)
        return score_K, w_K, rank_K, out_WO[w_K, o_K], into_K

    def swaps(
        self, rows_WS: Ints, each_WE: Floats, over_WR: Floats
    ) -> tuple[Floats, Ints, Ints, Ints]:
        """A slot of a rank above the limit against one of another rank, from [W, F, S] scores.

        Returns excess, placement, slot, other slot of the best.  F counts slots of full ranks.
        """
        w1 = np.arange(len(rows_WS))[:, None]
        each_WS = np.take_along_axis(each_WE, rows_WS, 1)
        over_WS = over_WR[:, self.rank_S]
        excess_WS = np.maximum(over_WS, 0)
        most = int((over_WS > 0).sum(1).max())
        full_WF = np.argsort(over_WS <= 0, axis=1, kind="stable")[:, :most]
        over_WF = over_WS[w1, full_WF]
        shift_WFS = each_WS[w1, full_WF][:, :, None] - each_WS[:, None, :]
        score_WFS = np.maximum(over_WF[:, :, None] - shift_WFS, 0)
        score_WFS += np.maximum(over_WS[:, None, :] + shift_WFS, 0)
        score_WFS -= over_WF[:, :, None] + excess_WS[:, None, :]
        score_WFS += np.maximum(over_WR, 0).sum(1)[:, None, None]
        score_WFS[over_WF <= 0] = np.inf
        score_WFS[self.rank_S[full_WF][:, :, None] == self.rank_S] = np.inf
        score_K, (w_K, full_K, other_K) = self.some(score_WFS)
        return score_K, w_K, full_WF[w_K, full_K], other_K

    def some(self, score: Floats) -> tuple[Floats, tuple[Ints, ...]]:
        """The lowest scores and where they are: more than are kept, as many will be equal."""
        flat = score.ravel()
        some = min(len(flat), 16 * self.width)
        at = np.argpartition(flat, some - 1)[:some] if some else np.zeros(0, np.int64)
        at = at[np.isfinite(flat[at])]
        return flat[at], np.unravel_index(at, score.shape)

    def lowest(self, excess_K: Floats, name_K: Names) -> Ints:
        """Where the lowest excess is, ascending: one placement of each value, as the others are
        mostly alike.

        But what a rank below the limit holds does not show in it: the widest search takes the
        others too, each name once, after those.
        """
        order_K = np.argsort(excess_K, kind="stable")
        order_K = order_K[np.sort(np.unique(name_K[order_K], return_index=True)[1])]
        new_K = np.diff(excess_K[order_K], prepend=-np.inf) > GAIN * self.limit
        others_K = order_K[~new_K] if self.width == WIDTHS[-1] else order_K[:0]
        return np.concatenate((order_K[new_K], others_K))

    def marks(self, held_RE: Ints) -> Names:
        """The sum of the marks of what every rank holds."""
        sums_R: Names = (held_RE.astype(np.uint64) * self.mark_E).sum(-1)
        return sums_R

    def held(self, rows_WS: Ints) -> Ints:
        """How many slots of every rank hold every expert."""
        cells = self.ranks * self.experts
        bins_WS = rows_WS + self.rank_S * self.experts
        bins_WS = bins_WS + np.arange(len(rows_WS))[:, None] * cells
        counts = np.bincount(bins_WS.ravel(), minlength=len(rows_WS) * cells)
        return counts.reshape(len(rows_WS), self.ranks, self.experts)


def _mixed(value: Names) -> Names:
    """Well spread bits: sums of these are equal for equal terms only, as good as always."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
