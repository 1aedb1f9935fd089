"""Layers drawn from all that is promised, on ranks that share the GPUs of one process:

python tests/gpu/any_shape.py [--layers 60] [--seed 1] [--tight]

Rounds in one launch equal one rank's separate launches bit for bit (neighbours.py), and those are
as close to fp32 as bf16 is.  Dispatch and combine alone move the same layer's rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import neighbours as n
import torch
from fused_ranks import tighten
from fused_round import say

from epmoe import MoEConfig, reference_moe
from epmoe.config import ACTIVATIONS
from epmoe.kernels import sizes

CLOSE = 6e-3  # relative error, in the norm
WIDTHS = (64, 128, 192, 320, 704, 1024, 2048, 2880, 4096, 7168, 16320, 16384)
ROWS = (1, 2, 9, 63, 64, 130, 500, 2000, 20000)
MOST_WEIGHTS = 3 << 30  # values, of 2 bytes, and there are some copies
MOST_VALUES = 1 << 27  # of all rows' choices: fp32 in the reference


def layer(rng):
    """A layer, its number of ranks, how it is run."""
    while True:
        size = rng.choice([1, 2, 4, 8, 8])
        experts = size * rng.choice([1, 2, 3, 5, 16, 33, 64, 512 // size])
        hidden, inner = (rng.choice([rng.choice(WIDTHS), 64 * rng.randint(1, 256)]) for _ in "HI")
        choices, rows = rng.choice([1, 2, 3, 4, 6, 8, 11, 16]), rng.choice(ROWS)
        cells = size * rows * choices
        if (
            choices <= experts <= 512
            and 3 * experts * hidden * inner <= MOST_WEIGHTS
            and cells * max(hidden, inner) <= MOST_VALUES
            and cells <= sizes.MOST_CELLS
        ):
            break
    config = MoEConfig(
        experts=experts,
        choices=choices,
        hidden=hidden,
        inner=inner,
        max_rows=rows,
        activation=rng.choice(ACTIVATIONS),
        bias=rng.random() < 0.5,
        clamp=rng.choice([float("inf"), 1.5]),
        weight_in=rng.choice(["reduce", "fc2"]),
        heap="cuda",
    )
    cut = rng.choice([sizes.FEW, sizes.SOME, sizes.MANY])
    return config, size, {"cut": cut, "counted": rng.random() < 0.7}


def named(config):
    bias = "bias" if config.bias else "no bias"
    return (
        f"E{config.experts} K{config.choices} H{config.hidden} I{config.inner} T{config.max_rows} "
        f"{config.activation} {bias} clamp {config.clamp} {config.weight_in}"
    )


def far_from_fp32(config, weights, batches, answers):
    """What is wrong with the answers of all ranks, compared with the reference; '' if nothing."""
    x, ids, w = (torch.cat([b[i].to("cuda:0") for b in batches]) for i in range(3))
    have = torch.cat(answers).float()
    want = reference_moe([x], [ids], [w], weights, config)[0].float()
    error = float((have - want).norm() / want.norm().clamp(min=1e-9)) if len(want) else 0.0
    return "" if error < CLOSE else f"{error:.2e} from fp32"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tight", action="store_true", help="no more ring than must be")
    asked = parser.parse_args()
    if asked.tight:
        tighten()
    rng, gpus = random.Random(asked.seed), torch.cuda.device_count()
    todo = [layer(rng) for _ in range(asked.layers)]
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        jobs = [
            pool.submit(n.build, config, size, n.share(size, gpus), how_or_none, asked.tight)
            for config, size, how in todo
            for how_or_none in (how, None)
        ]
        for job in jobs:
            job.result()
    n.befriend()
    good, begun = True, time.monotonic()
    for config, size, how in todo:

        def far(weights, batches, answers, config=config):
            return far_from_fp32(config, weights, batches, answers)

        good &= n.check(named(config), config, size, asked.rounds, far, **how)
        good &= n.check_alone(config, size, asked.rounds)
        torch.cuda.empty_cache()
    say(f"{len(todo)} layers in {time.monotonic() - begun:.0f} s, seed {asked.seed}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
