"""The experts of a Hugging Face model across ranks: two hooks, and what a caller needs beside them.

    import epmoe.transformers

    epmoe.transformers.register()
    where = epmoe.transformers.spread(folder, ranks)
    model = AutoModelForCausalLM.from_pretrained(folder, **where)

``register`` tells transformers two names: ``experts_implementation="epmoe"`` (5.8 and later, one
rank) and ``ep_implementation="epmoe"`` (5.23 and later, many ranks).  transformers is imported by
that call, not before.  Forward only: a backward pass raises.
"""

from __future__ import annotations

from epmoe.transformers.hooks import register, spread
from epmoe.transformers.lockstep import generate
from epmoe.transformers.model import balance, close, layers

__all__ = ["balance", "close", "generate", "layers", "register", "spread"]
