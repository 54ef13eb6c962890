"""Halves of a block as one operator on Triton, against the modules' other way: values, gradients, what is left out.

Runs on a GPU, or without one in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/test_residual_block.py -k triton
"""

from collections.abc import Callable

import fused
import pytest
import torch
from fused import DEVICE, B, D, T, drawn, results
from torch import Tensor, nn
from touch_kernels import LAYERS, touch_layer

from avadclip_fast import BackendError, WindowAttention, use_backend
from avadclip_fast.modules import MLP
from avadclip_fast.ops import _triton

served = fused.served  # the fixture
PREFIX = "residual_"


class Half(nn.Module):
    """x + part(LayerNorm(x)), as in a block."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.norm, self.part = nn.LayerNorm(D), part

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self.part(x, residual=x, norm=self.norm, lengths=lengths)


HALVES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Half(MLP(D)),
    "windows of 5": lambda: Half(WindowAttention(D, 5)),
    "one window": lambda: Half(WindowAttention(D, 10**6)),
}
each = pytest.mark.parametrize("name", HALVES)


@DEVICE
@each
@pytest.mark.parametrize("ragged", [False, True], ids=["all rows", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_agrees_with_the_other_way(name, ragged, dtype, device, served):
    fused.assert_agrees(HALVES[name], dtype, device, ragged, served, PREFIX)


@DEVICE
@each
def test_triton_serves_autocast(name, device, served):
    fused.assert_serves_autocast(HALVES[name], device, served, PREFIX)


@DEVICE
@each
@pytest.mark.parametrize("learned", ["x", "norm", "part", "none"])
def test_triton_computes_only_the_gradients_that_are_wanted(name, learned, device, served):
    model, x = drawn(HALVES[name](), device), torch.randn(B, T, D, device=device)
    wanted = {"x": [x], "norm": [*model.norm.parameters()], "part": [*model.part.parameters()], "none": []}[learned]
    fused.assert_gives_what_is_wanted(model, wanted, x, served, PREFIX)


@DEVICE
@pytest.mark.parametrize("layer", ["c_fc", "c_proj"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_triton_learns_one_tensor_alone(layer, kind, device, served):
    model, x = drawn(HALVES["mlp"](), device), torch.randn(B, T, D, device=device)
    wanted = getattr(getattr(model.part, layer), kind)
    fused.assert_gives_what_is_wanted(model, [wanted], x, served, PREFIX)


@DEVICE
@each
def test_triton_serves_no_pass_without_gradients(name, device, served):
    """A half that is only read keeps nothing of what its backward pass would need."""
    with use_backend("triton"), torch.no_grad():
        drawn(HALVES[name](), device)(torch.randn(B, T, D, device=device), None)
    assert not served.by(PREFIX)


@DEVICE
def test_triton_leaves_other_norms_residuals_heads_and_backends(device, served):
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    attention, mlp = (drawn(HALVES[name](), device).part for name in ("windows of 5", "mlp"))
    with use_backend("triton"):
        for part in (WindowAttention(D, 5, backend="reference"), MLP(D, backend="reference")):
            part.to(device)(x, residual=x, norm=nn.LayerNorm(D).to(device))
        for part in (attention, mlp):
            part(x, residual=x.clone(), norm=nn.LayerNorm(D).to(device))
            part(x, residual=x, norm=nn.LayerNorm(D, eps=1e-6).to(device))
            part(x, residual=x)
            part(x, norm=nn.LayerNorm(D).to(device))
        WindowAttention(D, 5, heads=2).to(device)(x, residual=x, norm=nn.LayerNorm(D).to(device))
        few = x[:1, :D]  # fewer rows than folding pays for
        attention(few, residual=few, norm=nn.LayerNorm(D).to(device))
    assert not served.by(PREFIX)


@DEVICE
@each
def test_triton_is_differentiable_once(name, device):
    model, x = drawn(HALVES[name](), device), torch.randn(B, T, D, device=device, requires_grad=True)
    with use_backend("triton"):
        (first,) = torch.autograd.grad(model(x, None).sum(), x, create_graph=True)
        with pytest.raises(BackendError, match="twice"):
            torch.autograd.grad(first.sum(), x)


@DEVICE
@each
def test_under_torch_func_the_other_way_serves(name, device, served, monkeypatch):
    monkeypatch.setattr(_triton, "declines_exact", lambda weight: None)  # else a GPU's float32 goes to cuBLAS anyway
    model, x = drawn(HALVES[name](), device), torch.randn(B, T, D, device=device)
    found, slope = torch.func.jvp(lambda x: model(x, None), (x,), (torch.randn_like(x),))
    assert not served.by(PREFIX)
    torch.testing.assert_close(found, model(x, None), rtol=1e-4, atol=1e-4)
    assert served.by(PREFIX) and slope.isfinite().all()


@DEVICE
@each
def test_triton_says_what_is_wrong(name, device):
    model = drawn(HALVES[name](), device)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="shape"):
            model(torch.randn(B, T, D + 1, device=device, requires_grad=True), None)
        with pytest.raises(ValueError, match="cast one"):
            model(torch.randn(B, T, D, device=device, dtype=torch.float16, requires_grad=True), None)
        model.norm = nn.LayerNorm(D + 1).to(device)
        with pytest.raises(ValueError, match="norm"):
            model(torch.randn(B, T, D, device=device, requires_grad=True), None)


@DEVICE
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "at once"])
def test_triton_takes_rows_of_any_shape(apart, device, served, monkeypatch):
    """Also of so many that the first product and its activation are launched apart."""
    monkeypatch.setattr("avadclip_fast.kernels.residual_block.APART", 0 if apart else 2**62)
    model = drawn(HALVES["mlp"](), device)
    for shape in ((D,), (4, D), (2, 1, 4, D)):
        x, upstream = torch.randn(shape, device=device), torch.ones((), device=device).expand(shape)
        found = [results(model, x, None, upstream, backend) for backend in ("triton", "reference")]
        assert served.by(PREFIX)
        for a, b in zip(*(each.values() for each in found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@DEVICE
@each
@pytest.mark.parametrize("lengths", [[37, 1], [37.0, 1.0, 20.0]], ids=["two", "fractions"])
def test_triton_refuses_lengths_as_the_other_way_does(name, lengths, device):
    model, x = drawn(HALVES[name](), device), torch.randn(B, T, D, device=device, requires_grad=True)
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="lengths must"):
            model(x, torch.tensor(lengths, device=device))


@DEVICE
@pytest.mark.parametrize("name", LAYERS)
def test_sanitizers_watch_the_operators_of_layers(name, device, served):
    touch_layer(name, "triton", torch.float32, device)
    assert served.by(name)


@DEVICE
def test_triton_registration_passes_opcheck(device):
    """In float16, and under autocast, where each result has the dtype of x, of the weights, or float32."""
    half, operators = torch.float16, torch.ops.avadclip_fast
    x, norm = torch.randn(2, 5, 8, device=device, requires_grad=True), torch.rand(2, 8, device=device)
    weights = [torch.randn(s, device=device).to(half).requires_grad_() for s in ((16, 8), (16,), (8, 16), (8,))]
    lengths = torch.tensor([5, 2], device=device)
    torch.library.opcheck(operators.residual_attention.default, (x, *norm, *weights[:2], 3, lengths))
    torch.library.opcheck(operators.residual_mlp.default, (x, *norm, *weights))
    low = x.detach().to(half).requires_grad_()
    torch.library.opcheck(operators.residual_mlp.default, (low, *norm.to(half), *weights))


@DEVICE
@each
def test_triton_compiles_whole(name, device):
    """To the bits of eager mode, and on a GPU within the rule: cuBLAS chooses kernels by layout and workspace."""
    model, x = drawn(HALVES[name](), device), torch.randn(B, T, D, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(B, T, D, device=device)
    eager = results(model, x, None, upstream, "triton")
    got = dict(zip(eager, results(compiled, x, None, upstream, "triton").values(), strict=True))
    if device == "cpu":
        for key, value in got.items():
            assert torch.equal(value, eager[key]), key
    expected = results(model, x, None, upstream, "reference")
    oracle = results(drawn(HALVES[name](), device).double(), x.double(), None, upstream, "reference")
    fused.assert_within(got, expected, oracle, slice(None))
