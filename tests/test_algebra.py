"""The algebra that saves work: each folded form against the plain one, values and gradients, in float64."""

import pytest
import torch
from torch import nn

from avadclip_fast import WindowAttention, ops
from avadclip_fast.modules import MLP, TemporalAggregator, UncertaintyHead
from avadclip_fast.modules.linear_act import binary_head
from avadclip_fast.modules.uncertainty_head import fold
from avadclip_fast.ops._padding import zero_padding

B, T, D = 2, 11, 8
LENGTHS = torch.tensor([4, 11])


def float64(module: nn.Module) -> nn.Module:
    """The module in float64 with every parameter drawn: biases that start at zero would hide mistakes."""
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def assert_same(folded, plain, x: torch.Tensor, modules: list[nn.Module]) -> None:
    """Values, and gradients of x and of every parameter, agree to float64's rounding."""
    leaves = [x, *(p for module in modules for p in module.parameters() if p.requires_grad)]
    results = []
    for form in (folded, plain):
        out = form()
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)])
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # a few hundred roundings of 1e-16


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


def test_binary_head_is_the_classifier_behind_the_mlp(x):
    mlp, classifier = float64(MLP(D)), float64(nn.Linear(D, 1))
    assert_same(
        lambda: binary_head(x, mlp, classifier),
        lambda: classifier(mlp(x, residual=x)).squeeze(-1),
        x,
        [mlp, classifier],
    )


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
def test_a_one_tap_convolution_folds_into_the_one_before(x, lengths):
    conv, after = float64(nn.Conv1d(D, D, 3, padding=1)), float64(nn.Conv1d(D, 5, 1))

    def plain():
        h = ops.linear_act(x, conv.weight, conv.bias, lengths=lengths)
        return ops.linear_act(h, after.weight, after.bias)

    assert_same(lambda: ops.linear_act(x, *fold(conv, after), lengths=lengths), plain, x, [conv, after])


@pytest.mark.parametrize("rows", [T, 3 * D], ids=["few rows: apart", "many rows: folded"])
@pytest.mark.parametrize("valid", [None, LENGTHS], ids=["all", "lengths"])
def test_uncertainty_head_is_the_same_folded_or_not(rows, valid):
    torch.manual_seed(0)
    head = float64(UncertaintyHead(D))
    v = torch.randn(B, rows, D, dtype=torch.float64, requires_grad=True)

    def plain():
        first, _, middle, last = head.theta.theta
        h = ops.linear_act(
            ops.linear_act(v, first.weight, first.bias, "relu"), middle.weight, middle.bias, lengths=valid
        )
        return -ops.linear_act(h, last.weight, last.bias, "relu", residual=v)

    assert (B * rows > 3 * D) == (rows != T)  # the two cases lie on the two sides of the rule
    assert_same(lambda: head(v, valid)[1], plain, v, [head.theta])


@pytest.mark.parametrize("rows", [D // B, T], ids=["few rows: apart", "many rows: folded"])
@pytest.mark.parametrize("valid", [None, LENGTHS], ids=["all", "lengths"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm and residual"])
def test_window_attention_is_the_same_folded_or_not(x, rows, valid, normed):
    attend, norm = float64(WindowAttention(D, 3)), float64(nn.LayerNorm(D))
    x = x[:, :rows].detach().requires_grad_()
    valid = None if valid is None else valid.clamp(max=rows)
    added = {"norm": norm, "residual": x} if normed else {}

    def plain():
        weight, bias = attend.in_proj_weight, attend.in_proj_bias
        q, k, v = nn.functional.linear(norm(x) if normed else x, weight, bias).chunk(3, dim=-1)
        out = attend.out_proj(ops.window_attention(q, k, v, 3, 1, valid))
        return zero_padding(out + x if normed else out, valid)

    assert (B * rows > D) == (rows == T)  # the two cases lie on the two sides of the rule
    assert_same(
        lambda: zero_padding(attend(x, valid, **added), valid), plain, x, [attend, norm] if normed else [attend]
    )


@pytest.mark.parametrize("padding", ["official", "masked"])
def test_aggregator_is_the_same_with_shared_products(x, padding):
    aggregate = float64(TemporalAggregator(D, padding))

    def plain():
        a, valid = aggregate, LENGTHS if padding == "masked" else None
        quick_gelu = lambda y: y * torch.sigmoid(1.702 * y)  # noqa: E731
        mixed, weights = a.simAdj(x, x @ a.gc1.weight, LENGTHS)
        h = quick_gelu(mixed + a.gc1.residual(x, lengths=valid))
        x1 = quick_gelu(a.simAdj(x, h @ a.gc2.weight, LENGTHS, weights)[0] + h)
        h = quick_gelu(a.disAdj(x @ a.gc3.weight, valid) + a.gc3.residual(x, lengths=valid))
        x2 = quick_gelu(a.disAdj(h @ a.gc4.weight, valid) + h)
        return a.linear(torch.cat([x1, x2], dim=-1))

    assert_same(lambda: aggregate(x, LENGTHS), plain, x, [aggregate])


def test_aggregator_is_the_same_where_videos_share_rows():
    """From the row on that `alike` tells, the products and convolutions of one video serve all."""
    torch.manual_seed(0)
    alike, lengths = torch.tensor([4, 11, 6]), torch.tensor([3, 11, 6])
    every = torch.randn(4, T, D, dtype=torch.float64, requires_grad=True)
    aggregate = float64(TemporalAggregator(D, "official"))
    own = (torch.arange(T) < alike[:, None])[..., None]

    def call(*alike: torch.Tensor) -> torch.Tensor:
        return aggregate(torch.where(own, every[:3], every[3]), lengths, *alike)

    assert_same(lambda: call(alike), call, every, [aggregate])
