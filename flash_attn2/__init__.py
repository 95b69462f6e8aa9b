"""FlashAttention-2 (arXiv 2307.08691) for PyTorch: exact attention in linear memory.

``flash_attn_func`` and its packed forms take the place of the flash-attn package's functions;
``flash_attn2.nn`` holds modules. ``python -m flash_attn2`` prints what was built.
"""

import importlib

from .functional import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .introspection import build_info, list_kernels, plan
from .version import __version__

__all__ = [
    "__version__",
    "build_info",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "list_kernels",
    "nn",
    "plan",
]


def __getattr__(name: str):
    # Attribute access to the modules of flash_attn2.nn, without their import time for all others.
    if name == "nn":
        return importlib.import_module(".nn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
