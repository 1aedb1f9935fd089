"""The load of one rank of many, on the few that there are: a part of a layer, as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from epmoe.config import MoEConfig


def share(config: MoEConfig, ranks: int, of: int) -> MoEConfig:
    """``config`` with fewer experts: each of ``ranks`` ranks holds what a rank of ``of`` would.

    Rows of each rank times choices are its GEMMs' rows on any number of ranks, so each gets as many
    rows too.  Its name says what it is.  With ``of == ranks`` it is ``config`` itself.

    Example: dsv3 (256 experts, 8 choices), 2 ranks, the load of 8: 64 experts, 32 a rank.
    A row wants different experts, so ``choices`` are left at least: mixtral (8, 2) on 1 rank keeps
    2, twice what a rank of 8 holds.
    """
    if of < ranks:
        raise ValueError(f"--load-of must be at least the number of ranks ({ranks}), got {of}")
    if of == ranks:
        return config
    if config.experts % of:
        raise ValueError(
            f"--load-of must divide the experts of {config.name} ({config.experts}), got {of}"
        )
    each = max(config.experts // of, -(-config.choices // ranks))
    return replace(config, experts=each * ranks, slots=0, name=f"{config.name} load-of-{of}")


def warning(whole: Sequence[MoEConfig], ranks: int, of: int) -> list[str]:
    """What must stand over every figure of ``share``; nothing if ``of == ranks``.

    >>> from epmoe.shapes import shape
    >>> for line in warning([shape("mixtral", max_rows=1)], 1, 8):
    ...     print(line)
    NOT a layer on 8 GPUs: the load of one rank of 8, on 1
    0 of the choices cross NVLink, not 7/8; a round waits for 1 rank, not for 8
    mixtral: 2 of 8 experts, 2 a rank (a rank of 8 holds 1: not its load)
    """
    if of == ranks:
        return []
    crossing = f"{ranks - 1}/{ranks}" if ranks > 1 else "0"
    lines = [
        f"NOT a layer on {of} GPUs: the load of one rank of {of}, on {ranks}",
        f"{crossing} of the choices cross NVLink, not {of - 1}/{of}; a round waits for {ranks} "
        f"rank{'s' if ranks > 1 else ''}, not for {of}",
    ]
    for one in whole:
        kept, held = share(one, ranks, of).experts, one.experts // of
        line = f"{one.name}: {kept} of {one.experts} experts, {kept // ranks} a rank"
        if kept != held * ranks:
            line += f" (a rank of {of} holds {held}: not its load)"
        lines.append(line)
    return lines
