"""The LayerNorm that precedes products on Triton, against torch's: values, gradients, what is left out, dtypes.

Runs on a GPU, or without one in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/test_layer_norm.py -k triton
"""

import pytest
import torch
import torch.nn.functional as F
from fused import DEVICE
from op_tests import Recorder
from tolerance import assert_within_rule

from avadclip_fast import use_backend
from avadclip_fast.ops._layer_norm import layer_norm

SHAPES = [(1, 8), (3, 37, 64), (2, 130, 100), (300, 512)]


def draw(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, device=device) + 0.5).to(dtype).requires_grad_()


@DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_agrees_with_torch(shape, dtype, device):
    torch.manual_seed(0)
    leaves = [draw(*s, device=device, dtype=dtype) for s in (shape, shape[-1:], shape[-1:])]
    upstream = torch.randn(shape, device=device).to(dtype)
    found = []
    for own, how in ((leaves, "triton"), (leaves, "reference"), ([x.double() for x in leaves], "oracle")):
        own = [x.detach().requires_grad_() for x in own]
        out = F.layer_norm(own[0], shape[-1:], *own[1:]) if how == "oracle" else layer_norm(*own, backend=how)
        found.append([out.detach(), *torch.autograd.grad(out, own, upstream.to(out.dtype))])
    for i, (name, *values) in enumerate(zip(("out", "x", "weight", "bias"), *found, strict=True)):
        assert_within_rule(name, *values, reduced=i > 1)


@DEVICE
def test_triton_takes_any_strides_and_no_rows(device):
    torch.manual_seed(0)
    weight, bias = draw(24, device=device, dtype=torch.float32), draw(24, device=device, dtype=torch.float32)
    x = torch.randn(24, 5, 6, device=device).permute(2, 1, 0)
    torch.testing.assert_close(
        layer_norm(x, weight, bias, backend="triton"), F.layer_norm(x, (24,), weight, bias), rtol=1e-5, atol=1e-6
    )
    for x in (torch.randn(7, 48, device=device)[:, :24], torch.randn(24, 7, device=device).T):
        grads = []
        for backend in ("triton", "reference"):
            given = x.detach().requires_grad_(), weight, bias
            out = layer_norm(*given, backend=backend)
            grads.append([out, *torch.autograd.grad(out.sum(), given)])  # of which the upstream gradient is one number
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    nothing = torch.ones(0, 24, device=device, requires_grad=True)
    out = layer_norm(nothing, weight, bias, backend="triton")
    grads = torch.autograd.grad(out.sum(), (nothing, weight, bias))
    assert out.shape == (0, 24) and [g.count_nonzero().item() for g in grads] == [0, 0, 0]


@DEVICE
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)], ids=str)
def test_triton_computes_only_the_gradients_that_are_wanted(wanted, device):
    torch.manual_seed(0)
    drawn = [draw(*s, device=device, dtype=torch.float32).detach() for s in ((40, 16), (16,), (16,))]
    grads = []
    for backend in ("triton", "reference"):
        own = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(drawn)]
        out = layer_norm(*own, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), [own[i] for i in wanted]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@DEVICE
def test_triton_programs_take_several_blocks_of_rows(device):
    """As where there are more than 1024 blocks, of which the interpreter would make a minute."""
    from avadclip_fast.kernels import layer_norm as kernels

    torch.manual_seed(0)
    x, weight, bias = (draw(*s, device=device, dtype=torch.float32) for s in ((7, 24), (24,), (24,)))
    upstream = torch.randn_like(x)
    dx, sums = torch.empty_like(x), torch.empty(2, 2, 24, device=device)
    _, stats = kernels.forward(x, weight, bias, x.dtype)
    kernels.norm_grad_kernel[2,](upstream, x, weight, *stats, None, dx, sums, 7, 24, 24, 1, ROWS=2, COLS=32)
    expected = torch.autograd.grad(F.layer_norm(x, (24,), weight, bias), (x, weight, bias), upstream)
    torch.testing.assert_close((dx, *sums.sum(0)), expected, rtol=1e-5, atol=1e-5)


@DEVICE
def test_triton_writes_the_dtype_of_the_product_under_autocast(device):
    x, weight, bias = (draw(*s, device=device, dtype=torch.float32) for s in ((3, 5, 16), (16,), (16,)))
    with torch.autocast(device, torch.float16):
        out = layer_norm(x, weight, bias)
    assert out.dtype == torch.float16
    assert torch.autograd.grad(out.float().sum(), x)[0].dtype == torch.float32


@DEVICE
def test_a_backend_that_products_lack_has_no_say(device):
    x, weight, bias = (draw(*s, device=device, dtype=torch.float32) for s in ((3, 8), (8,), (8,)))
    with use_backend("cuda"), Recorder() as recorder:
        layer_norm(x, weight, bias)
    assert list(recorder.calls) == ["avadclip_fast.layer_norm.default"]


@DEVICE
def test_under_torch_func_torch_serves(device):
    x, weight, bias = (draw(*s, device=device, dtype=torch.float32).detach() for s in ((3, 8), (8,), (8,)))
    found, expected = (
        torch.func.jvp(how, (x,), (torch.ones_like(x).cumsum(1),))
        for how in (lambda x: layer_norm(x, weight, bias), lambda x: F.layer_norm(x, (8,), weight, bias))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_torch_serves_what_triton_does_not():
    x, weight, bias = torch.randn(3, 8), torch.rand(8), torch.rand(8)
    with use_backend("reference"):
        assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias))
