"""What benchmarks/generate.py measured, as the tables of docs/notes/generate.md:

python benchmarks/generate_table.py benchmarks/results/generate-h200x2-2026-11-21.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]
HEAD = ("prompts a GPU", "experts", "prefill, tokens/s", "`generate`, tokens/s") + (
    "captured decode, tokens/s",
    "captured step, us",
    "experts alone, us a layer",
    "a call in Python, us",
)
WAYS = {"prefill": "prefill", "decode": "decoded"}


def tables(report: Found) -> Iterator[str]:
    """Lines of Markdown: times by prompts and side, then errors and memory."""
    yield from _table(HEAD, 2, list(_times(report["sides"])))
    yield ""
    head = ["relative error of logits from float32"]
    head += [f"{said}, {what}" for said in WAYS.values() for what in ("median token", "all tokens")]
    errors = [
        (side, *(f"{100 * found[way + of]:.1f} %" for way in WAYS for of in ("", ", whole")))
        for side, found in report["errors"].items()
    ]
    yield from _table(head, 1, errors)
    yield ""
    most = str(report["asked"]["prompt"] * max(report["asked"]["batch"]))
    rest = [
        (side, _n(found["experts"].get(most, {}), "us"), f"{found['memory_gib']:.1f}")
        for side, found in report["sides"].items()
    ]
    head = ["", f"experts of {int(most):,} rows alone, us a layer", "GiB of a GPU at the peak"]
    yield from _table(head, 1, rest)


def _times(sides: Found) -> Iterator[tuple[str, ...]]:
    """Transformers' sides as two: prefill and captured steps by grouped_mm, and what ``generate``
    changes to for decoding.  A run from before both were measured has gaps."""
    for rows in next(iter(sides.values()))["batches"]:
        for side, found in sides.items():
            batch, alone = found["batches"][rows], found["experts"].get(rows, {})
            if side == "epmoe":
                yield rows, side, _n(batch, "prefill_tokens_s"), *_decode(batch, alone, "", "")
                continue
            who = {"grouped_mm": ""}.get(side, side.split(", ")[0] + ", ")
            yield (
                *(rows, f"{who}grouped_mm", _n(batch, "prefill_tokens_s")),
                *_decode(batch, alone, "grouped_", ""),
            )
            yield rows, f"{who}batched_mm", "", *_decode(batch, alone, "", "batched_")


def _decode(batch: Found, alone: Found, generated: str, other: str) -> tuple[str, ...]:
    return (
        _n(batch, f"{generated}generate_decode_tokens_s"),
        _n(batch, f"{other}graph_decode_tokens_s"),
        _n(batch, f"{other}graph_step_us"),
        _n(alone, f"{other}us"),
        _n(alone, f"{other}host_us"),
    )


def _n(found: Found, name: str) -> str:
    return f"{found[name]:,.0f}" if name in found else "-"


def _table(head: Any, left: int, rows: list[tuple[str, ...]]) -> Iterator[str]:
    for cells in (head, ["---"] * left + ["--:"] * (len(head) - left), *rows):
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n".join(tables(json.loads(Path(name).read_text()))))
