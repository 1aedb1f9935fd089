"""What one forward knows; handed by keyword to every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epmoe.sched.chunks import plan_chunks

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardContext:
    """Facts about one step that every rank holds alike, made once per step, not per layer.

    ``rows`` are the live rows of every rank.  With them a forward of any length is cut into chunks
    that all ranks run; without them a batch beyond ``max_rows`` is refused.  A layer that is handed
    a context uses it or raises; nothing in it is dropped in silence.

    ``chunk`` of ``chunks`` at ``capacity`` is set by ``chunked``, for a caller that cuts a forward
    itself because layers beside the experts (a shared expert, a draft layer) must see the same
    pieces; a layer that gets such a context runs it as one round and cuts no further.

    >>> whole = ForwardContext(rows=(5, 0, 9))
    >>> [(c.chunk, c.rows, c.capacity) for c in whole.chunked(max_rows=5)]
    [(0, (3, 0, 5), 5), (1, (2, 0, 4), 5)]
    """

    phase: str = "prefill"
    rows: tuple[int, ...] | None = None
    epoch: int = 0  # the placement the caller routed for; 0 means whichever is in force
    chunk: int = 0  # which piece of a forward this is
    chunks: int = 1
    capacity: int | None = None  # what each piece is padded to; None: not cut yet

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, got {self.phase!r}")
        if self.rows is not None:
            if not isinstance(self.rows, tuple) or not all(isinstance(n, int) for n in self.rows):
                raise TypeError(f"rows must be a tuple of int, got {self.rows!r}")
            if not self.rows or min(self.rows) < 0:
                raise ValueError(f"rows must be at least 0 on every rank, got {self.rows}")
        for name, least in (("epoch", 0), ("chunk", 0), ("chunks", 1), ("capacity", 1)):
            value = getattr(self, name)
            if name == "capacity" and value is None:
                continue
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.chunk >= self.chunks:
            raise ValueError(f"chunk must be below chunks ({self.chunks}), got {self.chunk}")
        if self.chunks > 1 and self.capacity is None:
            raise ValueError(f"capacity must be set for one of {self.chunks} chunks, got None")

    def chunked(self, max_rows: int) -> tuple[ForwardContext, ...]:
        """One context for each chunk that layers of this ``max_rows`` would cut, in order.

        From rank-identical numbers only, so every rank gets as many.  Rows of ``x`` follow each
        other: chunk c of a rank has the next ``rows[rank]`` of them.
        """
        if self.rows is None:
            raise ValueError("rows must be known on every rank for a forward to be cut, got None")
        if self.capacity is not None:
            return (self,)
        plan = plan_chunks(self.rows, max_rows)
        return tuple(
            replace(self, rows=rows, chunk=chunk, chunks=plan.count, capacity=plan.capacity)
            for chunk, rows in enumerate(plan.rows_CR)
        )
