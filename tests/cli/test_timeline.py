"""The time line of all ranks: alignment, the form of the file, the sums of each role."""

import gzip
import json

import numpy as np
import pytest
import torch

from epmoe.cli.timeline import Told, by_rank, by_role, events, left, thread, timeline, write
from epmoe.kernels.fused import NOTE, NOTES, ROLES
from epmoe.kernels.trace import HEADER, SPAN, Traced, decode, names_of

SPANS, ROLE = names_of("Span"), names_of("Role")


def told(*spans, gpu="H200", full=()):
    rows = [(cta, ROLE.index(r), SPANS.index(n), begin, end) for cta, r, n, begin, end in spans]
    return Told(gpu, Traced(5, np.array(rows, SPAN), tuple(full)))


def whole(*ends, cta=0, begin=0):
    """One CTA that tells, waits for C, works and waits for Y."""
    made = []
    for name, end in zip(("tell", "wait_c", "work", "wait_y"), ends, strict=False):
        made.append((cta, "whole_cta", name, begin, end))
        begin = end
    return made


def test_a_message_is_what_was_told():
    one = told(*whole(10, 20, 30, 40), full=[(3, "scout"), (4, "feeder")])
    back = Told.unpacked(one.packed())
    assert back.gpu == "H200"
    assert (back.traced.timer, back.traced.full) == (5, one.traced.full)
    assert back.traced.spans.tolist() == one.traced.spans.tolist()
    many = np.zeros(100_000, SPAN)
    many["end"] = np.arange(100_000) * 700
    assert len(Told("H200", Traced(0, many, ())).packed()) < many.nbytes / 3


def test_ranks_leave_wait_c_together_and_the_first_span_is_at_0():
    a = told(*whole(100, 7000, 9000, 9500), *whole(100, 7300, 9100, 9700, cta=1))
    b = told(*whole(100, 5000, 7200, 7900), *whole(100, 5600, 7200, 7600, cta=1))
    line = timeline([a, b])
    assert [left(spans, "wait_c") for spans in line.spans] == [7000, 7000]
    assert [int(spans["begin"].min()) for spans in line.spans] == [0, 2000]
    assert line.apart == 9600 - 9500  # 7600 + 2000, and 9500
    assert int(b.traced.spans["begin"].min()) == 0  # what was told is left as it was


def noted(clock, timer, rate, *spans):
    """Notes of one CTA's first role, as its kernel would leave them, by ``rate`` clocks a
    nanosecond; the role ends with its last span."""
    words = np.zeros((1, ROLES, NOTES, NOTE // 8), np.int64)
    mine, at = words[0, 0], clock
    for note, (name, ns) in zip(mine[HEADER:], spans, strict=False):
        at += ns * rate
        note[:] = at, SPANS.index(name) << 32 | ns * rate
    mine[:HEADER] = [(clock, timer), (at, timer + (at - clock) // rate)]
    return torch.from_numpy(words.view(np.uint8).reshape(-1))


def test_notes_of_gpus_whose_timers_and_clocks_disagree_become_one_line():
    """From what kernels leave to one time: rank 1's timer is an hour behind, its clock is slower,
    it began 3 us before rank 0 and waited for it."""
    hour, now = 3600 * 10**9, 1_763_703_634_000_000_000
    mine = noted(5000, now, 2, ("tell", 400), ("wait_c", 600), ("work", 9000), ("wait_y", 500))
    theirs = noted(
        70, now - hour, 1, ("tell", 400), ("wait_c", 3600), ("work", 8000), ("wait_y", 1620)
    )
    said = [Told(gpu, decode(notes, 1)) for gpu, notes in (("a", mine), ("b", theirs))]
    line = timeline([Told.unpacked(one.packed()) for one in said])
    assert [one.traced.timer for one in line.ranks] == [now, now - hour]
    assert [spans["begin"].tolist() for spans in line.spans] == [
        [3000, 3400, 4000, 13000],
        [0, 400, 4000, 12000],
    ]
    assert [spans["end"].tolist()[-1] for spans in line.spans] == [13500, 13620]
    assert line.apart == 120


def test_the_first_to_begin_may_be_another_rank_than_0():
    line = timeline([told(*whole(1, 10, 20, 30)), told(*whole(1, 400, 500, 600))])
    assert [int(spans["begin"][0]) for spans in line.spans] == [390, 0]


def test_a_rank_that_never_got_there_leaves_every_rank_its_own_time():
    got = told(*whole(100, 7000, 7500, 7600, begin=50))
    line = timeline([got, told(*whole(100, 5000, begin=40)), told()])
    assert line.apart is None
    assert [spans["begin"].tolist() for spans in line.spans] == [[0, 50, 6950, 7450], [0, 60], []]
    assert by_rank(line)[1] == by_rank(line)[1] | {"wait_c": 4.96, "wait_y": None, "spans": 2}
    assert by_rank(line)[2]["begins"] is None


def test_one_rank_is_aligned_with_itself():
    assert timeline([told(*whole(10, 20, 30, 40))]).apart == 0


def test_the_file_is_what_viewers_read(tmp_path):
    line = timeline(
        [
            told(*whole(1000, 3000, 7000, 8000), (131, "last_carrier", "find_rows", 3000, 4500)),
            told(*whole(1000, 3000, 7000, 8500), gpu="other"),
        ]
    )
    assert write(tmp_path / "t.json", line, {"shape": "dsv3"}) > 0
    made = json.loads((tmp_path / "t.json").read_text())
    assert made["displayTimeUnit"] == "ns"
    assert made["otherData"] == {"shape": "dsv3"}
    assert made["traceEvents"] == list(events(line))
    spans = [e for e in made["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == 9
    assert spans[4] == {
        "ph": "X",
        "name": "find_rows",
        "cat": "work",
        "cname": "good",
        "ts": 3.0,
        "dur": 1.5,
        "pid": 0,
        "tid": 1326,
    }
    assert [e["cat"] for e in spans[:4]] == ["work", "wait", "work", "wait"]
    said = {
        (e["pid"], e["tid"], e["name"]): e["args"] for e in made["traceEvents"] if e["ph"] == "M"
    }
    assert said[1, 0, "process_name"] == {"name": "rank 1"}
    assert said[1, 0, "process_labels"] == {"labels": "other"}
    assert said[0, 1326, "thread_name"] == {"name": "CTA 131 last carrier"}
    assert said[0, 1326, "thread_sort_index"] == {"sort_index": 1326}
    assert {(e["pid"], e["tid"]) for e in spans} == {
        (pid, tid) for pid, tid, name in said if name == "thread_name"
    }


def test_a_file_that_ends_in_gz_is_packed(tmp_path):
    line = timeline([told(*whole(10, 20, 30, 40))])
    write(tmp_path / "t.json.gz", line, {})
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        assert len(json.load(file)["traceEvents"]) == 9


def test_no_spans_make_a_whole_file_too(tmp_path):
    write(tmp_path / "t.json", timeline([told()]), {})
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) == 3


def test_threads_are_apart_from_each_other_and_from_ranks():
    numbers = {thread(cta, role) for cta in range(160) for role in range(len(ROLE))}
    assert len(numbers) == 160 * len(ROLE)
    assert min(numbers) > 8


def test_sums_are_of_the_ctas_that_have_the_span():
    line = timeline(
        [
            told(
                *whole(1000, 2000, 7000, 8000),
                *whole(1500, 3000, 7000, 9000, cta=1),
                (1, "scout", "turn_id", 3000, 3200),
                (1, "scout", "idle", 3200, 4000),
                (1, "scout", "turn_id", 4000, 4500),
            ),
            told(*whole(1000, 2000, 7000, 8000)),
        ]
    )
    found = {(row["role"], row["span"]): row for row in by_role(line)}
    assert list(found) == [
        *(("whole_cta", name) for name in ("tell", "wait_c", "work", "wait_y")),
        *(("scout", name) for name in ("turn_id", "idle")),
    ]
    assert found["whole_cta", "wait_c"] == {
        "role": "whole_cta",
        "span": "wait_c",
        "waits": True,
        "ctas": 3,  # CTA 0 of rank 1 is another one than CTA 0 of rank 0
        "times": 1.0,
        "us": pytest.approx((1000 + 1500 + 1000) / 3 / 1e3, abs=1e-3),
        "from": 1.0,
        "to": 3.0,
    }
    assert found["scout", "turn_id"] == found["scout", "turn_id"] | {
        "ctas": 1,
        "times": 2.0,
        "us": 0.7,
        "from": 3.0,
        "to": 4.5,
    }


def test_each_rank_says_when_it_was_where():
    line = timeline(
        [told(*whole(1000, 2000, 7000, 8000)), told(*whole(500, 1000, 7000, 9000), full=[(0, "x")])]
    )
    assert by_rank(line)[1] == {
        "rank": 1,
        "gpu": "H200",
        "begins": 1.0,
        "wait_c": 2.0,
        "wait_y": 10.0,
        "ends": 10.0,
        "spans": 4,
        "full": 1,
    }
