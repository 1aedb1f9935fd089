"""A kernel of somebody else that takes SMs away, for a while."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from epmoe.kernels.compile import compile_kernel
from epmoe.kernels.launch import Launch

SOURCE = Path(__file__).with_suffix(".cu")


class Hog:
    """On a stream of its own, one block an SM, with all of that SM's shared memory."""

    def __init__(self):
        self.kernel, self.stream = compile_kernel(str(SOURCE), "hog"), torch.cuda.Stream()
        self.there = torch.zeros(1024, dtype=torch.int32).pin_memory()

    def take(self, sms, ms):
        """Queue it; returns at once."""
        given = [self.there, int(ms * 1e6)]
        launch = Launch(self.kernel, (sms,), 64, given, shared=220 << 10)
        launch.enqueue(self.stream.cuda_stream)

    def hold(self, sms, ms):
        """Returns when that many SMs are taken, which they stay for ``ms``."""
        self.stream.synchronize()
        self.there.zero_()
        self.take(sms, ms)
        until = time.monotonic() + 5
        while int(self.there.sum()) < sms:
            if time.monotonic() > until:
                raise TimeoutError(f"{int(self.there.sum())} of {sms} hogs run")
