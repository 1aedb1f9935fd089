"""What one forward knows; handed by keyword to every layer."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardContext:
    """Facts about one step that every rank holds alike, made once per step, not per layer.

    ``rows`` are the live rows of every rank.  With them a forward of any length is cut into chunks
    that all ranks run; without them a batch beyond ``max_rows`` is refused.  A layer that is handed
    a context uses it or raises; nothing in it is dropped in silence.
    """

    phase: str = "prefill"
    rows: tuple[int, ...] | None = None
    epoch: int = 0  # the placement the caller routed for; 0 means whichever is in force

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, got {self.phase!r}")
        if self.rows is not None:
            if not isinstance(self.rows, tuple) or not all(isinstance(n, int) for n in self.rows):
                raise TypeError(f"rows must be a tuple of int, got {self.rows!r}")
            if not self.rows or min(self.rows) < 0:
                raise ValueError(f"rows must be at least 0 on every rank, got {self.rows}")
        if not isinstance(self.epoch, int):
            raise TypeError(f"epoch must be an int, got {type(self.epoch).__name__}")
        if self.epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {self.epoch}")
