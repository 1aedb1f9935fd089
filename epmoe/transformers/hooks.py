"""What transformers calls: a function for one rank, a class for many, each under the name epmoe."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe import EpmoeError
from epmoe.transformers.stack import PARTS, Part, Stack, adopt

NAME = "epmoe"
OWN_ROWS = "epmoe_own_rows"


class Registered:
    """What the last ``register`` was told; models that are built later use it."""

    options: Mapping[str, Any] = MappingProxyType({})
    exchange = True


def register(*, exchange: bool = True, **options: Any) -> tuple[str, ...]:
    """Make ``"epmoe"`` a name that transformers knows; which of its hooks there are.

    ``options`` are fields of ``MoEConfig`` that a model does not decide: ``max_rows`` (1024 unless
    given, 4096 on a GPU), ``freight``, ``stall_s``, ``open_s``, ``heap`` (unless given, "cuda" for
    experts on a GPU and "host" for others).

    Ranks may hold different numbers of rows, and more than ``max_rows``: then they are cut into
    chunks, which every rank must cut alike, so the first layer of every forward exchanges the row
    counts over the group's sockets; a captured forward does so once, while it is captured, so that
    all ranks must capture and replay the same steps.  With ``exchange=False`` nothing is exchanged,
    and a rank that brings more than ``max_rows`` rows gets a ``ValueError``.
    """
    for name in options:
        if name not in ("max_rows", "freight", "stall_s", "open_s", "heap"):
            raise ValueError(
                f"options must be max_rows, freight, stall_s, open_s or heap, got {name}"
            )
    # From 5.0 to 5.6 there is the interface, but a closed list of names beside it.
    interface = _require("transformers.integrations.moe", "ExpertsInterface", "5.8")
    Registered.options, Registered.exchange = options, exchange
    interface.register(NAME, experts_forward)
    try:
        many = _require("transformers.distributed.expert_parallel", "EPImplementation", "5.23")
        names = _require(
            "transformers.distributed.expert_parallel", "EPImplementationInterface", "5.23"
        )
    except EpmoeError:
        return ("experts_implementation",)
    for name, own_rows in ((NAME, False), (OWN_ROWS, True)):
        names.register(name, _spread_experts(many, own_rows))
    return ("experts_implementation", "ep_implementation")


def spread(model: Any, ranks: int, *, shared: bool = False) -> dict[str, Any]:
    """Keywords for ``from_pretrained`` that put the experts of ``model`` on ``ranks`` ranks.

    ``model`` is a folder or a transformers config.  Everything but the experts is whole on every
    rank, and every rank has rows of its own; with ``shared`` the other weights are split by the
    model's own tensor-parallel plan instead, and all ranks are fed the same batch.
    """
    if ranks == 1:
        return {"experts_implementation": NAME}
    _require("transformers.distributed.expert_parallel", "EPImplementationInterface", "5.23")
    from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig, PretrainedConfig

    if shared:
        return {
            "distributed_config": DistributedConfig(
                tp_size=ranks, ep_size=ranks, ep_implementation=NAME
            )
        }
    config = model if isinstance(model, PretrainedConfig) else AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    # transformers has no word for "data-parallel and not FSDP": a tensor-parallel plan that splits
    # nothing is the same thing, and costs no collective in a forward.
    rules = dict.fromkeys(shape.tp_plan, "replicate")
    if not rules:
        rules = {next(name for name, _ in shape.named_parameters()): "replicate"}
    return {
        "distributed_config": DistributedConfig(
            tp_size=ranks, ep_size=ranks, tp_plan=rules, ep_implementation=OWN_ROWS
        )
    }


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One rank: what a model's experts call under ``experts_implementation="epmoe"``."""
    if getattr(experts, "_is_expert_parallel", False):
        raise EpmoeError(
            "the experts are spread over ranks by another ep_implementation; with "
            'experts_implementation="epmoe" use ep_implementation="epmoe"'
        )
    number = getattr(experts, "epmoe_number", None)
    if number is None:
        number = _adopt(experts)
    out: Tensor = _call(hidden_states, top_k_index, top_k_weights, number)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _adopt(experts: nn.Module) -> int:
    return adopt(experts, Registered.options).number


def adopt_all(model: nn.Module) -> None:
    """One stack for all experts of a model on one rank that have none yet."""
    stack = Stack(Registered.options, None, exchange=Registered.exchange)
    for module in model.modules():
        config = getattr(module, "config", None)
        chosen = getattr(config, "_experts_implementation", None)
        if chosen == NAME and hasattr(module, "down_proj") and hasattr(module, "num_experts"):
            adopt(module, Registered.options, stack)


def _spread_experts(base: type, own_rows: bool) -> type:
    """The expert-parallel hook over transformers' own base class, which is there only when asked.

    ``own_rows``: every rank has rows of its own although transformers believes that they are shared
    (see ``spread``).
    """
    waiting: weakref.WeakValueDictionary[tuple[int, str], Stack] = weakref.WeakValueDictionary()

    class SpreadExperts(base):  # type: ignore[misc]
        """Built once for each module of experts, on meta tensors; opened at the first forward."""

        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            group = ep_mesh.get_group()
            # Layers of one model share its config object; nothing else says who belongs together.
            key = (id(getattr(experts, "config", None)), group.group_name)
            stack = waiting.get(key)
            if stack is None or stack.moes:
                stack = Stack(Registered.options, group, exchange=Registered.exchange)
                waiting[key] = stack
            part = Part(experts, self.num_local_experts, stack)
            self.number, self.shared = part.number, tp_mesh.size() > 1 and not own_rows
            self.stack = stack

        def __call__(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            out: Tensor
            if not self.shared:
                out = _call(hidden_states, top_k_index, top_k_weights, self.number)
                return out
            ranks, rank = self.tp_mesh.size(), self.tp_mesh.get_local_rank()
            rows = hidden_states.size(0)
            per = -(-rows // ranks)
            mine = slice(rank * per, (rank + 1) * per)
            out = _call(hidden_states[mine], top_k_index[mine], top_k_weights[mine], self.number)
            out = nn.functional.pad(out, (0, 0, 0, per - out.size(0)))
            every = out.new_empty(per * ranks, out.size(1))
            dist.all_gather_into_tensor(every, out, group=self.tp_mesh.get_group())
            out = every[:rows]
            return out

    return SpreadExperts


@torch.library.custom_op("epmoe::experts", mutates_args=())
def _call(x: Tensor, ids: Tensor, weights: Tensor, number: int) -> Tensor:
    """One opaque call for torch.compile: the layer is found by its number, nothing is traced."""
    part = PARTS.get(number)
    if part is None:
        raise EpmoeError(f"experts {number}: their model is gone")
    with torch.no_grad():
        return part.stack.run(part, x.detach(), ids, weights.detach())


@_call.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, number: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(context: Any, gradient: Tensor) -> None:
    raise EpmoeError("epmoe computes forward only: its experts have no gradient")


_call.register_autograd(_backward)


def _require(module: str, name: str, version: str) -> Any:
    """A public name of transformers, or an error that says which version has it."""
    try:
        import transformers
    except ImportError as error:
        raise EpmoeError("transformers is not installed: pip install 'epmoe[hf]'") from error
    here, wanted = (
        tuple(int(part) for part in text.split(".")[:2])
        for text in (transformers.__version__, version)
    )
    if here < wanted:
        raise EpmoeError(
            f"transformers {transformers.__version__} has no {name} that can be used here: this "
            f"needs {version} or later"
        )
    return getattr(import_module(module), name)
