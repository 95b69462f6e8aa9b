"""A replacement of ``torch.nn.MultiheadAttention`` on the flash_attn2 kernels.

Two ways lead to one answer:

* the fast path: projections as views, then :func:`flash_attn2.flash_attn_func`, linear memory;
* torch's own forward (the parent class) for everything the kernels do not take: the attention
  weights themselves, masks that are not purely causal, dropout, dtypes without a kernel, nested
  tensors, and every wrong argument, so that errors are torch's too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import flash_attn_func

_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_CUDA_MAX_HEAD_DIM = 256
_CUDA_MIN_MAJOR = 8


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention with the interface of :class:`torch.nn.MultiheadAttention`.

    Constructor, initialisation, parameters, ``state_dict`` keys and ``forward`` are those of
    torch's class, which is the parent, so ``isinstance`` checks keep working.

    The kernels run (fast path) when all of this holds:

    * ``need_weights=False``; no ``key_padding_mask``;
    * no ``attn_mask``, or an ``attn_mask`` together with ``is_causal=True``;
    * ``dropout == 0``, or evaluation mode;
    * the CPU with any floating dtype; or a GPU of compute capability 8.0 or newer with fp16 or
      bf16 (by the input's dtype or by autocast) and a head dim of at most 256;
    * dense inputs (no nested tensors).

    Everything else takes torch's forward, with the same answer: ``scaled_dot_product_attention``
    with a mask when ``need_weights=False`` (padding, arbitrary masks, dropout, fp32 on a GPU), an
    explicit softmax when the weights are asked for.

    ``is_causal=True`` keeps torch's meaning: a hint that ``attn_mask`` is the causal mask, aligned
    to the top left (query i sees the keys 0..i, whatever the lengths), and an error without an
    ``attn_mask``. As in torch, the hint replaces the mask, so with ``add_bias_kv`` or
    ``add_zero_attn`` the appended keys are hidden from the queries before their position. The
    functional API's ``causal`` differs: it aligns to the bottom right.

    Inside :class:`torch.nn.TransformerEncoderLayer` in evaluation mode without gradients, torch
    replaces the whole layer by one fused call that reads the parameters and never calls this
    module (nested tensors included); the answer is the same. To run these kernels there too, call
    ``torch.backends.mha.set_fastpath_enabled(False)``.

    The backward is the reproducible one when ``torch.use_deterministic_algorithms`` is on.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value, as ``torch.nn.MultiheadAttention.forward``.

        Args:
            query: (L, E) unbatched, (L, N, E), or (N, L, E) with ``batch_first``.
            key: (S, kdim), (S, N, kdim) or (N, S, kdim).
            value: (S, vdim), (S, N, vdim) or (N, S, vdim).
            key_padding_mask: (S) or (N, S); bool, True hides the key, or float, added to scores.
            need_weights: also return the attention weights (never the fast path).
            attn_mask: (L, S) or (N * heads, L, S); bool, True hides the key, or float, added.
            average_attn_weights: mean of the weights over the heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, shaped like query, and the weights, (L, S) or (N, L, S) averaged,
            (heads, L, S) or (N, heads, L, S) not averaged, or None without ``need_weights``.
        """
        wants_more = need_weights or key_padding_mask is not None
        if (
            wants_more
            or not self._inputs_are_for_kernels(query, key, value)
            or not self._mask_is_for_kernels(attn_mask, is_causal, query, key)
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )

        q, k, v = (self._batch_first(x) for x in self._project(query, key, value))
        out = self._attend(q, *self._append_keys(k, v), is_causal)
        if query.dim() == 2:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        # As in torch, out_proj is read, not called: its hooks do not run.
        return F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias), None

    def _inputs_are_for_kernels(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        if self.training and self.dropout > 0.0:
            return False
        return self._shapes_agree(query, key, value) and self._kernels_exist(query)

    def _mask_is_for_kernels(
        self, attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
    ) -> bool:
        """Whether there is no mask, or one of a shape and dtype that torch accepts, named causal.

        The hint without a mask is an error, which torch raises.
        """
        if attn_mask is None or not is_causal:
            return attn_mask is None and not is_causal
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            return False
        seq_dim = 1 if self.batch_first and query.dim() == 3 else 0
        lengths = (query.shape[seq_dim], key.shape[seq_dim])
        batch = query.shape[1 - seq_dim] if query.dim() == 3 else 1
        return attn_mask.shape in (lengths, (batch * self.num_heads, *lengths))

    def _shapes_agree(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs are dense and of shapes that torch accepts."""
        if query.is_nested or key.is_nested or value.is_nested:
            return False
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (
            self.embed_dim,
            self.kdim,
            self.vdim,
        ):
            return False
        if query.dim() == 3:
            batch_dim = 0 if self.batch_first else 1
            return query.shape[batch_dim] == key.shape[batch_dim]
        return True

    def _kernels_exist(self, query: Tensor) -> bool:
        """Whether there is a kernel for query's device and the dtype that attention will see."""
        device, dtype = query.device, query.dtype
        if not query.is_floating_point():
            return False
        if device.type == "cpu":
            return True
        if device.type != "cuda":
            return False
        # Autocast leaves float64 alone.
        if torch.is_autocast_enabled("cuda") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cuda")
        if dtype not in _CUDA_DTYPES or self.head_dim > _CUDA_MAX_HEAD_DIM:
            return False
        # The properties, not get_device_capability: torch.compile folds them into a constant.
        return torch.cuda.get_device_properties(device).major >= _CUDA_MIN_MAJOR

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In-projections, each (..., heads, head_dim): one matrix product where inputs are one.

        Self-attention and shared keys and values leave Q, K, V as views of the packed product,
        whose strides the kernels take as they are.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        packed = (-1, self.num_heads, self.head_dim)
        heads = (self.num_heads, self.head_dim)
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, weight, bias).unflatten(-1, packed).unbind(-3)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        if self._qkv_same_embed_dim and key is value:
            e = self.embed_dim
            q = F.linear(query, weight[:e], b_q).unflatten(-1, heads)
            kv = F.linear(key, weight[e:], None if bias is None else bias[e:])
            return q, *kv.unflatten(-1, packed).unbind(-3)
        if self._qkv_same_embed_dim:
            w_q, w_k, w_v = weight.chunk(3)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        projected = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
        return tuple(x.unflatten(-1, heads) for x in projected)

    def _batch_first(self, x: Tensor) -> Tensor:
        """View (s, h, d), (s, n, h, d) or (n, s, h, d) as (n, s, h, d)."""
        if x.dim() == 3:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned key and value (add_bias_kv) and the zero ones (add_zero_attn)."""
        row = (k.shape[0], 1, self.num_heads, self.head_dim)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).view(1, *row[1:]).expand(row)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).view(1, *row[1:]).expand(row)], dim=1)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(row)], dim=1)
            v = torch.cat([v, v.new_zeros(row)], dim=1)
        return k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        """(n, L, h, d) attention; is_causal hides key j > i from query i, aligned to the top left.

        The kernels align to the bottom right: query i stands at key i + S - L. Keys past L are
        hidden from every query, so they are cut off; with fewer keys than queries, a right window
        of L - S makes up for the shift.
        """
        window = (-1, -1)
        if is_causal:
            seqlen_q = q.shape[1]
            if k.shape[1] > seqlen_q:
                k, v = k[:, :seqlen_q], v[:, :seqlen_q]
            window = (-1, seqlen_q - k.shape[1])
        return flash_attn_func(
            q,
            k,
            v,
            window_size=window,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
