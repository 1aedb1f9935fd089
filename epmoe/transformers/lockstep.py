"""Text from prompts that lie unevenly on the ranks: all ranks step together until all are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from epmoe.transformers.model import stacks


def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, pad: int = 0, **options: Any
) -> list[list[int]]:
    """This rank's prompts, each with what the model wrote behind it; [] for no prompts.

    Collective: every rank calls it, also with no prompt, and goes on taking part in the forwards
    until the last rank is done.  Prompts are token ids of any length; ``pad`` fills them up on the
    left.  ``options`` are those of ``model.generate`` and the same on all ranks.  A text ends with
    its end token; what comes out does not depend on which rank a prompt was given to.

    A rank without prompts feeds the model one token for show: its rows reach no expert and no load.
    """
    found = stacks(model)
    together = any(stack.ranks > 1 for stack in found)
    given = [list(prompt) for prompt in prompts] or [[pad]]
    if not all(given):
        raise ValueError("prompts must have at least one token each, got an empty one")
    longest = max(map(len, given))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in given], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in given], device=model.device
    )
    for stack in found:
        stack.idle = not prompts
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=pad,
            synced_gpus=together,
            **options,
        )
    finally:
        for stack in found:
            stack.idle = False
    if not prompts:
        return []
    ends = _ends(options.get("eos_token_id", model.generation_config.eos_token_id))
    rows = (row[longest - len(p) :].tolist() for row, p in zip(out, given, strict=True))
    return [_cut(row, len(p), ends) for row, p in zip(rows, given, strict=True)]


def _ends(eos: int | Sequence[int] | None) -> set[int]:
    """The tokens that end a text."""
    if eos is None:
        return set()
    return {eos} if isinstance(eos, int) else set(eos)


def _cut(row: list[int], prompt: int, ends: set[int]) -> list[int]:
    """Up to the first end behind the prompt: what follows is filling, and depends on the batch.

    >>> _cut([2, 5, 7, 2, 0, 0], 2, {2})
    [2, 5, 7, 2]
    """
    for at in range(prompt, len(row)):
        if row[at] in ends:
            return row[: at + 1]
    return row
