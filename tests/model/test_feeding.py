"""The tile loop of two clusters that need each other's tiles: every order of moves ends.

As in kernels/cu/gemm.cuh and many.cuh, with a ring of two stages and one warpgroup a CTA.  CTAs A
and B are a cluster, C and D another: a cluster shares the weights of its tiles, each CTA sends half
of a stage's weights to both.  Each CTA has a tile of FC1 (two steps) and then takes one of FC2
(three steps), whose rows its feeder fetches when the other cluster's CTA has counted its tile of
FC1.
"""

from collections import namedtuple

STAGES, FIRST, SECOND = 2, 2, 3  # stages, steps of the tiles
MATE = (1, 0, 3, 2)
NEEDS = (2, 3, 0, 1)  # whose tile of FC1 the feeder of each CTA waits for

# at: steps that were multiplied, of both tiles; then one more when the tile is over.
# counted: the FC1 tile was counted.  taken: the second tile was taken, early or late.
# waits: the feeder 0 sends weights ahead, 1 awaits the rows, 2 sends the rest.
Cta = namedtuple("Cta", "at taken counted waits weights rows")


def full(state, i, step):
    """Both halves of the weights and my rows of this step of the second tile are there."""
    me, mate = state[i], state[MATE[i]]
    return me.weights > step and mate.weights > step and me.rows > step


def empty(state, i, step):
    """The stage of this step of the second tile was given back by both CTAs."""
    return all(state[c].at >= step + FIRST - STAGES + 1 for c in (i, MATE[i]))


def counts_at_first_wait(step, full_now):
    return step == 2 or (step == 1 and not full_now)


def counts_at_step_2(step, full_now):
    return step == 2


def moves(state, counts, ahead):
    for i, me in enumerate(state):
        for new in (*consumer(state, i, me, counts), *feeder(state, i, me, ahead)):
            yield (*state[:i], new, *state[i + 1 :])


def consumer(state, i, me, counts):
    step = me.at - FIRST
    if step < 0:
        yield me._replace(at=me.at + 1)
    elif step == SECOND:
        return
    elif not me.taken:  # looks once whether the first stage is there
        yield me._replace(taken=1, counted=int(not full(state, i, 0)))
    elif not me.counted and counts(step, full(state, i, step)):
        yield me._replace(counted=1)
    elif full(state, i, step):
        yield me._replace(at=me.at + 1)


def feeder(state, i, me, ahead):
    if me.waits == 0:
        can = ahead and me.weights < min(SECOND, STAGES) and empty(state, i, me.weights)
        yield me._replace(weights=me.weights + 1) if can else me._replace(waits=1)
    elif me.waits == 1:
        if state[NEEDS[i]].counted:
            yield me._replace(waits=2)
    elif me.rows < me.weights:
        yield me._replace(rows=me.rows + 1)
    elif me.weights < SECOND and empty(state, i, me.weights):
        yield me._replace(weights=me.weights + 1)


def over(state):
    return all(c.at == FIRST + SECOND and c.rows == SECOND for c in state)


def one_of_alike(state):
    """Clusters may change names, and so may the CTAs of both at once."""
    a, b, c, d = state
    return min(state, (c, d, a, b), (b, a, d, c), (d, c, b, a))


def dead_ends(counts, ahead=True):
    """How many states nobody can leave before all is done; how many states there are."""
    begin = (Cta(0, 0, 0, 0, 0, 0),) * 4
    seen, todo, dead = {begin}, [begin], 0
    while todo:
        state = todo.pop()
        found = {one_of_alike(new) for new in moves(state, counts, ahead)}
        dead += not found and not over(state)
        todo += found - seen
        seen |= found
    return dead, len(seen)


def test_who_counts_before_the_first_wait_never_waits_for_ever():
    dead, seen = dead_ends(counts_at_first_wait)
    assert dead == 0
    assert seen > 10_000


def test_a_step_later_is_too_late():
    """The mutant; until weights went ahead of the rows' wait, it was right."""
    assert dead_ends(counts_at_step_2)[0] > 0
    assert dead_ends(counts_at_step_2, ahead=False)[0] == 0
