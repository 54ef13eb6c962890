"""The two halves of a pre-norm block, one operator each: x + attention(LayerNorm(x)) and x + MLP(LayerNorm(x)).

They launch the kernels of their parts. Autograd would add up the gradients that x and its LayerNorm have from several
parts in launches of their own: here each is added where the next one is computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams import FIRST, aside
from . import add_act, layer_norm, linear_act, window_attention
from .column_sums import column_sums

APART = 2**22  # elements from which the first product and its activation are launched apart
PLAIN = (1, False, None, None)  # of linear_act: no dilation, not causal, no lengths, no dot


def attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, window: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: x (B, T, D), weight (2D, D) and bias (2D,) of queries and values -> (out, keys, stats, mixed).

    keys: LayerNorm(x); stats: its means and 1/std; mixed: (B, T, 2D), the queries and the values
    """
    keys, stats = layer_norm.forward(x, norm_weight, norm_bias, weight.dtype)
    mixed = F.linear(keys, weight, bias)
    queries, values = mixed.chunk(2, dim=-1)
    return window_attention.forward(queries, keys, values, window, 1, lengths, x), keys, stats, mixed


def attention_backward(
    g: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    window: int,
    lengths: Tensor | None,
    keys: Tensor,
    stats: Tensor,
    mixed: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, weight and bias; empty where `needs` is False."""
    by_mixed, by_keys = torch.empty_like(mixed), torch.empty_like(keys)
    (queries, values), (by_queries, by_values) = (t.chunk(2, dim=-1) for t in (mixed, by_mixed))
    window_attention.write_grads(
        (by_queries, by_keys, by_values), g, queries, keys, values, window=window, heads=1, lengths=lengths
    )
    rows, by_rows = keys.flatten(0, 1), by_mixed.flatten(0, 1)
    nothing = weight.new_empty(0)

    def by_learned() -> tuple[Tensor, Tensor]:
        by_weight = by_rows.T @ rows if needs[3] else nothing
        return by_weight, column_sums(by_rows, weight.dtype) if needs[4] else nothing

    learned = aside("weights", by_learned, FIRST)
    by_keys = torch.addmm(by_keys.flatten(0, 1), by_rows, weight).view(keys.shape) if any(needs[:3]) else by_keys
    return *layer_norm.backward(by_keys, x, norm_weight, stats, needs[:3], plus=g), *learned()


def mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op: x [..., D] -> (out, normed, stats, y, hidden), where hidden = QuickGELU(y)."""
    normed, stats = layer_norm.forward(x, norm_weight, norm_bias, fc_weight.dtype)
    if normed.numel() >= APART:  # with two results to write, a product takes longer than cuBLAS's and another pass
        y = F.linear(normed.view(1, -1, normed.shape[-1]), fc_weight, fc_bias)
        hidden = add_act.forward(y, None, "quick_gelu").view(*normed.shape[:-1], y.shape[-1])
    else:
        hidden, y = linear_act.forward(normed, fc_weight, fc_bias, "quick_gelu", None, *PLAIN, True, None, 1.0)
    out, _ = linear_act.forward(hidden, proj_weight, proj_bias, "none", x, *PLAIN, False, None, 1.0)
    return out, normed, stats, y, hidden


def mlp_backward(
    g: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    normed: Tensor,
    stats: Tensor,
    y: Tensor,
    hidden: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias and the weights and biases in order; empty where `needs` is False."""
    *fc, proj, proj_bias = needs[3:]
    rest = (None, 1.0)  # no dropout
    by_hidden, by_proj, by_proj_bias, _ = linear_act.backward(
        g, hidden, proj_weight, "none", *PLAIN, y.new_empty(0), [any(needs[:5]), proj, proj_bias, False], *rest
    )
    by_normed = by_fc = by_fc_bias = fc_weight.new_empty(0)
    if any(needs[:5]):  # or proj alone is learned, and by_hidden empty
        by_normed, by_fc, by_fc_bias, _ = linear_act.backward(
            by_hidden, normed, fc_weight, "quick_gelu", *PLAIN, y, [any(needs[:3]), *fc, False], *rest
        )
    norm = layer_norm.backward(by_normed, x, norm_weight, stats, needs[:3], plus=g)
    return *norm, by_fc, by_fc_bias, by_proj, by_proj_bias
