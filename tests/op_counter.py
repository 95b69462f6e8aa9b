"""A spy on the dispatcher: how often a piece of code runs the attention op."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountForward(TorchDispatchMode):
    """Counts the calls of flash_attn2::forward that reach the dispatcher inside the with block."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.flash_attn2.forward.default
        return func(*args, **(kwargs or {}))
