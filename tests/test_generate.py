"""Text that N ranks write together is the text that one eager model writes, token for token."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ranks, world_of_mpi
from test_transformers import (  # noqa: F401  the fixture is for every test
    FAMILIES,
    load,
    make,
    many_ranks,
    one_rank,
    options_of_a_test_are_its_own,
    torch_ranks,
)

import epmoe.transformers
from epmoe import BalanceRule, Group, local
from epmoe.transformers.lockstep import _cut

ROOT = Path(__file__).parents[1]
NEW = 64
DICE = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(1, 64, (n,), generator=DICE).tolist() for n in (3, 11, 1, 7, 5, 19, 2, 8)]
SPLIT = {1: [8], 2: [8, 0], 4: [5, 0, 1, 2]}  # prompts of each rank


def mine(texts, rank, size):
    at = sum(SPLIT[size][:rank])
    return texts[at : at + SPLIT[size][rank]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints, and what eager transformers writes behind all prompts in one padded batch.

    The end token is one that comes up, so that texts end at different lengths.
    """
    folder, texts = tmp_path_factory.mktemp("models"), {}
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = (torch.arange(longest) >= longest - torch.tensor([[len(p)] for p in PROMPTS])).long()
    for family in FAMILIES:
        model = make(family)
        model.generation_config.eos_token_id = 2
        model.save_pretrained(folder / family)
        model.set_experts_implementation("eager")
        out = model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=0, max_new_tokens=NEW, do_sample=False
        )
        rows = [row[longest - len(p) :].tolist() for row, p in zip(out, PROMPTS, strict=True)]
        texts[family] = [_cut(row, len(p), {2}) for row, p in zip(rows, PROMPTS, strict=True)]
    early = [t for f in FAMILIES for t in texts[f] if t[-1] == 2]
    assert 0 < len(early) < len(FAMILIES) * len(PROMPTS)
    return folder, texts


def test_a_text_ends_with_its_first_end_behind_the_prompt():
    assert _cut([2, 5, 7, 2, 0, 0], 2, {2}) == [2, 5, 7, 2]
    assert _cut([2, 5, 7], 2, {2}) == [2, 5, 7]
    assert _cut([2, 5, 9, 2], 2, {9, 2}) == [2, 5, 9]


@one_rank
@pytest.mark.skipif(world_of_mpi() > 1, reason="one rank")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_writes_the_same(written, family):
    folder, texts = written
    model = load(folder, family, experts_implementation="epmoe")
    got = epmoe.transformers.generate(model, PROMPTS, max_new_tokens=NEW, do_sample=False)
    assert got == texts[family]


@many_ranks
@ranks(2, 4)
def test_ranks_write_the_same_and_one_has_no_prompt(group, written):
    folder, texts = written
    with torch_ranks(group):
        for family in FAMILIES:
            where = epmoe.transformers.spread(folder / family, group.size)
            model = load(folder, family, **where)
            given = mine(PROMPTS, group.rank, group.size)
            got = epmoe.transformers.generate(model, given, max_new_tokens=NEW, do_sample=False)
            assert got == mine(texts[family], group.rank, group.size), family
            epmoe.transformers.close(model)


@many_ranks
@ranks(2)
def test_a_batch_that_all_ranks_share(group, written):
    folder, texts = written
    with torch_ranks(group):
        for family in ("DeepseekV3Config", "GptOssConfig"):
            where = epmoe.transformers.spread(folder / family, group.size, shared=True)
            model = load(folder, family, **where)
            got = epmoe.transformers.generate(model, PROMPTS, max_new_tokens=NEW, do_sample=False)
            assert got == texts[family], family


@many_ranks
@ranks(2)
def test_a_rank_without_prompts_adds_no_load(group, written):
    folder, _ = written
    family = "MixtralConfig"
    with torch_ranks(group):
        model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
        given = [PROMPTS[1]] if group.rank == 0 else []
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 63}
        (text,) = epmoe.transformers.generate(model, given, **options) or [[]]
        if group.rank == 0:
            assert len(text) == len(PROMPTS[1]) + 4
        for moe in epmoe.transformers.layers(model):
            assert int(moe.loads().sum()) == (len(PROMPTS[1]) + 3) * moe.config.choices


@many_ranks
@ranks(4)
def test_experts_move_while_text_is_written(group, written):
    folder, texts = written
    family = "Qwen3MoeConfig"
    with torch_ranks(group):
        epmoe.transformers.register(freight=1 << 16, max_rows=32)
        model = load(folder, family, **epmoe.transformers.spread(folder / family, group.size))
        rule = BalanceRule(interval=4, threshold=1.0, gain=0.01, budget=1 << 12)
        (balancer,) = epmoe.transformers.balance(model, rule)
        given = mine(PROMPTS, group.rank, group.size)
        got = epmoe.transformers.generate(model, given, max_new_tokens=NEW, do_sample=False)
        assert got == mine(texts[family], group.rank, group.size)
        assert balancer.moved


@many_ranks
@pytest.mark.skipif(world_of_mpi() > 1, reason="kills its ranks, and mpirun would end the job")
def test_a_rank_that_dies_while_text_is_written_leaves_nobody_waiting(written):
    folder, _ = written

    def body(rank):
        with Group.from_env(limit_s=30) as group, torch_ranks(group):
            where = epmoe.transformers.spread(folder / "MixtralConfig", 4)
            model = load(folder, "MixtralConfig", **where)
            steps = itertools.count()

            def die(*_):
                if rank == 2 and next(steps) == 10:
                    os._exit(7)

            model.model.layers[1].mlp.register_forward_pre_hook(die)
            epmoe.transformers.generate(model, PROMPTS[:2], max_new_tokens=NEW, do_sample=False)

    with local.fork_ranks(4, body, end_others=False) as job:
        outcomes = job.wait(40)
    assert outcomes[2].code == 7
    for rank in (0, 1, 3):
        assert outcomes[rank].error.type in ("PeerLost", "EpmoeError"), outcomes[rank].log
        assert "rank 2" in outcomes[rank].error.text
    ends = [outcome.ended_s for outcome in outcomes]
    assert max(ends) - ends[2] < 20


@one_rank
def test_an_empty_prompt_is_refused():
    model = make("MixtralConfig")
    with pytest.raises(ValueError, match="at least one token"):
        epmoe.transformers.generate(model, [[1], []])


# --- the example ---


def words_of(said):
    """The written texts, without who wrote them."""
    return sorted(line for line in said.splitlines() if line.startswith("  ") and line.strip())


@many_ranks
@pytest.mark.skipif(world_of_mpi() > 1, reason="starts its own ranks")
def test_the_example_writes_the_same_on_any_number_of_ranks():
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), "--tiny", "--new", "6"]
    env = {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    said = []
    for size in (1, 2):
        job = local.run(size, command, limit_s=100, env=env)
        assert job.first is None, job.first.log
        said.append(job.outcomes[0].log)
    assert len(words_of(said[0])) == 6
    assert words_of(said[0]) == words_of(said[1])
    assert "tokens/s on 2 ranks" in said[1]
    assert "rank 1 " in said[1].splitlines()[-1]


@many_ranks
@pytest.mark.skipif(world_of_mpi() > 1, reason="starts its own ranks")
@pytest.mark.skipif(
    not (Path(sys.executable).parent / "mpirun").exists(),
    reason="no mpirun beside this python: pip install 'epmoe[mpi]'",
)
def test_the_example_runs_under_mpirun():
    example = ROOT / "examples" / "generate.py"
    done = subprocess.run(
        [ROOT / "launch" / "mpirun.sh", "2", sys.executable, example, "--tiny", "--new", "6"],
        env=dict(os.environ, PYTHONPATH=str(ROOT), TRANSFORMERS_VERBOSITY="error"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(words_of(done.stdout)) == 6
    assert "tokens/s on 2 ranks" in done.stdout
