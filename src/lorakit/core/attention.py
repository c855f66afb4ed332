"""torch's MultiheadAttention with the updates of any number of adapters.

Its own forward reads the weights of both its projections and calls neither, so where an adapter is active the attention
is computed here, step by step as torch does it (Vaswani et al., arXiv 1706.03762): the same bits where updates are
zero. Where none is active, torch's own forward runs.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core.active import Route, Rows, Selection
from lorakit.core.deltas import LayerUpdate
from lorakit.core.layer import AdaptedModule
from lorakit.core.sites import Site
from lorakit.errors import AdapterError


class AdaptedAttention(AdaptedModule):
    """`nn.MultiheadAttention` whose packed input projection, its bias, or whose output projection adapters change.

    What an adapter holds here is for the input projection; an adapter that changes `out_proj` alone has an empty update
    here, which tells that torch's forward would pass it by.

    Attributes:
        lorakit_site: how the packed input projection multiplies; None where it is not packed (kdim, vdim).
    """

    lorakit_site: Site | None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention`; on a route, rows run along dimension 1 unless `batch_first`.

        Raises:
            AdapterError: nested tensors, or a route of another number of rows.
        """
        selection = self.lorakit_state.current()
        slots = selection.slots if isinstance(selection, Route) else [slot for slot, _ in selection.weights]
        if not any(slot in self.lorakit_updates for slot in slots if slot is not None):
            base_forward: Any = super().forward
            return base_forward(  # type: ignore[no-any-return]
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise AdapterError(f"{type(self).__name__}: nested tensors cannot be adapted; pad them, with a mask")
        if is_causal and attn_mask is None:
            raise AdapterError("is_causal is a hint about attn_mask, which is missing (as for torch's own forward)")
        own = cast("Any", self)
        batched, batch_dim = query.dim() == 3, 0 if own.batch_first else 1
        if not batched:
            query, key, value = _each(lambda x: x.unsqueeze(1), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif batch_dim == 0:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        output, weights = self._attend(
            self._projected(selection, query, key, value),
            _additive(key_padding_mask, query.dtype),
            _additive(attn_mask, query.dtype),
            need_weights=need_weights,
            is_causal=is_causal and key_padding_mask is None and not need_weights,
        )
        if isinstance(selection, Route):  # whose layers look for rows in the first dimension
            output = own.out_proj(output.transpose(0, 1)).transpose(0, 1)  # (L, N, d)
        else:
            output = own.out_proj(output.flatten(0, 1)).view(output.shape)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if batch_dim == 0 else output, weights

    # ------------------------------------------------------------ the input projection

    def _projected(
        self, selection: Selection | Route, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (L, N, d): base and updates. What is one tensor is multiplied once, as torch
        does it.
        """
        own = cast("Any", self)
        d = own.embed_dim
        if own.in_proj_weight is None:
            bias = [None] * 3 if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
            weights = (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)
            q, k, v = (
                self._updated(selection, x, F.linear(x, W, b), slice(i * d, (i + 1) * d))
                for i, (x, W, b) in enumerate(zip((query, key, value), weights, bias, strict=True))
            )
            return q, k, v

        def project(x: torch.Tensor, first: int, last: int) -> torch.Tensor:  # (last - first, L, N, d)
            out = slice(first * d, last * d)
            bias = None if own.in_proj_bias is None else own.in_proj_bias[out]
            y = self._updated(selection, x, F.linear(x, own.in_proj_weight[out], bias), out)
            return y.view(*y.shape[:-1], last - first, d).movedim(-2, 0).contiguous()

        if key is not value:
            return project(query, 0, 1)[0], project(key, 1, 2)[0], project(value, 2, 3)[0]
        if query is not key:
            k, v = project(key, 1, 3)
            return project(query, 0, 1)[0], k, v
        q, k, v = project(query, 0, 3)
        return q, k, v

    def _updated(self, selection: Selection | Route, x: torch.Tensor, y: torch.Tensor, out: slice) -> torch.Tensor:
        """`y`, what the base makes of `x` (L, N, in), plus what adapters add to features `out` of the projection."""
        if not isinstance(selection, Route):
            for update, weight in cast("list[tuple[LayerUpdate, float]]", self.active_updates(selection)):
                for change in self._changes(update, x, y, out):
                    y = y + (change if weight == 1.0 else change * weight)
            return y
        rows: Rows
        for update, rows in cast("list[tuple[LayerUpdate, Rows]]", self.routed_updates(selection, x.transpose(0, 1))):
            for change in self._changes(update, x[:, rows], y, out):
                if isinstance(rows, slice):
                    y[:, rows] += change
                else:
                    y.index_add_(1, rows, change.expand(y.shape[0], len(rows), -1))
        return y

    def _changes(self, update: LayerUpdate, x: torch.Tensor, y: torch.Tensor, out: slice) -> list[torch.Tensor]:
        changes = []
        if update.lora is not None and self.lorakit_site is not None:
            flat = x.flatten(0, 1)  # of a transposed tensor, torch's bits would depend on who requires a gradient
            changes.append(update.lora(self.lorakit_site, self, flat, y, out).view(*x.shape[:2], -1))
        if update.bias is not None:
            own: torch.Tensor = self.get_parameter("in_proj_bias")
            changes.append((update.bias - own.float())[out].to(y.dtype).expand(1, 1, -1))
        return changes

    # ------------------------------------------------------------ the attention

    def _attend(
        self,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        padding: torch.Tensor | None,
        mask: torch.Tensor | None,
        *,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of projected q (L, N, d) over k and v (S, N, d).

        Args:
            projected: q, k, v.
            padding: (N, S), added to the scores; None: nothing is padding.
            mask: (L, S) or (N * heads, L, S), added to the scores.
            need_weights: return them too.
            is_causal: `mask` is the causal one and all there is to add.

        Returns:
            (L, N, d), and (N, heads, L, S) or None.
        """
        own = cast("Any", self)
        q, k, v = projected
        (length, rows, d), heads = q.shape, own.num_heads
        if own.bias_k is not None:
            k, v = torch.cat([k, own.bias_k.repeat(1, rows, 1)]), torch.cat([v, own.bias_v.repeat(1, rows, 1)])
            padding, mask = _seen(padding), _seen(mask)
        q, k, v = (x.reshape(-1, rows * heads, d // heads).transpose(0, 1) for x in (q, k, v))  # (N heads, L or S, d')
        if own.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(rows * heads, 1, d // heads)], dim=1) for x in (k, v))
            padding, mask = _seen(padding), _seen(mask)
        span = k.shape[1]
        if mask is not None and mask.ndim == 2:
            mask = mask.unsqueeze(0)
        if padding is not None:
            padding = padding.view(rows, 1, 1, span).expand(-1, heads, -1, -1).reshape(rows * heads, 1, span)
            mask = padding if mask is None else mask + padding
        dropout = own.dropout if self.training else 0.0
        if need_weights:
            scaled = q * math.sqrt(1.0 / (d // heads))
            scores = torch.bmm(scaled, k.mT) if mask is None else torch.baddbmm(mask, scaled, k.mT)
            weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
            output = torch.bmm(weights, v).transpose(0, 1).reshape(length, rows, d)
            return output, weights.view(rows, heads, length, span)
        if is_causal:
            mask = None
        elif mask is not None:
            mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(rows, heads, -1, span)
        q, k, v = (x.reshape(rows, heads, -1, d // heads) for x in (q, k, v))
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return output.permute(2, 0, 1, 3).reshape(length, rows, d), None


def _each(change: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`change` of each; what was one tensor stays one."""
    changed_query = change(query)
    changed_key = changed_query if key is query else change(key)
    return changed_query, changed_key, changed_key if value is key else change(value)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as what is added to the scores: -inf where a boolean one hides."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _seen(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask for one more key, which all see."""
    return None if mask is None else F.pad(mask, (0, 1))


def is_output_projection(layer: nn.Module) -> bool:
    """Whether the layer is a MultiheadAttention's output projection, which its parent reads and does not call."""
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
