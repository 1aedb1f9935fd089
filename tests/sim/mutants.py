# ruff: noqa: E501  # texts of other files
"""The host code, broken in one place at a time: what a simulation is worth is what it finds.

Each mutant names a module, what to put in place of what, and a seed that finds it.  A new rule of
the protocol adds a mutant here.  One that survives is looked at: either the test is too weak, or
the line is not needed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

EPMOE = Path(__file__).parents[2] / "epmoe"

LISTS = """            self._lists[peer][self.rank, : len(cells)] = cells
            signals.pause()
"""
C_WORD = """            self.words.publish(C, peer, round, len(cells))
"""
PAUSE = "            signals.pause()\n"
COUNTS = """            self._counts[peer][self.rank] = counts_S
            signals.pause()
"""
STAGED_WEIGHTS = """        if self.config.weight_in == "fc2":
            self._weights[self.rank][:rows] = weights_TK
"""
RESULTS = """            self._cells[src][plan.cells_R[src]] = results[plan.plan.source(src)]
            signals.pause()
"""
Y_WORD = """            self.words.publish(Y, src, round, 0)
"""
GONE = """            gone = [r for r in lacking if r in self._lost or self.seen(LEAVE, r)]
            pause(spins)
            lacking = [r for r in lacking if not self._came(kind, r, round)]
"""
STAGED_ROW = "            mine[:rows] = staged[name].flatten(1)\n"


@dataclass(frozen=True)
class Mutant:
    """``changes`` are (old, new) texts of one module; ``seed`` is one that finds it."""

    name: str
    module: str
    changes: tuple[tuple[str, str], ...]
    seed: int = 0


def host(name, *changes, seed=0):
    return Mutant(name, "epmoe.kernels.host", changes, seed)


def words(name, *changes, seed=0):
    return Mutant(name, "epmoe.comm.words", changes, seed)


MUTANTS = (
    host("C leaves before the list", (LISTS + C_WORD, C_WORD + PAUSE + LISTS)),
    host(
        "C leaves before the counts",
        (COUNTS, ""),
        (C_WORD, C_WORD + PAUSE + COUNTS),
    ),
    host(
        "router weights are staged after C",
        (STAGED_WEIGHTS, ""),
        (C_WORD, C_WORD + "        signals.pause()\n" + STAGED_WEIGHTS),
    ),
    host(
        "rows are staged after C",
        (STAGED_ROW, "            pass\n"),
        (
            C_WORD,
            C_WORD
            + "        signals.pause()\n        for name, mine in self._staged.items():\n"
            + STAGED_ROW,
        ),
    ),
    host("C only to owners of a choice", (C_WORD, "            if len(cells):\n    " + C_WORD)),
    host("Y leaves before the results", (RESULTS + Y_WORD, Y_WORD + PAUSE + RESULTS)),
    host(
        "no Y to a source without rows",
        (Y_WORD, "            if len(plan.cells_R[src]):\n    " + Y_WORD),
    ),
    host(
        "offsets are read in the mailbox after the first Y",
        (
            RESULTS,
            "            asked_R = self._counts[self.rank].reshape(self.ranks, self.ranks, -1)[:, self.rank]\n"
            "            start = int(asked_R.sum(1)[:src].sum())\n"
            + RESULTS.replace("plan.plan.source(src)", "start : start + len(plan.cells_R[src])"),
        ),
        seed=61,
    ),
    host(
        "no wait for C",
        (
            "asked_R = self.words.wait(C, round, limit_s)",
            "asked_R = [self.words.seen(C, r) % (1 << 31) for r in range(self.ranks)]",
        ),
    ),
    host("no wait for Y", ("        self.words.wait(Y, round, limit_s)\n", "")),
    host(
        "results go to another source",
        ("self._cells[src][plan", "self._cells[src - 1][plan"),
    ),
    host("choices are summed in another order", ("in range(1, choices):", "in range(1, choices)[::-1]:")),
    host(
        "the cell of an unused choice is read",
        ("if masked:", "if False:"),
    ),
    host("all lanes use the regions of the first", ("placed.lanes[lane]", "placed.lanes[0]")),
    words(
        "the words are read before who is gone",
        (
            GONE,
            GONE.splitlines(keepends=True)[2] + "".join(GONE.splitlines(keepends=True)[1::-1]),
        ),
        seed=358,
    ),
    words(
        "a death stops also those who need nothing",
        (
            "gone if r in lacking and self._left_by(r, round)]",
            "range(self.ranks) if r in self._lost or r in lacking and self._left_by(r, round)]",
        ),
        ("            if not lacking:\n", "            if not lacking and not self._lost:\n"),
    ),
    words(
        "a leaving rank names the round after", ("(LEAVE, peer, why.round,", "(LEAVE, peer, why.round + 1,")
    ),
    words("an older round's word will do", ("return behind == 0", "return behind <= 1")),
    words(
        "the last words blame whoever left",
        ("causes.append(LastWords.decoded(bytes(self._say[src].tolist()), src))",
         "causes.append(LastWords('raised', (src,), round, ''))"),
    ),
    Mutant(
        "a refused batch takes no part",
        "epmoe.moe",
        (("            if refused is not None:\n", "            if refused is not None:\n                raise refused\n"),),
    ),
    Mutant(
        "a refused batch ends its round early",
        "epmoe.moe",
        (("plan_chunks(context.rows, max_rows)", "plan_chunks((rows,) * size, max_rows)"),),
    ),
    Mutant(
        "an exception is kept from the peers",
        "epmoe.runtime",
        (("        self._leave(why)\n", ""),),
    ),
    Mutant(
        "a choice named twice is asked once",
        "epmoe.sched.plan",
        (
            (
                "flat = slots_TK.reshape(-1)",
                "flat = slots_TK.masked_fill((slots_TK[:, :, None] == slots_TK[:, None, :])"
                ".tril(-1).any(-1), -1).reshape(-1)",
            ),
        ),
    ),
)  # fmt: skip


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from its changed source."""

    def __init__(self, mutant):
        self.mutant = mutant
        self.path = EPMOE.parent.joinpath(*mutant.module.split(".")).with_suffix(".py")

    def find_spec(self, name, path=None, target=None):
        if name == self.mutant.module:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        source = self.path.read_text()
        for old, new in self.mutant.changes:
            if source.count(old) != 1:
                raise ValueError(
                    f"{self.mutant.name}: {old!r} is {source.count(old)} times in {self.path}"
                )
            source = source.replace(old, new)
        exec(compile(source, str(self.path), "exec"), module.__dict__)


def first_seed(mutant, seeds):
    """In a forked child: (the first seed that finds ``mutant``, what it says), or (None, "").

    Imports epmoe anew, with one module broken.
    """
    for name in [n for n in sys.modules if n.split(".")[0] in ("epmoe", "sim")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Broken(mutant))
    from sim.cases import case

    for seed in seeds:
        if wrong := case(seed):
            return seed, wrong
    return None, ""
