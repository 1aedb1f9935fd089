"""What the heap of GPU memory says where there is no GPU; tests/gpu has the rest."""

from ranks import several

from epmoe import EpmoeError, Group, MoE, MoEConfig
from epmoe.comm import device


def test_a_layer_where_no_gpu_is_is_refused_by_name_on_all_ranks(monkeypatch):
    monkeypatch.setattr(device, "why_not", lambda: "torch sees no CUDA device")
    config = MoEConfig(experts=4, choices=2, hidden=64, inner=64, max_rows=8, heap="cuda")

    def one(rank):
        with Group.from_env() as group:
            try:
                MoE.open(config, group)
            except EpmoeError as error:
                return str(error)

    for rank, outcome in enumerate(several(2, one)):
        assert f"rank {rank}: no heap of GPU memory here: torch sees no CUDA" in outcome.result
