"""In which order a GPU round and what it carries are enqueued; told by stand-ins, without a GPU."""

import pytest
import torch

from epmoe import MoEConfig
from epmoe.cuda_rounds import CudaRounds
from epmoe.kernels.ops import HEAD_FIELDS, VERBS

CONFIG = MoEConfig(experts=4, choices=1, hidden=64, inner=64, max_rows=4, heap="cuda", dtype="bf16")


class Told:
    """Whatever is called on it is noted under its name."""

    def __init__(self, notes):
        self._notes = notes

    def __getattr__(self, name):
        def noted(*args, **kwargs):
            self._notes.append((name, *sorted(kwargs.items())))

        return noted


class Turn:
    round = 1


def enqueued(verb, *, freight):
    notes, turn = [], Turn()
    rounds = object.__new__(CudaRounds)
    rounds._config, rounds._shared, rounds._table = CONFIG, {}, None
    rounds.ops, rounds._verbs, rounds._words = Told(notes), Told(notes), Told(notes)
    head = [0] * len(HEAD_FIELDS)
    head[HEAD_FIELDS.index("verb")] = VERBS.index(verb)
    x = torch.zeros(2 if verb == "forward" else 0, 64, dtype=torch.bfloat16)
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    rounds.run(turn, x, ids, ids.float(), tuple(head), Told(notes) if freight else None)
    assert turn.round == 2
    return [note if len(note) > 1 else note[0] for note in notes if note[0] != "limit"]


def test_a_forward_is_one_launch():
    assert enqueued("forward", freight=False) == ["round"]


def test_what_a_forward_carries_is_all_there_before_the_next_launch():
    """Y goes out within the launch, so the next one may not begin before this fetch has ended."""
    want = ["load", "round", "unload", ("landed", ("now", True))]
    assert enqueued("forward", freight=True) == want


def test_a_round_without_rows_fetches_beside_its_words():
    want = ["load", "stage", "pull", "unload", "landed", "push", "reduce"]
    assert enqueued("place", freight=True) == want


@pytest.mark.parametrize("now", [False, True])
def test_landed_waits_for_the_round_before_or_for_all(now, monkeypatch):
    from epmoe.kernels.moving import CudaCarrier

    class Event:
        def __init__(self, name):
            self.name = name

        def wait(self, _):
            waited.append(self.name)

    waited, carrier = [], object.__new__(CudaCarrier)
    carrier._ends = [Event("the round before"), Event("this round")]
    carrier._halves = Told([])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    carrier.landed(now=now)
    assert waited == ["this round" if now else "the round before"]
