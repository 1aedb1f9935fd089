"""What the verbs print: tables, bars, amounts; results to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Self, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 100  # of a pipe or a log file, where nobody can say how wide it is
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Output(Console):
    """A console whose reader may have seen enough: ``epmoe doctor | head`` is no failure."""

    def on_broken_pipe(self) -> None:
        """Throw the rest away."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def console(file: TextIO | None = None) -> Console:
    """Of a terminal as it is; of anything else 100 columns wide, without colours."""
    file = file or sys.stdout
    return Output(file=file, width=None if file.isatty() else WIDTH, highlight=False)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table on stdout; a column whose name begins with ``>`` is set to the right."""
    out = console()
    out.print(_plain(title, out), style="bold", soft_wrap=True)
    table = Table(header_style="", box=box.SIMPLE_HEAD, show_header=any(columns))
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left")
    for row in rows:
        table.add_row(*(_plain(cell, out) for cell in row))
    out.print(table)


def show_json(value: Any) -> None:
    """One JSON object on stdout, and nothing else of this run."""
    console().out(json.dumps(value, indent=2), highlight=False)


def bar(value: float, most: float, width: int = 30) -> str:
    """``value`` as a share of ``most``.

    >>> bar(1, 2, 4), bar(0, 0, 4)
    ('██', '')
    """
    return "█" * round(width * value / most) if most > 0 else ""


def size(nbytes: float) -> str:
    """Bytes for people.

    >>> size(512), size(2560), size(3 << 30)
    ('512 B', '2.5 KiB', '3.0 GiB')
    """
    power = 0
    while nbytes >= 1024 and power < len(UNITS) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.{min(power, 1)}f} {UNITS[power]}"


class Steps:
    """A progress bar on a terminal; elsewhere a line at every tenth of the way; or silence."""

    def __init__(self, what: str, total: int, *, silent: bool = False) -> None:
        self._what, self._total, self._tenth, self._silent = what, total, 0, silent
        self._bar: Progress | None = None
        if not silent and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console(sys.stderr),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def reach(self, done: int, note: str) -> None:
        """``done`` of the total are done."""
        done = min(done, self._total)
        tenth = 10 * done // self._total
        if self._bar:
            self._bar.update(self._task, completed=done, description=f"{self._what}: {note}")
        elif not self._silent and tenth > self._tenth:
            self._tenth = tenth
            print(f"{self._what} {done}/{self._total}: {note}", file=sys.stderr, flush=True)


def _plain(cell: str, out: Console) -> str:
    """As the terminal can write it, and never read as markup."""
    if out.options.ascii_only:
        cell = cell.replace("█", "#").encode("ascii", "replace").decode()
    return cell.replace("[", r"\[")
