"""epmoe: a mixture-of-experts layer over the ranks of one machine, one round per forward."""

from __future__ import annotations

from epmoe.balancer import Balancer, BalanceRule
from epmoe.comm.group import Group
from epmoe.config import MoEConfig
from epmoe.context import ForwardContext
from epmoe.errors import ConfigMismatch, EpmoeError, Evicted, PeerLost
from epmoe.kernels.gemm import interleave_
from epmoe.moe import MoE
from epmoe.reference import reference_moe
from epmoe.sched.balance import rebalance
from epmoe.sched.placement import Placement
from epmoe.sched.route import Router, Routing, route

__version__ = "0.1.0"

__all__ = [
    "BalanceRule",
    "Balancer",
    "ConfigMismatch",
    "EpmoeError",
    "Evicted",
    "ForwardContext",
    "Group",
    "MoE",
    "MoEConfig",
    "PeerLost",
    "Placement",
    "Router",
    "Routing",
    "interleave_",
    "rebalance",
    "reference_moe",
    "route",
]
