"""What the router chose, counted: the loads a placement is planned from.

Counted are logical experts, so the numbers do not depend on the placement in force.  Each rank
counts its own rows, the caller sums the counts over ranks, and every rank observes the same sum:
from then on all of it is integer arithmetic in a fixed order, so all ranks hold the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmoe.config import check_count

MOST = 1e30  # sums of loads stay finite in float32, which the published planner computes in


def count(ids_TK: Tensor, experts: int, live_T: Tensor | None = None) -> Tensor:
    """How often every expert was chosen by this rank's rows: int64, ``experts`` long.

    Never counted: choices of -1, and rows where the bool mask ``live_T`` is False (padding that
    carries ids, profile and dummy rows).  Reads nothing back, so a CUDA graph can hold it.

    >>> ids_TK, live_T = torch.tensor([[0, 2], [2, -1], [1, 1]]), torch.tensor([True, True, False])
    >>> count(ids_TK, 3, live_T).tolist()
    [1, 0, 2]
    """
    if live_T is not None:
        if live_T.shape != ids_TK.shape[:1] or live_T.dtype != torch.bool:
            raise ValueError(
                f"live_T must be bool of shape [{ids_TK.shape[0]}], "
                f"got {live_T.dtype} {tuple(live_T.shape)}"
            )
        ids_TK = torch.where(live_T[:, None], ids_TK, -1)
    bins = torch.where(ids_TK < 0, experts, ids_TK).flatten().long()  # the last bin is thrown away
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids_TK.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:experts]


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Loads over a sliding window of rounds, older rounds weighing less: state in, state out.

    ``loads = sum over kept rounds of decay ** age * counts``, age 0 being the newest.  ``decay=1``
    is a plain window.  A value never changes, so a thread may read it while the rounds go on.

    >>> seen = Loads(experts=2, window=2, decay=0.5)
    >>> for counts in ([8, 0], [4, 2], [0, 0], [1, 1]):
    ...     seen = seen.observe(torch.tensor(counts))
    >>> seen.rounds, seen.loads_E.tolist()          # [1, 1] + [4, 2] / 2; [8, 0] left the window
    (4, [3.0, 2.0])
    """

    experts: int
    window: int = 1000  # rounds with traffic that are kept
    decay: float = 1.0  # weight of a round relative to the next newer one
    rounds: int = 0  # observed so far, those without traffic included
    kept: tuple[Tensor, ...] = ()  # oldest first, at most ``window``

    def __post_init__(self) -> None:
        for name in ("experts", "window"):
            check_count(name, getattr(self, name), 1)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")

    def observe(self, counts_E: Tensor) -> Loads:
        """One more round (or interval), given its counts summed over all ranks.

        The round number always advances, so ranks that act every n rounds stay in phase.  A round
        that nobody had a row in is not kept: an idle night does not wash the day's loads away.
        """
        if counts_E.shape != (self.experts,) or counts_E.dtype.is_floating_point:
            raise ValueError(
                f"counts_E must hold {self.experts} integers, "
                f"got {counts_E.dtype} {tuple(counts_E.shape)}"
            )
        kept_E = counts_E.to(device="cpu", dtype=torch.int64, copy=True)
        if int(kept_E.min()) < 0:
            expert = int(kept_E.argmin())
            raise ValueError(f"counts_E[{expert}] must be at least 0, got {int(kept_E[expert])}")
        kept = self.kept
        if bool(kept_E.any()):
            kept = (*kept, kept_E)[-self.window :]
        return replace(self, rounds=self.rounds + 1, kept=kept)

    @property
    def loads_E(self) -> Tensor:
        """float64; the same bits on every rank that observed the same counts."""
        loads_E = torch.zeros(self.experts, dtype=torch.float64, device="cpu")
        for counts_E in self.kept:
            loads_E = loads_E * self.decay + counts_E
        return loads_E


def checked_loads(loads: Any) -> npt.NDArray[np.float64]:
    """Loads of one layer [E] or many [N, E] as a new float64 array [N, E], or a ``ValueError``.

    A layer without any load comes back as all ones: with nothing known, all experts are equal.
    (Left at zero every comparison of a planner ties, and expert 0 gets all spare slots.)
    """
    if isinstance(loads, Tensor):
        loads = loads.detach().cpu().double().numpy()
    try:
        loads_NE = np.array(loads, dtype=np.float64, ndmin=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loads must be numbers, equally many for every layer: {error}") from error
    if loads_NE.ndim != 2 or not loads_NE.size:
        raise ValueError(f"loads must have the shape [E] or [N, E], got {loads_NE.shape}")
    wrong = ~((loads_NE >= 0) & (loads_NE <= MOST))  # also true where a load is NaN
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise ValueError(
            f"loads must be in 0..{MOST:g}, "
            f"got {loads_NE[layer, expert]} for expert {expert} of layer {layer}"
        )
    loads_NE[~loads_NE.any(axis=1)] = 1.0
    return loads_NE
