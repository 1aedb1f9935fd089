"""The random Qwen3-30B-shaped model of benchmarks/generate.py."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from generate_times import Bench
from transformers import DistributedConfig, Qwen3MoeForCausalLM


def config_of(asked: argparse.Namespace) -> Any:
    """Qwen3-30B-A3B with fewer layers; ``--tiny`` is for a CPU."""
    width = (
        {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "vocab_size": 512}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
        if asked.tiny
        else {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
        | {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128}
    )
    return transformers.Qwen3MoeConfig(
        num_hidden_layers=asked.layers,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        intermediate_size=6144,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=None,
        **width,
    )


def whole_model(bench: Bench) -> Any:
    """The same random weights on every rank, spread wide enough that routing matters."""
    torch.manual_seed(0)
    with bench.device:
        model = Qwen3MoeForCausalLM._from_config(
            config_of(bench.asked), dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def load(bench: Bench, weights: dict[str, torch.Tensor], where: DistributedConfig) -> Any:
    """A model of this rank's part of ``weights``; other experts than eager are grouped_mm."""
    return Qwen3MoeForCausalLM.from_pretrained(
        None,
        config=config_of(bench.asked),
        state_dict=weights,
        dtype=torch.bfloat16,
        distributed_config=where,
    ).eval()
