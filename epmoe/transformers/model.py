"""What a caller asks of a model whose experts epmoe computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from epmoe import Balancer, BalanceRule, MoE
from epmoe.transformers.hooks import adopt_all
from epmoe.transformers.stack import Stack, part_of


def stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a model, each once, in the order of its modules."""
    found = (part_of(module) for module in model.modules())
    return list({id(part.stack): part.stack for part in found if part is not None}.values())


def layers(model: nn.Module, *, choices: int | None = None) -> tuple[MoE, ...]:
    """The ``MoE`` of every layer of experts, opened now if no forward has done it yet.

    Collective where it opens.  Their ``loads()`` and ``placement`` are the model's statistics.
    ``choices`` per token are read from the model's config (num_experts_per_tok) if not given.
    Call it before ``torch.compile`` and before a capture: nothing is allocated afterwards.
    """
    adopt_all(model)
    found = stacks(model)
    if not found:
        raise ValueError(
            f"model must have experts that epmoe computes, {type(model).__name__} has none: call "
            "register() and load it with spread(...)"
        )
    for stack in found:
        if not stack.moes:
            stack.open(choices or _choices(model))
    return tuple(moe for stack in found for moe in stack.moes)


def balance(model: nn.Module, rule: BalanceRule | None = None) -> tuple[Balancer, ...]:
    """Let experts move while the model runs; the balancers that do it, one for each heap.

    Collective: opens the layers.  Every forward of the model is a step of the rule.
    """
    layers(model)
    for stack in stacks(model):
        stack.balancer = Balancer(stack.moes, rule or BalanceRule())
    return tuple(stack.balancer for stack in stacks(model) if stack.balancer is not None)


def close(model: nn.Module) -> None:
    """Give the heap back.  Local; otherwise it happens when the model is collected."""
    for stack in stacks(model):
        stack.close()


def _choices(model: nn.Module) -> int:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: int | None = getattr(text, "num_experts_per_tok", None)
    if found is None:
        raise ValueError(
            f"choices must be given: the config of {type(model).__name__} has no "
            "num_experts_per_tok"
        )
    return found
