"""Which experts every row goes to, with which weights: the fp32 definition host and GPU share.

Bit for bit the same on any device, because nothing is left to a library: scores are written out
(``score.py``), sums have a fixed order, and ties go to the lower index.

**Who takes part.**  An expert can be chosen if its logit and its selection score are finite; NaN
and both infinities mean "not this one".  Among fewer than K such experts the row ends with id -1,
slot -1, weight 0, which is never counted.  An id is never repeated in a row, never out of range.
A row without any finite logit therefore goes nowhere: it is not sent to experts 0..K-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe.sched.placement import choose_from
from epmoe.sched.score import LANES, exp, halved, order, sigmoid, softmax

SCORES = ("softmax", "softmax_chosen", "sigmoid")
LOGITS = (torch.float32, torch.bfloat16, torch.float16)
NONE = -(1 << 62)  # below the key of every score


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """How a model chooses: DeepSeek-V3 is ``Router(choices=8, score="sigmoid", groups=8, keep=4,
    renormalise=True, scale=2.5)`` with a bias, Qwen3 ``Router(choices=8, renormalise=True)``,
    Mixtral ``Router(choices=2, score="softmax_chosen")``.

    Selection is by score + bias; weights are the scores without it.  Without a bias the softmax
    forms select by the logit itself (the same order, with no two logits rounded into a tie).
    With ``groups`` only the experts of the ``keep`` best groups are candidates; a group is worth
    the sum of its two best biased scores (a missing second one counts 0).
    """

    choices: int  # experts of a row (k), at most 32
    score: str = "softmax"  # softmax over all | softmax_chosen: over the chosen | sigmoid
    renormalise: bool = False  # weights / (their sum + 1e-20)
    groups: int = 1  # equal blocks of neighbouring experts; above 1 only with sigmoid
    keep: int = 1  # groups whose experts are candidates
    scale: float = 1.0  # last factor on every weight

    def __post_init__(self) -> None:
        for name in ("choices", "groups", "keep"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.choices > LANES:
            raise ValueError(f"choices must be at most {LANES}, got {self.choices}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")
        if self.keep > self.groups:
            raise ValueError(f"keep must be at most groups ({self.groups}), got {self.keep}")
        if self.groups > 1 and self.score != "sigmoid":
            raise ValueError(f"groups must be 1 with score {self.score!r}, got {self.groups}")
        if self.renormalise and self.score == "softmax_chosen":
            raise ValueError("renormalise must be False with softmax_chosen: it sums to 1 already")
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be a finite number above 0, got {self.scale!r}")

    def group_size(self, experts: int) -> int:
        """Experts of one group; a ``ValueError`` if ``experts`` do not fit this router."""
        size = experts // self.groups
        if experts % self.groups or (self.groups > 1 and size < 2):
            raise ValueError(
                f"experts must be a multiple of groups ({self.groups}) with at least 2 in each, "
                f"got {experts}"
            )
        if self.choices > size * self.keep:
            raise ValueError(
                f"choices must be at most the candidates ({size * self.keep} of {experts} "
                f"experts), got {self.choices}"
            )
        return size


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The choices of T rows, best first: -1 with weight 0 where there was nothing to choose."""

    ids_TK: Tensor  # int32, logical experts
    weights_TK: Tensor  # fp32
    slots_TK: Tensor | None = None  # int32, physical slots; None without replicas


@torch.no_grad()
def route(
    logits_TE: Tensor,
    router: Router,
    *,
    bias_E: Tensor | None = None,
    replicas_EX: Tensor | None = None,
    counts_E: Tensor | None = None,
    first: int = 0,
    loads_E: Tensor | None = None,
    live: Tensor | None = None,
) -> Routing:
    """Ids and weights of every row; with ``replicas_EX`` and ``counts_E`` also slots.

    ``replicas_EX[e, :counts_E[e]]`` are the slots of expert ``e`` (``Placement`` has both tables).
    The replica depends on the expert and on the token's number ``first + t`` only
    (``placement.choose_from``): ranks that compute the same rows pass the same ``first`` and get
    the same slots; ranks with rows of their own pass where those begin in the whole batch.
    ``loads_E`` (int64) grows in place by the choices of each logical expert.
    Rows from ``live`` (int32, one value, where the logits are) on are padding: all -1, not counted.

    >>> r = route(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), Router(choices=2, renormalise=True))
    >>> r.ids_TK.tolist(), r.weights_TK.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """
    check_route(logits_TE, router, bias_E, replicas_EX, counts_E, first, loads_E, live)
    T, E = logits_TE.shape
    x_TE = logits_TE.float()
    finite_TE = x_TE.isfinite()
    if live is not None:
        finite_TE &= (torch.arange(T, device=x_TE.device) < live.reshape(1)).unsqueeze(1)
    if router.score == "sigmoid":
        score_TE = sigmoid(x_TE)
    elif router.score == "softmax":
        score_TE = softmax(x_TE, finite_TE)
    else:
        score_TE = x_TE
    by_TE = x_TE if router.score == "softmax" and bias_E is None else score_TE
    if bias_E is not None:
        by_TE = by_TE + bias_E
    key_TE = order(by_TE).masked_fill(~(finite_TE & by_TE.isfinite()), NONE)
    if router.groups > 1:
        key_TE = _keep_groups(by_TE, key_TE, router)
    best_TK, ids_TK = _best(key_TE, router.choices)
    chosen_TK = best_TK != NONE
    weights_TK = _weights(score_TE.gather(1, ids_TK), chosen_TK, router)
    ids_TK = ids_TK.masked_fill(~chosen_TK, -1).int()
    if loads_E is not None:
        count_loads(ids_TK, loads_E)
    if replicas_EX is None or counts_E is None:
        return Routing(ids_TK, weights_TK)
    token_T = torch.arange(first, first + T, device=x_TE.device)
    return Routing(ids_TK, weights_TK, choose_from(ids_TK, replicas_EX, counts_E, tokens_T=token_T))


def count_loads(ids_TK: Tensor, loads_E: Tensor) -> None:
    """Add the choices of each logical expert to ``loads_E``; -1 is nobody's."""
    at = ids_TK.reshape(-1).long()
    loads_E.scatter_add_(0, at.clamp(min=0), (at >= 0).to(loads_E.dtype))


def _best(key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest keys of each row and where they are; equal keys: lower index first."""
    n = key.shape[1]
    unique = (key << 11) + torch.arange(n - 1, -1, -1, device=key.device)  # n <= 2**11
    at = unique.masked_fill(key == NONE, NONE).topk(k, dim=1).indices
    return key.gather(1, at), at


def _keep_groups(by_TE: Tensor, key_TE: Tensor, router: Router) -> Tensor:
    """Keys with those outside the best groups removed; a group without candidates is never kept."""
    T, E = key_TE.shape
    by_TGn = by_TE.masked_fill(key_TE == NONE, -torch.inf).view(
        T, router.groups, E // router.groups
    )
    first_TG, second_TG = by_TGn.topk(2, dim=2).values.unbind(2)
    second_TG = second_TG.masked_fill(second_TG == -torch.inf, 0.0)
    key_TG = order(first_TG + second_TG).masked_fill(first_TG == -torch.inf, NONE)
    _, kept = _best(key_TG, router.keep)
    keep_TG = torch.zeros_like(key_TG, dtype=torch.bool).scatter_(1, kept, True)
    return key_TE.masked_fill(~keep_TG.repeat_interleave(E // router.groups, 1), NONE)


def _weights(score_TK: Tensor, chosen_TK: Tensor, router: Router) -> Tensor:
    """Weights from the chosen experts' unbiased scores."""
    if router.score == "softmax_chosen":
        most_T1 = score_TK.masked_fill(~chosen_TK, -torch.inf).amax(1, keepdim=True)
        score_TK = exp(score_TK - most_T1)
    w_TK = score_TK.masked_fill(~chosen_TK, 0.0)
    if router.renormalise or router.score == "softmax_chosen":
        w_TK = w_TK / (halved(w_TK) + 1e-20)
    return w_TK * router.scale


def check_route(
    logits_TE: Tensor,
    router: Router,
    bias_E: Tensor | None,
    replicas_EX: Tensor | None,
    counts_E: Tensor | None,
    first: int,
    loads_E: Tensor | None,
    live: Tensor | None,
) -> None:
    """Refuse what ``route`` and its kernel would misread.  Looks at no value on a GPU."""
    if logits_TE.dim() != 2 or logits_TE.dtype not in LOGITS:
        raise TypeError(
            f"logits_TE must be 2-D in fp32, bf16 or fp16, got {logits_TE.dim()}-D "
            f"{logits_TE.dtype}"
        )
    E, device = logits_TE.shape[1], logits_TE.device
    router.group_size(E)
    if E > 2048:
        raise ValueError(f"experts must be at most 2048, got {E}")
    if not isinstance(first, int) or not 0 <= first < 1 << 31:
        raise ValueError(f"first must be an int in 0..2**31-1, got {first!r}")
    if (replicas_EX is None) != (counts_E is None):
        raise ValueError("replicas_EX and counts_E must be given together")
    X = replicas_EX.shape[-1] if replicas_EX is not None else 0
    for name, tensor, dtype, shape in (
        ("bias_E", bias_E, torch.float32, (E,)),
        ("replicas_EX", replicas_EX, torch.int32, (E, X)),
        ("counts_E", counts_E, torch.int32, (E,)),
        ("loads_E", loads_E, torch.int64, (E,)),
        ("live", live, torch.int32, (1,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise TypeError(
                f"{name} must be contiguous {dtype} {shape}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like logits_TE, got {tensor.device}")
    if counts_E is not None and replicas_EX is not None and not counts_E.is_cuda:
        held_EX = torch.arange(X, device=counts_E.device) < counts_E.unsqueeze(1)
        if not (1 <= int(counts_E.min()) <= counts_E.max() <= X) or bool(
            (replicas_EX < 0)[held_EX].any()
        ):
            raise ValueError(f"counts_E must be in 1..{X} and name as many slots of replicas_EX")
