"""A picture of the load of every rank, layer by layer, under several placements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmoe.sched.search import Floats


def write(path: str, shares: Mapping[str, Floats]) -> None:
    """One panel per title; ``shares[title]`` is rank load over mean rank load, [layers, ranks].

    All panels have one colour scale, white at the mean, so that paler is better balanced.
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install 'epmoe[bench]'"
        ) from error
    layers, ranks = next(iter(shares.values())).shape
    away = max(float(abs(share - 1).max()) for share in shares.values()) or 1.0
    height = min(8.0, 2.2 + 0.12 * layers)
    figure = Figure(figsize=(3.6 * len(shares) + 0.9, height), layout="constrained")
    panels: Any = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axes, (title, share) in zip(panels, shares.items(), strict=True):
        image = axes.imshow(
            share,
            cmap="RdBu_r",  # white in the middle; told apart with any colour vision
            norm=TwoSlopeNorm(1.0, vmin=max(0.0, 1 - away), vmax=1 + away),
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_title(f"{title}\nmax/mean {share.max():.3f}", fontsize=10)
        axes.set_xlabel("rank")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="load / mean load")
    figure.savefig(path, dpi=150)
