"""What every rank must agree on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

ACTIVATIONS = ("swiglu", "geglu", "gelu", "gpt_oss", "relu2")
GATED = ("swiglu", "geglu", "gpt_oss")
DTYPES = ("fp32", "bf16")
HEAPS = ("host", "cuda", "nvshmem")
FORMATS = ("plain", "fp8", "mxfp4", "nvfp4")
ACTIVATIONS_IN = ("dtype", "format")
WEIGHT_IN = ("reduce", "fc2")
LONGEST_S = 1_000_000  # twelve days; poll() takes at most 2**31 milliseconds


def check_count(name: str, value: object, least: int) -> None:
    """``TypeError`` unless ``value`` is an int, ``ValueError`` if it is below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """One MoE layer, as all ranks see it.  Equal configs have equal fingerprints.

    ``open`` compares every field on all ranks before any memory is mapped, so a field that
    differs is a ``ConfigMismatch`` that names it, never a hang or a wrong answer.
    """

    experts: int  # logical experts of the layer
    choices: int  # experts per token (k)
    hidden: int  # width of a row on the wire
    inner: int  # width between the two GEMMs of one expert
    max_rows: int  # most rows of one rank in one round; the largest rung of the capacity ladder
    slots: int = 0  # physical places for experts on all ranks together; 0 means one per expert
    dtype: str = "bf16"  # rows, results and plain weights: fp32 | bf16
    format: str = "plain"  # expert weights: plain (in dtype) | fp8 | mxfp4 | nvfp4
    activations_in: str = "dtype"  # rows and inner values: dtype (weight-only) | format (both)
    activation: str = "swiglu"  # swiglu | geglu | gelu | gpt_oss | relu2
    bias: bool = False  # every expert GEMM adds a bias
    clamp: float = math.inf  # gate <= clamp, -clamp <= up <= clamp, before the activation
    weight_in: str = "reduce"  # where the router weight is applied: reduce | fc2 (before 2nd GEMM)
    shared_inner: int = 0  # inner width of the shared expert that every rank holds; 0 means none
    freight: int = 1 << 20  # bytes in which moving experts travel, half of it in every round
    lanes: int = 1  # rounds that may be under way at once; each lane has its own regions
    heap: str = "host"  # host | cuda | nvshmem
    stall_s: float = 30.0  # a live peer that publishes nothing for this long is reported
    open_s: float = 600.0  # the same limit for open and the first round: compiling, loading
    name: str = "moe"  # tells layers apart when ranks open them in different order

    def __post_init__(self) -> None:
        for name in ("experts", "choices", "hidden", "inner", "max_rows", "lanes"):
            self._at_least(name, 1)
        for name in ("slots", "shared_inner", "freight"):
            self._at_least(name, 0)
        if self.choices > self.experts:
            raise ValueError(
                f"choices must be at most experts ({self.experts}), got {self.choices}"
            )
        if 0 < self.slots < self.experts:
            raise ValueError(
                f"slots must be 0 or at least experts ({self.experts}), got {self.slots}"
            )
        if self.max_rows * self.choices >= 1 << 31:
            raise ValueError(
                f"max_rows * choices must be below 2**31 (a word carries it), "
                f"got {self.max_rows} * {self.choices}"
            )
        for name, legal in (
            ("dtype", DTYPES),
            ("format", FORMATS),
            ("activations_in", ACTIVATIONS_IN),
            ("activation", ACTIVATIONS),
            ("weight_in", WEIGHT_IN),
            ("heap", HEAPS),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} must be one of {legal}, got {getattr(self, name)!r}")
        for name in ("clamp", "stall_s", "open_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
            if name != "clamp" and value > LONGEST_S:
                raise ValueError(f"{name} must be at most {LONGEST_S}, got {value!r}")
            object.__setattr__(self, name, float(value))  # 30 and 30.0 are one config
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be a bool, got {type(self.bias).__name__}")
        for name in ("hidden", "inner"):
            if self.format != "plain" and getattr(self, name) % 32:
                raise ValueError(
                    f"{name} must be a multiple of 32 for format {self.format!r}, "
                    f"got {getattr(self, name)}"
                )
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, got {type(self.name).__name__}")
        if not 1 <= len(self.name.encode(errors="replace")) <= 64 or not self.name.isprintable():
            raise ValueError(f"name must have 1 to 64 bytes of printable text, got {self.name!r}")

    def _at_least(self, name: str, least: int) -> None:
        check_count(name, getattr(self, name), least)

    @property
    def places(self) -> int:
        """Physical slots on all ranks together: ``slots``, or one per expert."""
        return self.slots or self.experts

    @property
    def gated(self) -> bool:
        """True if the first GEMM has a gate half (w1) and an up half (w3)."""
        return self.activation in GATED

    @property
    def itemsize(self) -> int:
        """Bytes of one value of a row."""
        return 4 if self.dtype == "fp32" else 2

    def slots_per_rank(self, ranks: int) -> int:
        """Slots of each rank; a ``ValueError`` if they do not divide evenly.

        >>> MoEConfig(experts=6, choices=2, hidden=64, inner=64, max_rows=8).slots_per_rank(3)
        2
        """
        if self.places % ranks:
            raise ValueError(
                f"slots ({self.places}) must be a multiple of the number of ranks ({ranks})"
            )
        return self.places // ranks

    def described(self) -> dict[str, str]:
        """Every field as text, in order: what ranks compare."""
        return {f.name: repr(getattr(self, f.name)) for f in fields(self)}

    def fingerprint(self) -> str:
        """A hash over every field: equal if and only if the configs are equal."""
        text = "\n".join(f"{name}={value}" for name, value in self.described().items())
        return hashlib.sha256(text.encode()).hexdigest()
