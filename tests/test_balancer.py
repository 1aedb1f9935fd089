"""Drifting traffic on 4 ranks: the balancer keeps the fullest rank near the mean, answers exact."""

import io
import json
import subprocess
import sys

import pytest
import torch
from ranks import ranks
from test_migration import held, integer_weights

from epmoe import Balancer, BalanceRule, MoE, MoEConfig, Placement
from epmoe.accept import check_budget
from epmoe.balancer import describe_loads
from epmoe.cli import balance, loadfile
from epmoe.reference import reference_moe
from epmoe.sched.balance import max_over_mean
from epmoe.sched.loads import Loads

CONFIG = MoEConfig(
    experts=32,
    slots=40,
    choices=2,
    hidden=64,
    inner=32,
    max_rows=64,
    dtype="fp32",
    activation="relu2",
    freight=1 << 16,
    stall_s=20.0,
)
STEPS = 300


def hot(step):
    """Zipf-1.2 popularity whose hot experts wander: every 150 steps the ranks of fame move on."""
    fame = 1 / torch.arange(1, 33).double() ** 1.2
    order = torch.randperm(32, generator=torch.Generator().manual_seed(7))
    popularity = torch.zeros(32, dtype=torch.float64)
    popularity[order] = fame.roll(step // 150)
    return popularity


def batches(step, size):
    out = []
    for rank in range(size):
        g = torch.Generator().manual_seed(step * 7 + rank)
        ids = torch.multinomial(hot(step).expand(64, 32), 2, generator=g)
        out.append((torch.randint(-1, 2, (64, 64), generator=g).float(), ids, torch.ones(64, 2)))
    return out


def ratios(group, rule):
    """Measured max/mean rows per rank in windows of 50 steps, and how many answers were wrong."""
    weights = integer_weights(CONFIG)
    with MoE.open(CONFIG, group) as moe:
        moe.load(**held(weights, moe.placement, group.rank))
        balancer = Balancer([moe], rule) if rule else None
        ops, wrong, rows_R, out = moe._rounds[0].ops, 0, torch.zeros(group.size), []
        wait_plan = ops.wait_plan

        def counting(*args):
            plan = wait_plan(*args)
            rows_R.add_(plan.rows_S.view(group.size, -1).sum(1))
            return plan

        ops.wait_plan = counting
        for step in range(STEPS):
            batch = batches(step, group.size)
            y = moe(*batch[group.rank])
            if step % 25 == 0:
                want = reference_moe(*map(list, zip(*batch, strict=True)), weights, CONFIG)
                wrong += not torch.equal(y, want[group.rank])
            if balancer:
                balancer.step()
            if step % 50 == 49:
                out.append(float(rows_R.max() / rows_R.mean()))
                rows_R.zero_()
    return out, wrong


@ranks(4)
def test_drifting_load_is_brought_near_the_mean(rank, group):
    without, wrong = ratios(group, None)
    assert wrong == 0
    assert without[0] >= 1.8
    rule = BalanceRule(interval=10, window=20, threshold=1.05, gain=0.02, budget=1 << 15)
    balanced, wrong = ratios(group, rule)
    assert wrong == 0
    last = balanced[len(balanced) // 2 :]
    assert sum(last) / len(last) <= 1.15, (without, balanced)


@ranks(2)
def test_a_budget_that_no_forward_can_carry_is_refused_at_once(rank, group):
    with MoE.open(CONFIG, group) as moe:
        Balancer([moe], BalanceRule())  # half of the freight, whatever that is
        with pytest.raises(ValueError, match=r"budget must be in 16\.\.32768"):
            Balancer([moe], BalanceRule(budget=1 << 16))


@ranks(2)
def test_balanced_or_unknown_loads_move_nothing(rank, group):
    with MoE.open(CONFIG, group) as moe:
        moe.load(**held(integer_weights(CONFIG), moe.placement, rank))
        balancer = Balancer([moe], BalanceRule(interval=1, threshold=1.2))
        balancer.step()
        ids = torch.arange(64).remainder(32).view(32, 2)
        moe(torch.zeros(32, 64), ids, torch.ones(32, 2))
        balancer.step()
        assert balancer.moved == 0


@ranks(2)
def test_a_running_job_says_its_loads_as_the_command_reads_them(rank, group, monkeypatch):
    with MoE.open(CONFIG, group) as moe:
        moe.load(**held(integer_weights(CONFIG), moe.placement, rank))
        ids = torch.arange(64).remainder(5).view(32, 2)
        moe(torch.zeros(32, 64), ids, torch.ones(32, 2))
        said = describe_loads([moe, moe])
        with pytest.raises(ValueError, match=r"layers must be at least one, .* got \[\]"):
            describe_loads([])
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(said)))
    given = loadfile.read("-")
    in_force = balance.in_force(given, None, None)
    assert in_force == (Placement.linear(32, 40, 2),) * 2
    one, published, ours = balance.compare(given.loads_NE, in_force)
    # Experts 0 to 3 have a slot on either rank (32 is expert 0 again), and so has 4.
    assert one.ratios == (1.0, 1.0)
    assert (ours.moved, len(published.placements)) == ((0, 0), 2)


@ranks(2)
def test_the_command_reads_a_running_job_from_standard_input(rank, group):
    """``epmoe balance -`` in a process of its own; the job goes on, and moves as it was told."""
    weights, steps = integer_weights(CONFIG), 20
    with MoE.open(CONFIG, group) as moe:
        moe.load(**held(weights, moe.placement, rank))
        for step in range(steps):
            moe(*batches(step, 2)[rank])
        text = json.dumps(describe_loads([moe])).encode()
        assert set(group.allgather(text, what="loads", limit_s=20)) == {text}
        answer = b""
        if rank == 0:
            argv = [sys.executable, "-m", "epmoe", "balance", "-", "--json", "--slot-bytes", "8"]
            answer = subprocess.run(argv, input=text, capture_output=True, check=True).stdout
        answer = group.allgather(answer, what="answer", limit_s=60)[0]
        said = json.loads(answer)
        assert [said[key] for key in ("layers", "experts", "slots", "ranks")] == [1, 32, 40, 2]
        now, published, ours = said["placements"].values()
        assert now["placement"] == [list(moe.placement.expert_of_S)]
        loads = json.loads(text)["loads"]
        assert sum(loads[0]) == steps * 2 * 64 * 2
        assert now["max_over_mean"] == max_over_mean(loads, [moe.placement])
        assert ours["max_over_mean"][0] <= published["max_over_mean"][0] < now["max_over_mean"][0]
        assert 0 < ours["moved_slots"][0] < published["moved_slots"][0]
        moe.place(Placement.of(ours["placement"][0], experts=32, ranks=2))
        batch = batches(steps, 2)
        want = reference_moe(*map(list, zip(*batch, strict=True)), weights, CONFIG)
        assert torch.equal(moe(*batch[rank]), want[rank])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0),
        ("window", 0),
        ("decay", 0.0),
        ("threshold", 0.9),
        ("enough", 0.9),
        ("gain", -0.1),
        ("gain", float("nan")),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        BalanceRule(**{field: value})


def test_a_float_where_a_number_is_counted_is_refused():
    """It would be a slice's end rounds later, on all ranks."""
    for field in ("interval", "window"):
        with pytest.raises(TypeError, match=f"{field} must be an int, got float"):
            BalanceRule(**{field: 1e3})
    with pytest.raises(TypeError, match="window must be an int, got float"):
        Loads(experts=2, window=1e3)
    with pytest.raises(TypeError, match="budget must be an int, got float"):
        check_budget(CONFIG, 1e4)
