"""The command line: epmoe demo · doctor · bench · balance · trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from epmoe.cli import balance, bench, demo, doctor, trace
from epmoe.errors import EpmoeError

VERBS = (demo, doctor, bench, balance, trace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status: 0, 1 if something was wrong, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="epmoe", description="A mixture-of-experts layer over the ranks of one machine."
    )
    subparsers = parser.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        verb.add(subparsers)
    args = parser.parse_args(argv)
    verb = next(verb for verb in VERBS if verb.__name__.rpartition(".")[2] == args.verb)
    try:
        return int(verb.main(args))
    except (EpmoeError, ValueError) as error:
        print(f"epmoe {args.verb}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
