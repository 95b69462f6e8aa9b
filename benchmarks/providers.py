"""The attention implementations that are compared: ours, torch's own, and packages if installed.

``find_providers`` returns what can be imported on a device, and for the rest the reason. All
providers start from (b, s, h, d) tensors; one that wants (b, h, s, d) gets transposed views, made
outside the timed region.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from .cases import UsageError

DEFAULT_PEERS = ("flash", "cudnn")

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Provider:
    """An attention implementation.

    ``key`` selects it on the command line, ``name`` stands in results and tables. ``call(q, k, v,
    causal)`` takes and returns tensors in the provider's layout: (b, h, s, d) when ``heads_first``,
    else (b, s, h, d). Where it can, it takes a window (left, right) in place of ``causal`` as a
    fifth argument. Calls run inside ``context()``.
    """

    key: str
    name: str
    call: Callable[..., Tensor]
    heads_first: bool = False
    context: Callable[[], AbstractContextManager] = nullcontext

    def view(self, tensor: Tensor) -> Tensor:
        """The view that turns (b, s, h, d) into the provider's layout, and back."""
        return tensor.transpose(1, 2) if self.heads_first else tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Attention with (b, s, h, d) in and out, whatever the provider's own layout."""
        return self.view(self.call(self.view(q), self.view(k), self.view(v), causal))


def find_providers(device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Providers usable on ``device``, and {key: reason} of those that are not."""
    finders = {
        "ours": find_ours,
        "deterministic": functools.partial(find_ours, deterministic=True),
        **{key: functools.partial(find_sdpa, key) for key in SDPA_BACKENDS},
        "flex": find_flex,
        "fa2": functools.partial(find_package, "fa2", "flash-attn 2", "flash_attn"),
        "fa3": functools.partial(find_package, "fa3", "flash-attn 3", "flash_attn_interface"),
        "fa4": functools.partial(find_package, "fa4", "flash-attn 4", "flash_attn.cute"),
    }
    found, missing = [], {}
    for key, find in finders.items():
        try:
            found += find(device)
        except Exception as error:  # an installed package may fail on import in any way
            missing[key] = f"{type(error).__name__}: {error}"
    return found, missing


def select_providers(device: torch.device, wanted: list[str] | None = None) -> list[Provider]:
    """The providers whose key or name is in ``wanted`` ("all" for every one).

    None stands for ours and those of the default peers that the device has. Raises ``UsageError``
    for a wanted one that is unknown or cannot be used, with the reason.
    """
    found, missing = find_providers(device)
    if wanted is None:
        wanted = ["ours", *(p.key for p in found if p.key in DEFAULT_PEERS)]
    if "all" in wanted:
        return found
    selected = [p for p in found if p.key in wanted or p.name in wanted]
    for name in wanted:
        if not any(name in (p.key, p.name) for p in selected):
            known = ", ".join(["all", *dict.fromkeys(p.key for p in found)])
            reason = missing.get(name, f"unknown, the choices are {known}")
            raise UsageError(f"providers: {name!r} cannot be used on {device.type}: {reason}")
    return selected


def find_ours(device: torch.device, deterministic: bool = False) -> list[Provider]:
    """flash_attn2: a provider for each kernel family that the device runs, or the reference."""
    from flash_attn2 import flash_attn_func

    def call(q, k, v, causal, window=(-1, -1)):
        return flash_attn_func(
            q, k, v, causal=causal, window_size=window, deterministic=deterministic
        )

    key, kind = ("deterministic", ", deterministic") if deterministic else ("ours", "")
    if device.type != "cuda":
        return [Provider(key, f"flash_attn2[reference{kind}]", call)]
    from flash_attn2.introspection import families_of_gpu, forced_family

    families = families_of_gpu(device)
    if not families:
        raise ImportError("flash_attn2 was built without CUDA kernels for this GPU")
    return [
        Provider(
            key,
            f"flash_attn2[{family}{kind}]",
            call,
            context=functools.partial(forced_family, family),
        )
        for family in families
    ]


def find_sdpa(key: str, device: torch.device) -> list[Provider]:
    """torch's scaled_dot_product_attention, held to one backend."""
    if device.type != "cuda" and key not in ("flash", "math"):
        raise ImportError(f"torch has no {key} backend on {device.type}")
    context = functools.partial(sdpa_kernel, SDPA_BACKENDS[key])
    return [Provider(key, f"torch[{key}]", call_sdpa, heads_first=True, context=context)]


def no_window(window: tuple[int, int] | None) -> None:
    if window is not None:
        raise NotImplementedError(f"this provider is not called with a window, got {window}")


def call_sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int] | None = None
) -> Tensor:
    no_window(window)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if causal and seqlen_q != seqlen_k:
        # is_causal aligns to the top left; the bias object is torch's way to the bottom right.
        bias = causal_lower_right(seqlen_q, seqlen_k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def find_flex(device: torch.device) -> list[Provider]:
    """torch's FlexAttention, compiled; the block mask is made once per length."""
    if device.type != "cuda":
        raise ImportError("compiled FlexAttention has no backward on the CPU")
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every cell is a shape of its own, and past the limit the call would run uncompiled.
    torch._dynamo.config.recompile_limit = 256
    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.lru_cache(maxsize=8)
    def causal_mask(seqlen_q: int, seqlen_k: int):
        def visible(b, h, row, column):
            return column <= row + (seqlen_k - seqlen_q)

        return create_block_mask(visible, None, None, seqlen_q, seqlen_k, device=device)

    def call(q, k, v, causal, window=None):
        no_window(window)
        mask = causal_mask(q.shape[2], k.shape[2]) if causal else None
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return [Provider("flex", "flex_attention", call, heads_first=True)]


def find_package(key: str, name: str, module: str, device: torch.device) -> list[Provider]:
    """A flash-attn package: the function is the same, some versions return (out, lse)."""
    if device.type != "cuda":
        raise ImportError(f"{name} needs a CUDA device")
    function = importlib.import_module(module).flash_attn_func

    def call(q, k, v, causal, window=(-1, -1)):
        result = function(q, k, v, causal=causal, window_size=window)
        return result[0] if isinstance(result, tuple) else result

    return [Provider(key, name, call)]
