"""Attention without projections, for packed (Q, K, V) and (K, V) tensors."""

from torch import Tensor, nn

from ..functional import flash_attn_kvpacked_func, flash_attn_qkvpacked_func


def _refuse_varlen(**arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is not supported yet: got a {type(value).__name__}, expected None "
                "(pass padded batches)"
            )


class _PackedAttention(nn.Module):
    """What self- and cross-attention share: the options, held as attributes."""

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.window_size = window_size
        self.deterministic = deterministic
        # A buffer, so that .to(device) moves it; not a part of the state_dict.
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def _options(self, causal: bool | None) -> dict:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }

    def extra_repr(self) -> str:
        return (
            f"causal={self.causal}, softmax_scale={self.softmax_scale}, "
            f"window_size={self.window_size}, deterministic={self.deterministic}"
        )


class FlashSelfAttention(_PackedAttention):
    """Self-attention of a packed tensor by :func:`flash_attn2.flash_attn_qkvpacked_func`.

    Args:
        causal: query i sees the keys up to its own position.
        softmax_scale: factor on Q K^T; None is 1 / sqrt(head_dim).
        attention_dropout: dropout of the attention weights while training. Not supported yet:
            a value above 0 raises NotImplementedError in a training forward, and does nothing
            in evaluation.
        window_size: (left, right) keys visible beside the query's own position; -1 is unbounded.
        alibi_slopes: not supported yet: anything but None raises NotImplementedError in forward.
        deterministic: a backward that is bitwise the same from run to run.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attend within each sequence of the batch.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), fp16 or bf16 on a GPU, any floating dtype
                on the CPU.
            causal: overrides the module's own setting for this call.
            cu_seqlens: not supported yet: anything but None raises NotImplementedError.
            max_seqlen: only read together with cu_seqlens.

        Returns:
            (batch, seqlen, heads, head_dim), in qkv's dtype (the autocast dtype under autocast).
        """
        _refuse_varlen(cu_seqlens=cu_seqlens)
        return flash_attn_qkvpacked_func(qkv, **self._options(causal))


class FlashCrossAttention(_PackedAttention):
    """Cross-attention on packed keys and values by :func:`flash_attn2.flash_attn_kvpacked_func`.

    The arguments are those of :class:`FlashSelfAttention`; mind that ``alibi_slopes`` comes before
    ``window_size`` here, as in flash-attn. A causal mask is aligned to the bottom right: the last
    query sees every key.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attend from each query sequence to the key sequence of the same batch entry.

        Args:
            q: (batch, seqlen_q, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim), heads a multiple of heads_k, q's dtype.
            causal: overrides the module's own setting for this call.
            cu_seqlens, cu_seqlens_k: not supported yet: anything but None raises
                NotImplementedError.
            max_seqlen, max_seqlen_k: only read together with cu_seqlens and cu_seqlens_k.

        Returns:
            (batch, seqlen_q, heads, head_dim), in q's dtype (the autocast dtype under autocast).
        """
        _refuse_varlen(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
        return flash_attn_kvpacked_func(q, kv, **self._options(causal))
