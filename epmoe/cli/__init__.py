"""The command line: epmoe demo · doctor · bench · balance."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from epmoe.cli import balance, bench, demo, doctor

VERBS = (demo, doctor, bench, balance)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status."""
    parser = argparse.ArgumentParser(
        prog="epmoe", description="A mixture-of-experts layer over the ranks of one machine."
    )
    subparsers = parser.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        verb.add(subparsers)
    args = parser.parse_args(argv)
    run = next(verb for verb in VERBS if verb.__name__.rpartition(".")[2] == args.verb)
    return run.main(args)


if __name__ == "__main__":
    sys.exit(main())
