"""The traced rounds of all ranks as one line of time."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from epmoe.kernels.trace import SPAN, WAITS, Spans, Traced, names_of

FRONT = struct.Struct("<I")  # bytes of a message's JSON; the spans come behind it
COLOURS = {"wait": "grey", "work": "good"}  # chrome://tracing's own names; Perfetto has its own


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank says of its round."""

    gpu: str
    traced: Traced

    def packed(self) -> bytes:
        """As a message for ``Group.allgather``."""
        traced = self.traced
        front = json.dumps({"gpu": self.gpu, "timer": traced.timer, "full": traced.full}).encode()
        return FRONT.pack(len(front)) + front + zlib.compress(traced.spans.tobytes(), 1)

    @classmethod
    def unpacked(cls, message: bytes) -> Self:
        """What ``packed`` made."""
        (size,) = FRONT.unpack_from(message)
        front = json.loads(message[FRONT.size : FRONT.size + size])
        spans = np.frombuffer(zlib.decompress(message[FRONT.size + size :]), SPAN)
        full = tuple((cta, role) for cta, role in front["full"])
        return cls(front["gpu"], Traced(front["timer"], spans, full))


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans by rank, nanoseconds since the first began.

    ``apart``: how far from each other the ranks then leave wait_y, which in truth they leave
    within a few microseconds too: the error to expect between ranks.  None: the ranks share no
    event, so each has a time of its own, which begins with its first span.
    """

    ranks: tuple[Told, ...]
    spans: tuple[Spans, ...]
    apart: int | None


def timeline(told: Sequence[Told]) -> Timeline:
    """All ranks on one time, by the moment at which each leaves wait_c.

    The timers of GPUs are not promised to agree, but a rank leaves wait_c when the last of all
    words C has come, and that word goes to all ranks at once: within a link's latency and what
    CTAs that tell differ by.  The CTA that polls for its rank is the first of it to leave.

    Example: rank 0 leaves wait_c at 7000 of its own nanoseconds, rank 1 at 5000, both begin at 0:
    rank 1's spans move by 2000.
    """
    own = [one.traced.spans for one in told]
    met = [(left(spans, "wait_c"), left(spans, "wait_y")) for spans in own]
    known = [(c, y) for c, y in met if c is not None and y is not None]
    aligned = len(known) == len(told)
    zeros = [c for c, _ in known] if aligned else [_begun(spans) for spans in own]
    moved = [_later(spans, -zero) for spans, zero in zip(own, zeros, strict=True)]
    begun = min(_begun(spans) for spans in moved)
    moved = [_later(spans, -begun) for spans in moved]
    since = [y - c for c, y in known]
    apart = max(since) - min(since) if aligned else None
    return Timeline(tuple(told), tuple(moved), apart)


def _begun(spans: Spans) -> int:
    return int(spans["begin"].min()) if len(spans) else 0


def _later(spans: Spans, by: int) -> Spans:
    moved = spans.copy()
    moved["begin"] += by
    moved["end"] += by
    return moved


def left(spans: Spans, name: str) -> int | None:
    """When the first CTA was through ``name``; None if none was."""
    ends = spans["end"][spans["name"] == names_of("Span").index(name)]
    return int(ends.min()) if len(ends) else None


def thread(cta: int, role: int) -> int:
    """A number above every rank's, since viewers take a thread of its process's number for the
    main one, and 0 for the machine's idling.

    >>> thread(0, 0), thread(131, 6)
    (10, 1326)
    """
    return 10 * (cta + 1) + role


def events(line: Timeline) -> Iterator[dict[str, Any]]:
    """Chrome's trace events: a process for each rank, a thread for each role of each CTA."""
    roles, names = names_of("Role"), names_of("Span")

    def named(kind: str, pid: int, tid: int, **said: object) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": said}

    for rank, (told, spans) in enumerate(zip(line.ranks, line.spans, strict=True)):
        yield named("process_name", rank, 0, name=f"rank {rank}")
        yield named("process_labels", rank, 0, labels=told.gpu)
        yield named("process_sort_index", rank, 0, sort_index=rank)
        for cta, role in sorted(set(spans[["cta", "role"]].tolist())):
            tid = thread(cta, role)
            who = roles[role].replace("_", " ")
            yield named("thread_name", rank, tid, name=f"CTA {cta:03} {who}")
            yield named("thread_sort_index", rank, tid, sort_index=tid)
        for cta, role, name, begin, end in spans.tolist():
            what = "wait" if names[name] in WAITS else "work"
            yield {
                "ph": "X",
                "name": names[name],
                "cat": what,
                "cname": COLOURS[what],
                "ts": begin / 1e3,
                "dur": (end - begin) / 1e3,
                "pid": rank,
                "tid": thread(cta, role),
            }


def write(path: Path, line: Timeline, about: Mapping[str, Any]) -> int:
    """The file for ui.perfetto.dev, packed if its name ends in .gz; its bytes."""
    head = json.dumps({"displayTimeUnit": "ns", "otherData": about})[:-1]
    with gzip.open(path, "wt", 5) if path.suffix == ".gz" else path.open("w") as file:
        file.write(f'{head}, "traceEvents": [')
        for i, event in enumerate(events(line)):
            file.write((",\n" if i else "\n") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")
    return path.stat().st_size


def by_role(line: Timeline) -> list[dict[str, Any]]:
    """For each role its spans, by first begin, over all ranks.

    ``ctas`` have the span, each of them ``times`` times and ``us`` in all on average; the first
    begins at ``from`` and the last ends at ``to`` microseconds.
    """
    roles, names = names_of("Role"), names_of("Span")
    every = np.concatenate(line.spans)
    owner = np.repeat(np.arange(len(line.spans)), [len(spans) for spans in line.spans])
    found = []
    for role in np.unique(every["role"]):
        rows = []
        for name in np.unique(every["name"][every["role"] == role]):
            chosen = (every["role"] == role) & (every["name"] == name)
            these, ctas = every[chosen], len(np.unique(owner[chosen] << 16 | every["cta"][chosen]))
            rows.append(
                {
                    "role": roles[role],
                    "span": names[name],
                    "waits": names[name] in WAITS,
                    "ctas": ctas,
                    "times": round(len(these) / ctas, 2),
                    "us": round(float((these["end"] - these["begin"]).sum()) / ctas / 1e3, 3),
                    "from": int(these["begin"].min()) / 1e3,
                    "to": int(these["end"].max()) / 1e3,
                }
            )
        found += sorted(rows, key=lambda row: (row["from"], row["to"]))
    return found


def by_rank(line: Timeline) -> list[dict[str, Any]]:
    """For each rank when it begins, leaves wait_c and wait_y, and ends, in microseconds."""

    def us(at: int | None) -> float | None:
        return None if at is None else at / 1e3

    return [
        {
            "rank": rank,
            "gpu": told.gpu,
            "begins": us(int(spans["begin"].min())) if len(spans) else None,
            "wait_c": us(left(spans, "wait_c")),
            "wait_y": us(left(spans, "wait_y")),
            "ends": us(int(spans["end"].max())) if len(spans) else None,
            "spans": len(spans),
            "full": len(told.traced.full),
        }
        for rank, (told, spans) in enumerate(zip(line.ranks, line.spans, strict=True))
    ]
