"""Modules: attention for packed tensors and a replacement of ``torch.nn.MultiheadAttention``."""

from .attention import FlashCrossAttention, FlashSelfAttention
from .mha import MultiheadAttention
from .replace import replace_mha

__all__ = ["FlashCrossAttention", "FlashSelfAttention", "MultiheadAttention", "replace_mha"]
