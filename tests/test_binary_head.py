"""The binary head as one operator on Triton, against the module's other way.

Runs on a GPU, or without one in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/test_binary_head.py -k triton
"""

import fused
import pytest
import torch
from fused import DEVICE, B, D, T, drawn
from op_tests import Recorder
from torch import Tensor, nn

from avadclip_fast import BackendError, use_backend
from avadclip_fast.modules import MLP
from avadclip_fast.modules.linear_act import binary_head

served = fused.served  # the fixture
PREFIX = "binary_head"


class Head(nn.Module):
    def __init__(self, width: int = D):
        super().__init__()
        self.mlp, self.classifier = MLP(width), nn.Linear(width, 1)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return binary_head(x, self.mlp, self.classifier, lengths)


@DEVICE
@pytest.mark.parametrize("ragged", [False, True], ids=["all rows", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_agrees_with_the_other_way(ragged, dtype, device, served):
    fused.assert_agrees(Head, dtype, device, ragged, served, PREFIX)


@DEVICE
def test_triton_serves_autocast(device, served):
    fused.assert_serves_autocast(Head, device, served, PREFIX)
    model, x = drawn(Head(), device), torch.randn(B, T, D, device=device)
    with Recorder() as recorder, use_backend("triton"), torch.autocast(device, torch.float16):
        model(x, None)
    _, given, _ = recorder.calls["avadclip_fast.binary_head.default"]
    assert {each.dtype for each in given} == {torch.float16}


@DEVICE
@pytest.mark.parametrize("learned", ["x", "mlp", "classifier", "none"])
def test_triton_computes_only_the_gradients_that_are_wanted(learned, device, served):
    model, x = drawn(Head(), device), torch.randn(B, T, D, device=device)
    parts = {"x": [x], "mlp": [*model.mlp.parameters()], "classifier": [*model.classifier.parameters()], "none": []}
    fused.assert_gives_what_is_wanted(model, parts[learned], x, served, PREFIX)


@DEVICE
def test_triton_takes_no_rows_and_is_differentiable_once(device):
    model, x = drawn(Head(), device), torch.randn(B, T, D, device=device, requires_grad=True)
    with use_backend("triton"):
        out = model(x[:0], None)
        assert out.shape == (0, T) and not torch.autograd.grad(out.sum(), x)[0].any()
        (first,) = torch.autograd.grad(model(x, None).sum(), x, create_graph=True)
        with pytest.raises(BackendError, match="twice"):
            torch.autograd.grad(first.sum(), x)


@DEVICE
def test_triton_takes_rows_of_any_shape(device, served):
    model = drawn(Head(), device)
    for shape in ((4, D), (2, 1, 4, D)):
        x = torch.randn(*shape[:-1], 2 * D, device=device)[..., :D]  # rows that lie apart
        upstream = torch.ones((), device=device).expand(shape[:-1])
        found = [fused.results(model, x, None, upstream, backend) for backend in ("triton", "reference")]
        assert served.by(PREFIX)
        for a, b in zip(*(each.values() for each in found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@DEVICE
def test_triton_takes_more_channels_than_a_tile(device, served):
    model, upstream = drawn(Head(130), device), torch.ones(5, device=device)  # 520 columns of the pre-activation
    x = torch.randn(5, 130, device=device)
    found = [fused.results(model, x, None, upstream, backend) for backend in ("triton", "reference")]
    assert served.by(PREFIX)
    for a, b in zip(*(each.values() for each in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@DEVICE
@pytest.mark.parametrize("lengths", [[37, 1], [37.0, 1.0, 20.0]], ids=["two", "fractions"])
def test_triton_refuses_lengths_as_the_other_way_does(lengths, device):
    model, x = drawn(Head(), device), torch.randn(B, T, D, device=device, requires_grad=True)
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="lengths must"):
            model(x, torch.tensor(lengths, device=device))


@DEVICE
def test_triton_says_what_is_wrong(device):
    model = drawn(Head(), device)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="shape"):
            model(torch.randn(B, T, D + 1, device=device, requires_grad=True), None)
        with pytest.raises(ValueError, match="cast one"):
            model(torch.randn(B, T, D, device=device, dtype=torch.float16, requires_grad=True), None)


@DEVICE
def test_triton_registration_passes_opcheck(device):
    shapes = ((2, 5, 8), (16, 8), (16,), (16,), (8,))
    arguments = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    torch.library.opcheck(torch.ops.avadclip_fast.binary_head.default, arguments)
    x, weight, _, dot, direct = (t.detach() for t in arguments)
    given = (torch.ones(2, 5, device=device), x, weight, dot, direct, torch.ones(10, 16, device=device), [True] * 5)
    grads = torch.ops.avadclip_fast.binary_head_backward(*given)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 5  # results share no memory
