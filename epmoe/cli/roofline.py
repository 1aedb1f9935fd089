"""The shortest time a layer could take on one NVLink domain: what must be computed, read and sent.

The rates were measured on H200s: bf16 650 TFLOP/s (grouped GEMMs of many slots; those of few large
ones and a dense 8192^3 reach 790 to 820, so such layers may be faster than this), memory 4.3 TB/s
(a copy, bytes read and written; the data sheet says 4.8), NVLink 380 GB/s one way (371 to 390 seen
from SMs; 450 raw), and 12 us for one launch and two exchanges between GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from epmoe.config import MoEConfig

FLOPS, MEMORY, LINKS, LATENCY_S = 650e12, 4.3e12, 380e9, 12e-6


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that one rank needs for each of three things which may all overlap."""

    arithmetic: float
    memory: float
    links: float

    @property
    def us(self) -> float:
        """The longest of the three and the latency, in microseconds."""
        return 1e6 * (max(self.arithmetic, self.memory, self.links) + LATENCY_S)

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        return max(("arithmetic", "memory", "links"), key=lambda name: getattr(self, name))


def floor(config: MoEConfig, ranks: int, rows: int) -> Floor:
    """For uniform routing of ``rows`` rows of every rank, each sent once to each rank it visits.

    dsv3 on 8 ranks with 128 rows: 1,024 choices a rank are 90 GFLOP (0.14 ms); 31.5 of its 32
    experts are met, 2.77 GB of weights, with the rows 2.88 GB (0.67 ms); a row visits 4.6 other
    ranks, 17 MB out (0.04 ms): 680 us with the latency, bound by memory.

    >>> from epmoe.shapes import shape
    >>> found = floor(shape("dsv3", max_rows=128), 8, 128)
    >>> round(found.us), found.bound
    (680, 'memory')
    """
    local, item = config.slots_per_rank(ranks), config.itemsize
    hidden, inner, choices = config.hidden, config.inner, config.choices
    matrices = 3 if config.gated else 2
    computed = rows * choices  # rows of the GEMMs of one rank, on average
    none_here = comb(config.places - local, choices) / comb(config.places, choices)
    visited = ranks * (1 - none_here)  # ranks that a row visits, its own among them
    met = local * (1 - (1 - choices / config.places) ** (ranks * rows))  # slots with a row
    weights = met * matrices * hidden * inner * item
    came = rows * visited * hidden * item  # rows in, written once; results, written and read
    moved = 2 * rows * hidden * item + 3 * came
    read = computed * hidden * item + 2 * computed * inner * item
    sent = rows * (ranks - 1) * (1 - none_here) * hidden * 2 * item
    return Floor(
        arithmetic=2.0 * matrices * computed * hidden * inner / FLOPS,
        memory=(weights + moved + read) / MEMORY,
        links=sent / LINKS,
    )
