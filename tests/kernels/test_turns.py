"""Which rows a rank pulls, and where they go: cu/exchange.cuh and cu/carry.cuh run on this machine.

Lanes take turns at the votes and barriers of their warp; the oracle knows ids and nothing else.
"""

import ctypes

import numpy as np
import pytest
from on_cpu import built, needs_compiler

from epmoe import MoEConfig
from epmoe.comm.layout import layout
from epmoe.kernels.cuda import mailbox_constants

pytestmark = needs_compiler

BLOCK, NOWHERE = 128, 2**32 - 1
CARRIERS = 4  # warps


def made(folder, config, ranks, ring):
    """The headers with this layer's constants; its layout."""
    at = layout([config], ranks)
    constants = mailbox_constants(config, ranks, at.lanes[0][0])
    constants |= {"BLOCKS": "4096u", "RING": f"{ring}u", "PARTS": "1u"}
    headers = ("exchange.cuh", "carry.cuh", "mailbox.cuh")
    return built(folder, "turns.cpp", headers, constants).pull_all, at


def mailbox(config, ranks, rank, at, ids_R, word=0):
    """The slab of ``rank`` as its peers leave it: words C, counts, lists, siblings."""
    regions, local = at.lanes[0][0], config.slots_per_rank(ranks)
    slab = np.zeros(at.total + 64, np.uint8)[: at.total]

    def region(name, kind):
        r = regions[name]
        return slab[r.at : r.at + r.bytes].view(kind).reshape(r.shape)

    words, counts = region("words", np.uint64), region("counts", np.int32)
    pulled, lists = region("pulled", np.int32), region("lists", np.uint32)
    siblings = region("siblings", np.uint32)
    lists[:], siblings[:] = NOWHERE - 5, NOWHERE
    for source, ids in enumerate(ids_R):
        mine = np.where((ids >= rank * local) & (ids < (rank + 1) * local), ids - rank * local, -1)
        lists_of = [([], []) for _ in range(local)]  # pulled, others
        for row, chosen in enumerate(mine):
            wanted = [(slot, k) for k, slot in enumerate(chosen) if slot >= 0]
            for slot, k in wanted:
                lists_of[slot][(slot, k) != min(wanted)].append(row * config.choices + k)
        place = 0
        for slot, (first, others) in enumerate(lists_of):
            counts[source, rank * local + slot] = len(first) + len(others)
            pulled[source, slot] = len(first)
            for nth, cell in enumerate(first + others):
                lists[source, place] = cell
                siblings[source, cell] = slot << 19 | nth
                place += 1
        words[0, source] = 1 << 32 | place + word
    return slab


@pytest.mark.parametrize(
    ("ranks", "slots", "choices", "ring"),
    [
        (1, 40, 3, 4096),
        (3, 5, 4, 4096),
        (8, 2, 8, 4096),
        (8, 2, 8, 2),
        (7, 33, 1, 3),
        (2, 70, 16, 9),
    ],
)
def test_every_choice_has_a_row_of_its_slot_and_every_row_is_pulled(
    tmp_path, ranks, slots, choices, ring
):
    config = MoEConfig(
        experts=ranks * slots, choices=min(choices, ranks * slots), hidden=64, inner=64, max_rows=90
    )
    choices = config.choices
    pull_all, at = made(tmp_path, config, ranks, ring)
    rng = np.random.default_rng(ranks)
    for kind, rank in (("any", ranks - 1), ("masked", 0), ("one", ranks // 2), ("none", 0)):
        ids_R = []
        for _ in range(ranks):
            rows = rng.choice([0, 1, 17, config.max_rows])
            ids = rng.random((rows, config.experts)).argsort(1)[:, :choices]
            if kind == "one":
                ids[:] = rank * slots + slots - 1  # one slot, named by every choice
            elif kind == "none":
                ids[:] = -1
            elif kind == "masked":
                ids[rng.random(ids.shape) < 0.4] = -1
            ids_R.append(ids)
        slab = mailbox(config, ranks, rank, at, ids_R)
        per_slot = [
            {(s, int(c)) for s, ids in enumerate(ids_R) for c in np.flatnonzero(ids == slot)}
            for slot in range(rank * slots, (rank + 1) * slots)
        ]
        blocks = [-(-len(cells) // BLOCK) for cells in per_slot]
        homes = np.zeros(BLOCK * 4096, np.uint32)
        whole = np.full(2 * 3 * 4096, NOWHERE, np.uint32)  # nobody has to wait for a place
        log = np.zeros((sum(map(len, per_slot)) + 1, 4), np.uint32)
        addresses = [ctypes.c_void_p(a.ctypes.data) for a in (slab, homes, whole, log)]
        found = pull_all(addresses[0], rank, *addresses[1:3], CARRIERS, len(log), addresses[3])
        assert found == sum(map(len, per_slot))
        source, row, cell, place = log[:found].T.astype(int)
        assert (row == cell // choices).all()
        # Each slot's rows are the first of its blocks, and hold its cells, one each.
        for slot, cells in enumerate(per_slot):
            begin = BLOCK * sum(blocks[:slot])
            here = (place >= begin) & (place < begin + len(cells))
            assert {*zip(source[here].tolist(), cell[here].tolist(), strict=True)} == cells
            assert len(set(place[here])) == here.sum() == len(cells)
        if sum(blocks) <= ring:  # else another row's home is there by now
            assert (homes[place] == source << 29 | cell).all()


def test_counts_that_cannot_be_are_told(tmp_path):
    config = MoEConfig(experts=6, choices=2, hidden=64, inner=64, max_rows=20)
    pull_all, at = made(tmp_path, config, 3, 4096)
    ids_R = [np.zeros((3, 2), int) + s for s in range(3)]
    nothing = np.zeros(1 << 16, np.uint32)
    none = ctypes.c_void_p(nothing.ctypes.data)

    def told(slab):
        return pull_all(ctypes.c_void_p(slab.ctypes.data), 0, none, none, 1, 0, none)

    assert told(mailbox(config, 3, 0, at, ids_R)) >= 0
    assert told(mailbox(config, 3, 0, at, ids_R, word=1)) < 0  # the word says another number
    slab = mailbox(config, 3, 0, at, ids_R)
    counts, words = (at.lanes[0][0][name].at for name in ("counts", "words"))
    slab[counts + 4 * 6 :][:8].view(np.int32)[:] = 40, 40  # of 40 cells, says rank 1
    slab[words + 8 :][:8].view(np.uint64)[:] = 1 << 32 | 80
    assert told(slab) == -2
