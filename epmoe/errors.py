"""What can go wrong that is not the caller's mistake.

A caller's mistake is a ``ValueError`` or ``TypeError`` naming argument, value and limit.
Everything else is an ``EpmoeError``, and its message names rank, host, pid, round and phase where
they are known, because the person who reads it has to find one process among many.
"""

from __future__ import annotations


class EpmoeError(RuntimeError):
    """Something outside this call went wrong; the object that raised it may be unusable."""


class ConfigMismatch(EpmoeError):
    """Ranks disagree on something all of them must agree on.  Raised on every rank."""


class PeerLost(EpmoeError):
    """A rank whose answer this round needs will not give it.

    ``ranks`` are the lost ranks, ``how`` says what is known about the first of them: ``exited``
    (the process ended), ``closed`` (it left on purpose), ``raised`` (it left by an exception of
    its own), ``stopped`` (alive, silent past the stall limit) or ``corrupt`` (its word cannot have
    been written by the protocol).
    """

    def __init__(self, message: str, *, ranks: tuple[int, ...], how: str, round: int = 0) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.how = how
        self.round = round


class Evicted(EpmoeError):
    """The other ranks decided to go on without this one."""
