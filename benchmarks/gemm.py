"""The grouped GEMM beside torch._grouped_mm on one GPU: cold caches, random data, medians.

    python benchmarks/gemm.py [--wide | --narrow] [--json FILE]

Every variant of a shape is timed in turns with the others, so that clocks and heat meet all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from epmoe.kernels.gemm import grouped_gemm, starts

SHAPES = {  # hidden, inner, slots on one of 8 ranks
    "dsv3": (7168, 2048, 32),
    "qwen3-235b": (4096, 1536, 16),
    "qwen3-30b": (2048, 768, 16),
    "mixtral": (4096, 14336, 1),
    "gpt-oss": (2880, 2880, 16),
}


def counts_of(slots: int, rows: int, skewed: bool) -> list[int]:
    """``rows`` for each slot, or as many rows in all thrown at random."""
    if not skewed:
        return [rows] * slots
    torch.manual_seed(7)
    return torch.randint(slots, (slots * rows,)).bincount(minlength=slots).tolist()


def times(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median microseconds of each, by events, after 200 MB of other traffic through the caches."""
    flush = torch.empty(200 << 20, dtype=torch.uint8, device="cuda")
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, run in variants.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(300000)  # longer than any of them takes to enqueue
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 2:
                taken[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(t) for name, t in taken.items()}


def compare(
    shape: str, which: str, counts: list[int], hows: dict[str, dict[str, Any]], rounds: int
) -> dict[str, Any]:
    hidden, inner, slots = SHAPES[shape]
    n, k = (2 * inner, hidden) if which == "fc1" else (hidden, inner)
    at = starts(counts)
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    rows = torch.randn(at[-1], k, **bf16)
    weights = torch.randn(slots, n, k, **bf16) * k**-0.5
    compact = torch.cat([rows[a : a + c] for a, c in zip(at, counts, strict=False)])
    offsets = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    device_counts = torch.tensor(counts, dtype=torch.int32, device="cuda")
    shares = torch.zeros(2, dtype=torch.int32, device="cuda")
    want = torch._grouped_mm(compact, weights.transpose(1, 2), offs=offsets)
    variants: dict[str, Callable[[], None]] = {
        "torch": lambda: torch._grouped_mm(compact, weights.transpose(1, 2), offs=offsets)
    }
    errors = {}
    for name, how in hows.items():
        act = how.get("activation")
        out = torch.full((at[-1], n // 2 if act else n), 3e4, **bf16)
        how = {**how, "shares": shares if how.get("shares") else None}
        launch = grouped_gemm(rows, weights, out, device_counts, **how)
        stream = torch.cuda.current_stream().cuda_stream
        launch.enqueue(stream)
        torch.cuda.synchronize()
        if not act:
            got = torch.cat([out[a : a + c] for a, c in zip(at, counts, strict=False)])
            errors[name] = ((got.float() - want.float()).norm() / want.float().norm()).item()
        variants[name] = lambda launch=launch, stream=stream: launch.enqueue(stream)
    taken = times(variants, rounds)
    flop = 2.0 * sum(counts) * n * k
    moved = 2.0 * sum(1 for c in counts if c) * n * k
    return {
        "shape": shape,
        "gemm": which,
        "rows": sum(counts) / slots,
        "us": taken,
        "tflops": {name: flop / t / 1e6 for name, t in taken.items()},
        "weights_tb_s": {name: moved / t / 1e6 for name, t in taken.items()},
        "error": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", default="dsv3,qwen3-235b,qwen3-30b,mixtral")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    both = asked.wide == asked.narrow
    found = []
    print(torch.cuda.get_device_name(), "torch", torch.__version__)  # noqa: T201
    wide = {
        "wide": {},
        "counter": {"shares": True},
        "swiglu": {"activation": "swiglu"},
    }
    narrow = {
        "64": {"tall": 64},
        "64 counter": {"tall": 64, "shares": True},
        "128": {"tall": 128},
        "128 counter": {"tall": 128, "shares": True},
        "wide": {},
    }
    for shape in asked.shapes.split(","):
        for which in ("fc1", "fc2"):
            todo = []
            if asked.wide or both:
                todo += [(512, True, wide), (2048, False, wide)]
            if asked.narrow or both:
                todo += [(4, True, narrow), (16, True, narrow), (32, False, narrow)]
            for rows, skewed, hows in todo:
                if shape == "mixtral":
                    rows *= 4
                if which == "fc2":
                    hows = {name: how for name, how in hows.items() if "activation" not in how}
                counts = counts_of(SHAPES[shape][2], rows, skewed)
                one = compare(shape, which, counts, hows, asked.rounds)
                found.append(one)
                unit = "tflops" if "counter" in hows else "weights_tb_s"
                line = "  ".join(
                    f"{m} {v:.2f}" if unit != "tflops" else f"{m} {v:.0f}"
                    for m, v in one[unit].items()
                )
                worst = max(one["error"].values())
                print(
                    f"{shape:10s} {which} {one['rows']:6.0f} rows {unit:12s} {line}  "  # noqa: T201
                    f"error {worst:.1e}",
                    flush=True,
                )
                torch.cuda.empty_cache()
    if asked.json:
        asked.json.write_text(
            json.dumps(
                {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "found": found},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
