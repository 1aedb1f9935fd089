"""Dispatch and combine alone with an exact function of row and slot between them: their oracle."""

import torch

from epmoe.kernels.gemm import starts
from epmoe.kernels.ops import forward_head


def experts(config, rows, slot, scale):
    told = (rows.float() * (1 + slot / 8)).bfloat16()
    return (told.float() * scale).bfloat16() if config.weight_in == "fc2" else told


def turned(alone, rank):
    """Between dispatch and combine: this rank's slots; the rows that each had."""
    counts, first = alone.slot_rows.tolist(), rank * len(alone.slot_rows)
    for slot, (begin, count) in enumerate(zip(starts(counts), counts, strict=False)):
        mine = slice(begin, begin + count)
        scale = alone.scale[mine].unsqueeze(1)
        alone.results[mine] = experts(alone.config, alone.rows[mine], first + slot, scale)
    return counts


def came_back(config, x, ids, weights, out):
    """True if every row came back as if computed here."""
    want = torch.zeros_like(x, dtype=torch.float32)
    for k in range(config.choices):
        chosen, weight = ids[:, k].unsqueeze(1), weights[:, k].unsqueeze(1)
        told = experts(config, x, chosen, weight).float()
        # a product, then a sum: two roundings, as there
        told = told if config.weight_in == "fc2" else weight * told
        want = want + torch.where(chosen >= 0, told, 0.0)
    return torch.equal(out, want.bfloat16())


def were_asked(asked, counts, rank):
    """True if every slot of the rank had the rows that ``asked``, the ids of all ranks, say."""
    first = rank * len(counts)
    return counts == [int((asked == first + slot).sum()) for slot in range(len(counts))]


def there_and_back(alone, x, ids, weights, asked, rank):
    """One round of this rank: every slot had its rows and every row came back."""
    out = torch.full_like(x, float("nan"))
    alone.dispatch(x, ids, weights, forward_head(alone.config.max_rows))
    counts = turned(alone, rank)
    alone.combine(ids, weights, out)
    return came_back(alone.config, x, ids, weights, out) and were_asked(asked, counts, rank)
