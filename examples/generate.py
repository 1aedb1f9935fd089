"""Text from a Hugging Face MoE model whose experts live on N ranks.

    launch/torchrun.sh 2 python examples/generate.py --tiny
    launch/mpirun.sh 4 python examples/generate.py path/to/model --prompt "The sea" --new 64

The folder holds a checkpoint in safetensors and its config; ``--tiny`` makes a random small one
instead, and writes tokens, not words.  Prompts go round the ranks in turn, so that a rank may well
have none.  Where there are GPUs each rank takes one, and the experts must be in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import epmoe.transformers
from epmoe import Group


def main() -> None:
    """Load, generate, and say how fast and with what load."""
    asked = arguments()
    torch.set_num_threads(1 if asked.tiny else torch.get_num_threads())
    with Group.from_env() as group, tempfile.TemporaryDirectory() as own:
        if torch.cuda.is_available():
            torch.cuda.set_device(group.local_rank)
        meet(group, own)
        folder = asked.model
        if asked.tiny:
            folder = agree(group, own, "where the tiny model lies")
            if group.rank == 0:
                make_tiny(folder)
            group.allgather(b"", what="tiny model written", limit_s=300)
        epmoe.transformers.register(**({"max_rows": asked.max_rows} if asked.max_rows else {}))
        where = epmoe.transformers.spread(folder, group.size)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=asked.dtype, **where).eval()
        if torch.cuda.is_available():
            model.cuda()  # on many ranks it is there already
        layers = epmoe.transformers.layers(model)  # opens the heap, so that loading is not timed

        tokenizer = None if asked.tiny else AutoTokenizer.from_pretrained(folder)
        prompts = read_prompts(asked, tokenizer)
        mine = prompts[group.rank :: group.size]
        start = time.perf_counter()
        texts = epmoe.transformers.generate(model, mine, max_new_tokens=asked.new, do_sample=False)
        took = time.perf_counter() - start
        new = sum(map(len, texts)) - sum(map(len, mine))
        report(group, texts, new, took, layers, tokenizer)
        group.allgather(b"", what="all have said what they had to say", limit_s=300)
        epmoe.transformers.close(model)
        if dist.is_initialized():
            dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    """The command line; a folder or --tiny."""
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    line.add_argument("model", nargs="?", help="folder of a MoE checkpoint in safetensors")
    line.add_argument("--tiny", action="store_true", help="make a small random model instead")
    line.add_argument("--prompt", action="append", help="may be given several times")
    line.add_argument("--new", type=int, default=32, help="tokens to write for each prompt")
    line.add_argument("--max-rows", type=int, help="rows of one rank in one round")
    line.add_argument("--dtype", default="auto", help="bfloat16, float32, or as stored")
    asked = line.parse_args()
    if asked.tiny and asked.dtype == "auto" and torch.cuda.is_available():
        asked.dtype = "bfloat16"
    if bool(asked.model) == asked.tiny:
        line.error("give either a folder or --tiny")
    return asked


def meet(group: Group, own: str) -> None:
    """torch.distributed for transformers, over the ranks that epmoe found; torchrun made its own
    variables, any other launcher needs none."""
    if group.size == 1:
        return
    store = dist.FileStore(os.path.join(agree(group, own, "where to meet"), "store"), group.size)
    os.environ.setdefault("LOCAL_RANK", str(group.local_rank))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size)


def agree(group: Group, own: str, what: str) -> str:
    """Rank 0's folder, on every rank."""
    return group.allgather(own.encode(), what=what, limit_s=300)[0].decode()


def make_tiny(folder: str) -> None:
    """A Qwen3-MoE of half a million random weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(Path(folder))


def read_prompts(asked: argparse.Namespace, tokenizer: AutoTokenizer | None) -> list[list[int]]:
    """Token ids of every prompt; random ones of different length for the tiny model."""
    if tokenizer is None:
        dice = torch.Generator().manual_seed(1)
        lengths = (3, 9, 5, 12, 2, 7)
        return [torch.randint(3, 256, (n,), generator=dice).tolist() for n in lengths]
    return [tokenizer(text)["input_ids"] for text in asked.prompt or ["The sea is"]]


def report(
    group: Group,
    texts: list[list[int]],
    new: int,
    took: float,
    layers: tuple[epmoe.MoE, ...],
    tokenizer: AutoTokenizer | None,
) -> None:
    """Rank 0 prints; loads are the same numbers on every rank."""
    said = "\n".join(
        f"  {tokenizer.decode(text) if tokenizer else ' '.join(map(str, text))}" for text in texts
    )
    every = group.allgather(f"{new}|{took}|{said}".encode(), what="what was written", limit_s=300)
    if group.rank:
        return
    total, slowest = 0, 0.0
    for rank, line in enumerate(every):
        count, seconds, text = line.decode().split("|", 2)
        total, slowest = total + int(count), max(slowest, float(seconds))
        print(f"rank {rank} wrote {count} tokens\n{text}".rstrip())
    load_R = torch.zeros(group.size, dtype=torch.float64)
    for moe in layers:
        # Slots of an expert share its rows; without replicas each has them all.
        load_S = moe.loads()[list(moe.placement.expert_of_S)]
        load_R += load_S.view(group.size, -1).sum(1)
    shares = ", ".join(f"rank {r} {n / load_R.sum():.1%}" for r, n in enumerate(load_R.tolist()))
    print(
        f"{total} tokens in {slowest:.2f} s: {total / slowest:.1f} tokens/s on {group.size} ranks"
    )
    print(f"rows that each rank's experts computed: {shares}")


if __name__ == "__main__":
    main()
