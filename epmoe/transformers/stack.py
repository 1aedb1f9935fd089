"""Layers of experts that share a heap: opened together at the first forward, run in order."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe import Balancer, EpmoeError, ForwardContext, Group, MoE, MoEConfig
from epmoe.transformers.activation import activation_of
from epmoe.transformers.device import capturing, current, device_of, fields_for
from epmoe.transformers.weights import laid_out, shape_of, slots_of, stored_by

OPEN_S = 600.0  # ranks may read their checkpoints at different speed


class Stack:
    """The layers that share one heap, in the order in which the model was built.

    ``process_group`` holds the ranks the experts are spread over; None is one rank alone.
    """

    def __init__(self, options: Mapping[str, Any], process_group: Any, *, exchange: bool) -> None:
        self.options, self.process_group, self.exchange = dict(options), process_group, exchange
        self.parts: list[weakref.ref[Part]] = []  # parts own the stack, not the other way round
        self.moes: tuple[MoE, ...] = ()
        self.balancer: Balancer | None = None
        self.idle = False  # this rank has no tokens: what the model is fed is for show
        self.closed = False
        self.device = torch.device("cpu")  # where the experts are, known when the stack opens
        self._group: Group | None = None
        self._context: ForwardContext | None = None  # of the step that runs

    def open(self, choices: int) -> None:
        """Collective, once: one heap for all layers, and the slots of each."""
        if self.closed:
            raise EpmoeError("the experts of this model are closed")
        if self.moes:
            return
        parts = [part for part in (ref() for ref in self.parts) if part is not None]
        if capturing():
            raise EpmoeError("a capture cannot open the experts: call layers(model) before it")
        alone = self.process_group is None
        group = Group.alone() if alone else Group.from_torch(self.process_group)
        moes: tuple[MoE, ...] = ()
        try:
            configs: list[MoEConfig] = []
            with group.guarded("reading the experts of a model", OPEN_S):
                self.device = device_of(shape_of(part.experts) for part in parts)
                for index, part in enumerate(parts):
                    part.index = index
                    configs.append(self._config(part, choices, group.size))
            with current(self.device):
                moes = MoE.open_all(configs, group)
                self.closed = True  # until all is loaded: half-turned weights are of no use
                for part, moe in zip(parts, moes, strict=True):
                    experts = part.experts
                    moe.load(
                        **slots_of(
                            experts,
                            interleaved=part.interleaved,
                            restride=alone,
                            joined=laid_out(experts),
                        )
                    )
        except BaseException as error:
            if moes:
                moes[0].close()
            group.close(error)
            raise
        self.moes, self._group, self.closed = moes, group, False
        weakref.finalize(self, _collected, moes[0], group, self.device).atexit = False

    def run(self, part: Part, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One layer's forward for the rows of this rank; ids past the last expert are no choice."""
        if not self.moes or self.closed:
            self.open(ids.shape[1])
        moe = self.moes[part.index]
        if self.idle:
            given, x, ids, weights = x, x[:0], ids[:0], weights[:0]
        if self.device.type == "cpu":  # a GPU's kernels see by themselves that it is no choice
            ids = ids.masked_fill(ids >= moe.config.experts, -1)
        with current(self.device):
            if part.index == 0:
                self._begin(len(x), moe)
            out = moe(
                x.to(part.dtype).contiguous(),
                ids.contiguous(),
                weights.float().contiguous(),
                context=self._context,
            )
        return torch.zeros_like(given) if self.idle else out.to(x.dtype)

    @property
    def ranks(self) -> int:
        """Over how many ranks the experts are spread."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    def close(self) -> None:
        """Local; a later forward raises."""
        self.closed = True
        if self._group is not None:
            _release(self.moes[0], self._group, self.device)

    def _begin(self, rows: int, moe: MoE) -> None:
        """A step of the model begins: who has how many rows, and whether experts should move."""
        group = self._group
        if self.balancer is not None and not capturing():
            self.balancer.step()
        if group is None or group.size == 1:
            self._context = ForwardContext(rows=(rows,))
            return
        if not self.exchange:
            return
        said = group.allgather(
            rows.to_bytes(8, "little"), what="rows of a step", limit_s=moe.config.stall_s
        )
        self._context = ForwardContext(rows=tuple(int.from_bytes(one, "little") for one in said))

    def _config(self, part: Part, choices: int, ranks: int) -> MoEConfig:
        stored, shape = stored_by(part.experts), shape_of(part.experts)
        act = activation_of(part.experts, gated=stored.gated)
        part.interleaved, part.dtype = act.interleaved, shape.dtype
        if shape.slots != part.slots:
            raise ValueError(
                f"each rank must hold whole experts ({part.slots} of them), got {shape.slots}: "
                "ep_size must be fsdp_size * tp_size"
            )
        return MoEConfig(
            experts=shape.slots * ranks,
            choices=choices,
            hidden=shape.hidden,
            inner=shape.inner,
            activation=act.name,
            clamp=act.clamp,
            bias=stored.bias,
            name=f"experts {part.index}",
            **fields_for(shape, self.options),
        )


class Part:
    """One module of experts and its place in the stack.  The module owns it."""

    _numbers = itertools.count()

    def __init__(self, experts: nn.Module, slots: int, stack: Stack) -> None:
        self._experts, self.stack, self.slots = weakref.ref(experts), stack, slots
        self.index = len(stack.parts)
        self.interleaved, self.dtype = False, torch.float32  # known when the stack opens
        self.number = next(Part._numbers)
        stack.parts.append(weakref.ref(self))
        PARTS[self.number] = self
        vars(experts).update(epmoe_part=self, epmoe_number=self.number)
        hook: Any = experts.register_state_dict_pre_hook
        hook(_refuse_to_save)

    @property
    def experts(self) -> nn.Module:
        """The module, which lives as long as it is called."""
        found = self._experts()
        if found is None:
            raise EpmoeError(f"layer {self.index}: its model is gone")
        return found

    def truthful(self) -> bool:
        """Whether the parameters read as transformers stored them."""
        stack = self.stack
        if not stack.moes:
            return True
        moved = stack.moes[self.index].epoch > 0 or stack.moes[self.index].moving
        turned = stored_by(self.experts).transposed and stack.process_group is not None
        return not (moved or turned or laid_out(self.experts))


# A compiled graph can carry a number, not an object: this is how the call finds its layer again.
PARTS: weakref.WeakValueDictionary[int, Part] = weakref.WeakValueDictionary()


def part_of(experts: nn.Module) -> Part | None:
    """The part that this module has been given, if any."""
    found: Part | None = experts.__dict__.get("epmoe_part")
    return found


def adopt(experts: nn.Module, options: Mapping[str, Any], stack: Stack | None = None) -> Part:
    """The part of a module whose experts are all here; a stack of its own unless one is given."""
    part = part_of(experts)
    if part is None:
        stack = stack or Stack(options, None, exchange=True)
        part = Part(experts, shape_of(experts).slots, stack)
    return part


def _release(moe: MoE, group: Group, device: torch.device) -> None:
    with current(device):
        moe.close()
    group.close()


def _collected(moe: MoE, group: Group, device: torch.device) -> None:
    """The collector may come in the middle of a trace, where torch would trace ``close`` as well;
    a thread of its own is in no trace.  At exit the process gives everything back anyway."""
    thread = threading.Thread(target=_release, args=(moe, group, device))
    thread.start()
    thread.join()


def _refuse_to_save(experts: nn.Module, prefix: str, keep_vars: bool) -> None:
    part = part_of(experts)
    if part is not None and not part.truthful():
        raise EpmoeError(
            f"{prefix or 'experts'}: the parameters are epmoe's slots now, turned or moved to "
            "other places, and do not read as the checkpoint any more; save before the first "
            "forward"
        )
