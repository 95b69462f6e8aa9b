"""A decoder-only transformer: RMSNorm, rotary positions, fused QKV, GELU MLP.

The attention is chosen by name, so that one model can be trained side by side on each:

* ``flash``: :func:`flash_attn2.flash_attn_func`;
* ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention``;
* ``eager``: matrix product, softmax, matrix product, with the whole score matrix in memory.

Any callable ``(q, k, v) -> out`` on causal (batch, seqlen, heads, head_dim) tensors serves too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flash_attn2 import flash_attn_func

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`; ``n_kv_head`` below ``n_head`` makes grouped-query attention."""

    n_layer: int
    n_head: int
    hidden: int
    vocab: int = 256
    max_seqlen: int = 2048
    n_kv_head: int | None = None
    mlp_ratio: int = 4
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.hidden % self.n_head:
            raise ValueError(f"hidden={self.hidden} must be a multiple of n_head={self.n_head}")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (hidden / n_head) must be even for rotary positions"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


# The two sizes of the FlashAttention-2 paper's Table 1.
GPT_355M = GPTConfig(n_layer=24, n_head=16, hidden=1024, vocab=50304)
GPT_1_3B = GPTConfig(n_layer=24, n_head=16, hidden=2048, vocab=50304)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    q = rearrange(q, "b i (h g) d -> b h g i d", g=group)
    k, v = (rearrange(x, "b j h d -> b h 1 j d") for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return rearrange(weights.to(v.dtype) @ v, "b h g i d -> b i (h g) d")


ATTENTIONS: dict[str, Attention] = {
    "flash": flash_attention,
    "sdpa": sdpa_attention,
    "eager": eager_attention,
}


def rotary_table(
    seqlen: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and frequency: two fp32 (seqlen, 1, head_dim / 2)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    position = torch.arange(seqlen, device=device).float()
    angle = rearrange(position, "s -> s 1 1") * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of (batch, seqlen, heads, d), in fp32 inside."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.qkv = nn.Linear(config.hidden, sum(self.heads) * config.head_dim, bias=False)
        self.proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.attention = attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(x), "b s (h d) -> b s h d", h=sum(self.heads))
        q, k, v = qkv.split(self.heads, dim=2)
        out = self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(rearrange(out, "b s h d -> b s (h d)"))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.mlp_ratio * config.hidden, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden)
        self.attn = SelfAttention(config, attention)
        self.norm2 = nn.RMSNorm(config.hidden)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT of config's sizes; attention is a name in :data:`ATTENTIONS` or a callable."""

    def __init__(self, config: GPTConfig, attention: str | Attention = "flash") -> None:
        super().__init__()
        if isinstance(attention, str):
            if attention not in ATTENTIONS:
                raise ValueError(f"attention={attention!r} must be one of {', '.join(ATTENTIONS)}")
            attention = ATTENTIONS[attention]
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal of 0.02; smaller where a block adds to the residual stream, as in GPT-2."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=residual_std if into_residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predict the next token at each position.

        Args:
            tokens: int64 (batch, seqlen).
            targets: int64 (batch, seqlen), the token that follows each position, or None.

        Returns:
            The mean cross-entropy in nats, fp32; without targets the logits (batch, seqlen, vocab).
        """
        cos, sin = rotary_table(
            tokens.shape[1], self.config.head_dim, self.config.rope_base, tokens.device
        )
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def step_flops(self, batch: int, seqlen: int) -> float:
        """FLOPs of one training step by the FlashAttention-2 paper's formula (Section 4.2).

        6 * parameters * tokens + 12 * layers * hidden * seqlen^2 * batch: forward and backward,
        embeddings counted as parameters, the attention term not halved for the causal mask.
        """
        c = self.config
        dense = 6 * self.num_params() * batch * seqlen
        return float(dense + 12 * c.n_layer * c.hidden * seqlen**2 * batch)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        new_tokens: int,
        temperature: float = 0.8,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append new_tokens sampled tokens to the int64 (seqlen,) prompt; returns all of them."""
        tokens = prompt
        for _ in range(new_tokens):
            logits = self(tokens[None, -self.config.max_seqlen :])[0, -1].float()
            weights = (logits / temperature).softmax(dim=-1)
            following = torch.multinomial(weights, 1, generator=generator)
            tokens = torch.cat([tokens, following])
        return tokens
