"""What the tests of Triton's kernels share, most of all those of operators that replace several layers."""

import pytest
import torch
from op_tests import ON_GPU
from tolerance import assert_within_rule
from torch import Tensor, nn

from avadclip_fast import use_backend
from avadclip_fast.ops import _dispatch
from avadclip_fast.ops._triton import INTERPRETED, triton_reason

DEVICE = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=ON_GPU, id="triton-cuda"),
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="no interpreter"), id="triton-cpu"),
    ],
)
TRITON = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = [  # the marks of a file whose tests run there alone
    pytest.mark.skipif(
        triton_reason(torch.empty(0, device=TRITON)) is not None, reason="neither a GPU nor TRITON_INTERPRET=1"
    ),
    *([pytest.mark.gpu] if TRITON == "cuda" else []),
]
B, T, D = 3, 37, 32


@torch.no_grad()
def _draw(p: Tensor) -> None:
    if p.ndim > 1:
        nn.init.xavier_normal_(p)
    else:  # scales lie about one, biases about zero
        p += 0.2 * torch.randn_like(p)


def drawn(model: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, drawn anew: no bias is zero, no scale is one."""
    torch.manual_seed(0)
    for p in model.parameters():
        _draw(p)
    return model.to(device, dtype)


def results(
    model: nn.Module, x: Tensor, lengths: Tensor | None, upstream: Tensor, backend: str, lowered: bool = False
) -> dict[str, Tensor]:
    """The value of model(x, lengths), under autocast if `lowered`, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    with use_backend(backend):
        with torch.autocast(x.device.type, torch.float16, enabled=lowered):  # which casts in a backward pass too
            out = model(x, lengths)
        learned = dict(model.named_parameters())
        grads = torch.autograd.grad(out, [x, *learned.values()], upstream.to(out.dtype))
    return {"out": out.detach()} | dict(zip(("x", *learned), grads, strict=True))


class Served(list):
    """The names of what the dispatcher called."""

    def by(self, prefix: str) -> bool:
        """Whether a call's name begins so, of those since the last time that it was asked."""
        found = any(name.startswith(prefix) for name in self)
        self.clear()
        return found


@pytest.fixture
def served(monkeypatch) -> Served:
    calls, ranged = Served(), _dispatch.ranged

    def noted(name: str, *args, **kwargs):
        calls.append(name)
        return ranged(name, *args, **kwargs)

    monkeypatch.setattr(_dispatch, "ranged", noted)
    return calls


def assert_agrees(make, dtype: torch.dtype, device: str, ragged: bool, served: Served, prefix: str) -> None:
    """Both ways of make()'s model are held to the tolerance rule, and to float64."""
    model, exact = drawn(make(), device, dtype), drawn(make(), device, dtype).double()
    x = (torch.randn(B, T, D, device=device) + 0.5).to(dtype)
    lengths = torch.tensor([37, 1, 20], device=device) if ragged else None
    valid = torch.arange(T, device=device) < (T if lengths is None else lengths[:, None])
    valid = valid.expand(B, T)
    with torch.no_grad(), use_backend("reference"):
        upstream = torch.randn_like(model(x, lengths))
    upstream[~valid] = 0  # rows beyond the lengths mean nothing
    got = results(model, x, lengths, upstream, "triton")
    assert served.by(prefix)
    expected = results(model, x, lengths, upstream, "reference")
    oracle = results(exact, x.double(), lengths, upstream, "reference")
    assert not served.by(prefix)
    assert_within(got, expected, oracle, valid)


def assert_within(
    got: dict[str, Tensor], expected: dict[str, Tensor], oracle: dict[str, Tensor], valid: Tensor | slice
) -> None:
    """Results are held to the tolerance rule, those of rows where they are valid."""
    for key, value in got.items():
        kept = valid if key in ("out", "x") else slice(None)
        assert_within_rule(key, value[kept], expected[key][kept], oracle[key][kept], reduced=key not in ("out", "x"))


def assert_serves_autocast(make, device: str, served: Served, prefix: str) -> None:
    model, x = drawn(make(), device), torch.randn(B, T, D, device=device)
    with torch.no_grad():
        upstream = torch.ones_like(model(x, None))
    exact, found = results(model, x, None, upstream, "reference"), {}
    for backend in ("triton", "reference"):
        served.clear()
        found[backend] = results(model, x, None, upstream, backend, lowered=True)
        assert served.by(prefix) == (backend == "triton")
    for key, value in exact.items():
        error, known = ((found[backend][key] - value).norm() for backend in ("triton", "reference"))
        assert found["triton"][key].dtype == found["reference"][key].dtype
        assert error <= 2 * known + 2**-10 * value.norm(), key


def assert_gives_what_is_wanted(model: nn.Module, wanted: list[Tensor], x: Tensor, served: Served, prefix: str) -> None:
    """Gradients of the wanted tensors alone; none: another way serves."""
    for t in (x, *model.parameters()):
        t.requires_grad_(any(t is w for w in wanted))
    found = []
    for backend in ("triton", "reference"):
        served.clear()
        with use_backend(backend):
            out = model(x, None)
        assert served.by(prefix) == (backend == "triton" and bool(wanted))
        found.append([out.detach(), *(torch.autograd.grad(out.square().sum(), wanted) if wanted else ())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
