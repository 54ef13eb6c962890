"""The GEMM family of linear_act and gated_fusion on Triton: every way the kernel is launched, and its registration.

Runs on a GPU, or without one in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/test_triton_gemm.py
"""

import contextlib

import pytest
import torch
from cases import convert, shifted
from fused import ON_TRITON
from fused import TRITON as DEVICE
from tolerance import assert_within_rule

from avadclip_fast import ops, reference

pytestmark = ON_TRITON
B, T, D, N = 2, 21, 32, 24  # widths that TMA can read, rows and columns that end inside a tile

TILES = {"rows": 16, "cols": 16, "depth": 16, "warps": 4, "stages": 2, "tma": False, "persistent": False}
LAUNCHES = {
    "pointers": {},
    "tma": {"tma": True},
    "persistent": {"persistent": True},
    "tma persistent": {"tma": True, "persistent": True},
    "wide tiles": {"rows": 32, "cols": 64, "depth": 64},
}


@pytest.fixture(params=list(LAUNCHES))
def launch(request, monkeypatch) -> None:
    """Every problem runs with one configuration."""
    from avadclip_fast.kernels import gated_fusion, linear_act

    for module in (linear_act, gated_fusion):
        monkeypatch.setattr(module, "config", lambda *_: {**TILES, **LAUNCHES[request.param]})


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(DEVICE).requires_grad_()


def check(op: str, call, leaves: dict[str, torch.Tensor]) -> None:
    """call(backend, leaves) by Triton against the reference in float32 and float64: result and all gradients."""
    results = []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        own = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
        out = call(backend, own)
        # Of one sign: a sum over rows that cancelled would have the roundings of its summands, but not their size.
        weight = torch.linspace(0.5, 1.5, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
        results.append(
            {"out": out.detach()} | dict(zip(own, torch.autograd.grad(out, own.values(), weight), strict=True))
        )
    for name in results[0]:
        assert_within_rule(f"{op} {name}", *(r[name] for r in results), reduced=name != "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "quick_gelu", "norm": True, "residual": True},
        {"activation": "gelu", "dot": True},
        {"activation": "relu", "taps": 2, "dilation": 4, "causal": True},
        {"activation": "relu", "taps": 3, "residual": True},
        {"taps": 5, "lengths": [9, T]},
    ],
    ids=lambda s: " ".join(map(str, s)),
)
def test_linear_act_is_the_same_however_it_is_launched(launch, settings):
    torch.manual_seed(0)
    settings = {"dot": False, "norm": False, "residual": False, "taps": 0, "lengths": None} | settings
    taps, lengths = settings.pop("taps"), settings.pop("lengths")
    has = {name: settings.pop(name) for name in ("dot", "norm", "residual")}
    leaves = {"x": draw(B, T, D), "bias": draw(N)}
    leaves["weight"] = draw(N, D, taps, scale=(D * taps) ** -0.5) if taps else draw(N, D, scale=D**-0.5)
    leaves |= {"scale": draw(D), "shift": draw(D)} if has["norm"] else {}
    leaves |= {"residual": draw(B, T, N)} if has["residual"] else {}
    leaves |= {"dot": draw(N)} if has["dot"] else {}
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)

    def call(backend, own):
        own = dict(own)
        norm = (own.pop("scale"), own.pop("shift")) if has["norm"] else None
        return ops.linear_act(**own, **settings, norm=norm, lengths=lengths, backend=backend)

    check("linear_act", call, leaves)


def fusion_arguments() -> list[torch.Tensor]:
    weights = [(D, 2 * D), (D,), (D, 2 * D), (D,), (D, D), (D,)]
    return [draw(B, T, D), draw(B, T, D), *(draw(*shape, scale=shape[-1] ** -0.5) for shape in weights)]


def test_gated_fusion_is_the_same_however_it_is_launched(launch):
    torch.manual_seed(0)
    leaves = {str(i): x for i, x in enumerate(fusion_arguments())}
    check("gated_fusion", lambda backend, own: ops.gated_fusion(*own.values(), backend=backend), leaves)


@pytest.mark.parametrize("odd", ["x", "weight", "outputs", "visual", "audio", "gate_weight"])
def test_tma_leaves_what_is_not_aligned(odd, monkeypatch):
    """Its descriptors refuse a pointer or a stride that is no multiple of 16 bytes."""
    from avadclip_fast.kernels import gated_fusion, linear_act

    torch.manual_seed(0)
    for module in (linear_act, gated_fusion):
        monkeypatch.setattr(module, "config", lambda *_: {**TILES, "tma": True})
    if odd in ("visual", "audio", "gate_weight"):
        leaves = dict(zip(("visual", "audio", "gate_weight", *map(str, range(5))), fusion_arguments(), strict=True))
    else:
        outputs = N - 1 if odd == "outputs" else N
        leaves = {"x": draw(B, T, D), "weight": draw(outputs, D, *([] if odd == "weight" else [3]))}
    leaves |= {odd: shifted(leaves[odd].detach())} if odd in leaves else {}

    def call(backend, own):
        if "audio" in own:
            return ops.gated_fusion(*own.values(), backend=backend)
        return ops.linear_act(**own, activation="gelu", backend=backend)

    check("tma", call, leaves)


def test_a_second_run_gives_the_same_bits():
    torch.manual_seed(0)
    x, weight, bias = draw(B, T, D), draw(N, D, 3), draw(N)
    runs = []
    for _ in range(2):
        out = ops.linear_act(x, weight, bias, "quick_gelu", backend="triton")
        runs.append([out, *torch.autograd.grad(out.sum(), (x, weight, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registration_passes_opcheck():
    x, conv, matrix, bias, residual = draw(B, 5, 8), draw(6, 8, 3), draw(6, 8), draw(6), draw(B, 5, 6)
    dot, lengths = draw(6), torch.tensor([3, 5], device=DEVICE)
    op = torch.ops.avadclip_fast.linear_act.default
    for args in (
        (x, conv, bias, "quick_gelu", residual, 1, False, lengths, None, True, None, 1.0),
        (x, matrix, bias, "gelu", residual, 1, False, None, None, True, residual > 0, 2.0),
        (x, matrix, None, "quick_gelu", None, 1, False, None, dot, True, None, 1.0),
        (x, conv, bias, "relu", None, 2, True, None, None, False, residual > 0, 2.0),
        (x.detach(), matrix.detach(), bias, "none", residual, 1, False, None, None, False, None, 1.0),
    ):
        torch.library.opcheck(op, args)
    torch.library.opcheck(torch.ops.avadclip_fast.gated_fusion.default, (*fusion_arguments(), True))
    # of float16, for products in float32: no dtype of what comes out is that of what goes in
    half = (t.detach().half().requires_grad_() for t in (x, draw(8), draw(8)))
    torch.library.opcheck(torch.ops.avadclip_fast.layer_norm.default, (*half, torch.float32))


def test_compiles_whole():
    torch.manual_seed(0)
    x, weight, bias, residual = draw(B, 5, 8), draw(6, 8, 3), draw(6), draw(B, 5, 6)

    def both(x, weight):
        y = ops.linear_act(x, weight, bias, "quick_gelu", residual=residual, backend="triton")
        return ops.linear_act(y, weight[:, :6, 0], dot=bias, backend="triton")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for f in (compiled, both):
        x.grad = None
        f(x, weight).sum().backward()
        if f is compiled:
            expected = x.grad
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)  # the same kernels


@pytest.mark.parametrize("name", ["linear_act", "linear_act without norm", "gated_fusion"])
def test_autocast_gives_what_the_reference_gives(name):
    """Products in float16, norm and residual in float32, as in torch's own layers."""
    torch.manual_seed(0)
    x, weight, bias, scale, shift, residual = draw(B, T, D), draw(N, D), draw(N), draw(D), draw(D), draw(B, T, N)
    fusion, layer = fusion_arguments(), {"x": x, "weight": weight, "bias": bias, "residual": residual}
    layer |= {"activation": "gelu", "norm": (scale, shift)} if name == "linear_act" else {}

    def run(backend):
        with torch.autocast(DEVICE, torch.float16):
            if name == "gated_fusion":
                return ops.gated_fusion(*fusion, backend=backend)
            return ops.linear_act(**layer, backend=backend)

    out = run("triton")
    if name == "gated_fusion":
        plain = reference.gated_fusion(*(t.double() for t in fusion))
    else:
        plain = ops.linear_act(**convert(layer, lambda _, t: t.double()), backend="reference")
    assert out.dtype == run("reference").dtype == torch.float32
    worst = [(o.double() - plain).abs().max().item() for o in (out, run("reference"))]
    assert worst[0] <= 2 * worst[1]
    out.sum().backward()
    leaf = fusion[2] if name == "gated_fusion" else weight
    assert leaf.grad.dtype == torch.float32


def test_a_kernel_runs_on_the_gpu_of_its_tensors(monkeypatch):
    """With several GPUs the current one, on which Triton launches, may be another."""
    chosen = []

    @contextlib.contextmanager
    def device_of(x):
        chosen.append(x.shape)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x, weight, dot = draw(B, 5, 8), draw(6, 8, 3), draw(6)
    ops.linear_act(x, weight, dot=dot, backend="triton").sum().backward()
    assert chosen == [(B, 5, 8), (B, 5)]  # of the forward pass, and of the gradient


@pytest.mark.parametrize("taps", [None, 1, 3])
def test_tma_reads_the_weight_of_any_number_of_taps(taps):
    from avadclip_fast.kernels import linear_act

    assert linear_act.describable(linear_act._taps(draw(N, D, *([taps] if taps else []))))
