"""Loads, and the placement in force if it is known, from a file that somebody else wrote."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epmoe.sched.loads import checked_loads
from epmoe.sched.search import Floats, Ints

FORMATS = """\
LOADS is a file of tokens per expert, in any unit:
  .csv         one line per layer, one column per expert; a first line of names is skipped, a first
               column named "layer" too, and so are lines that begin with #
  .npz, .npy   an array "loads" (or the only array) of shape [experts] or [layers, experts];
               beside it, if known, "placement" (the expert of every slot) and "ranks"
  .json, -     what a running job wrote with epmoe.balancer.describe_loads ("-" reads
               standard input), {"loads": ..., "ranks": ..., "placement": ...}, or a list"""


@dataclass(frozen=True, slots=True)
class LoadFile:
    """``expert_NS`` and ``ranks`` are None where the file does not say."""

    loads_NE: Floats
    expert_NS: Ints | None = None
    ranks: int | None = None


def read(path: str) -> LoadFile:
    """Read one file; a ``ValueError`` says what is wrong with it, and where."""
    kind = ".json" if path == "-" else Path(path).suffix.lower()
    try:
        match kind:
            case ".csv":
                return LoadFile(checked_loads(_csv(Path(path))))
            case ".npz" | ".npy":
                return _said(_npz(Path(path)))
            case ".json":
                text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
                found = json.loads(text)
                return _said(found if isinstance(found, dict) else {"loads": found})
            case _:
                raise ValueError(f"the name must end in .csv, .npz, .npy or .json, got {kind!r}")
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{'standard input' if path == '-' else path}: {error}") from error


def _csv(path: Path) -> list[list[float]]:
    rows: list[list[float]] = []
    skip = 0
    with path.open(newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if not cells or cells[0].lstrip().startswith("#"):
                continue
            try:
                rows.append([float(cell) for cell in cells[skip:]])
            except ValueError:
                if rows or skip:
                    raise ValueError(f"line {number} is not all numbers: {cells[:4]}") from None
                skip = int(cells[0].strip().lower() == "layer")
    if not rows:
        raise ValueError("no line of loads")
    return rows


def _npz(path: Path) -> dict[str, Any]:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return {"loads": found}
    with found:
        names = list(found)
        if "loads" not in names and len(names) == 1:
            return {"loads": found[names[0]]}
        return {name: found[name] for name in names}


def _said(values: dict[str, Any]) -> LoadFile:
    if "loads" not in values:
        raise ValueError(f'no "loads", only {sorted(values)}')
    loads_NE = checked_loads(values["loads"])
    ranks, expert_NS = values.get("ranks"), values.get("placement")
    if ranks is not None:
        if int(ranks) != ranks:
            raise ValueError(f"ranks must be a whole number, got {ranks}")
        ranks = int(ranks)
    if expert_NS is not None:
        given = np.array(expert_NS, ndmin=2)
        if given.dtype.kind not in "iu" or len(given) != len(loads_NE):
            raise ValueError(
                f"placement must hold whole numbers, a line for each layer ({len(loads_NE)}), "
                f"got {given.dtype} of shape {given.shape}"
            )
        expert_NS = given.astype(np.int64)
    return LoadFile(loads_NE, expert_NS, ranks)
