"""linear_act: every backend against the reference, the reference against loops, every combination it offers."""

import functools
import math

import numpy as np
import pytest
import torch
from cases import CASES, LARGE, Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import ON_GPU, ON_TILES, OpTests, Recorder, on_both_units

from avadclip_fast import ops
from avadclip_fast.ops import _dispatch, _triton
from avadclip_fast.ops._linear_act_onednn import HAS_ONEDNN

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


class TestLinearAct(OpTests):
    op = "linear_act"
    ragged = "everything"
    single = {"onednn": "quick-gelu-norm"}  # noqa: RUF012  it has no convolutions
    per_row = True
    lowered = True
    free = {("weight", 2)}

    def oracle(self, x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot, dropout, needed=None):
        if x.ndim == 2:
            residual = residual if residual is None else residual[None]
            dropout = dropout and (dropout[0][None], dropout[1])
            rest = (weight, bias, activation, residual, norm, dilation, causal, lengths, dot, dropout)
            return self.oracle(x[None], *rest)[0]
        kept, p = dropout or (None, 0.0)
        outputs, taps = weight.shape[0], weight.shape[2] if weight.ndim == 3 else 1
        weight = weight.reshape(outputs, -1, taps)
        batch, rows, _ = x.shape
        out = np.zeros((batch, rows, outputs))
        for b in range(batch):
            valid = rows if lengths is None or taps == 1 else lengths[b]
            for t in range(rows):
                for k in range(taps):
                    source = t + (k - (taps - 1 if causal else taps // 2)) * dilation
                    if not 0 <= source < valid:
                        continue
                    h = x[b, source]
                    if norm is not None:
                        mean = sum(h) / len(h)
                        variance = sum((v - mean) ** 2 for v in h) / len(h)
                        h = (h - mean) / math.sqrt(variance + 1e-5) * norm[0] + norm[1]
                    for o in range(outputs):
                        out[b, t, o] += np.dot(weight[o, :, k], h)
                for o in range(outputs):
                    y = ACTIVATIONS[activation](out[b, t, o] + (0 if bias is None else bias[o]))
                    if dropout is not None:
                        y *= kept[b, t, o] / (1 - p) if p < 1 else 0
                    out[b, t, o] = y + (0 if residual is None else residual[b, t, o])
        return out if dot is None else out @ dot

    def test_a_constant_row_has_no_variance(self, case, backend, device):
        """LayerNorm of it is the shift, and the gradients are finite."""
        x, weight = torch.full((1, 3, 8), 5.0, device=device), torch.eye(8, device=device)
        scale, shift = torch.ones(8, device=device), torch.arange(8.0, device=device)
        out, grads = self.run({"x": x, "weight": weight, "norm": (scale, shift)}, backend)
        torch.testing.assert_close(out, shift.expand_as(out))
        assert all(grad.isfinite().all() for grad in grads.values())

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_not_a_number_passes(self, case, backend, device, activation):
        """Every activation, and dropout of it: a training that has gone wrong must show."""
        x, weight = torch.ones(1, 2, 8, device=device), torch.eye(8, device=device)
        x[0, 0, 0] = float("nan")
        dropped = torch.zeros(1, 2, 8, device=device, dtype=torch.bool), 0.5
        for dropout in (None, dropped):
            out = self.call({"x": x, "weight": weight, "activation": activation, "dropout": dropout}, backend)
            assert out[0, 0].isnan().all() and out[0, 1].isfinite().all()

    def test_large_numbers_have_slopes(self, case, backend, device):
        """Of quick_gelu, although 1.702 y is more than float32 holds."""
        x, weight = torch.tensor([[[-3e38, 3e38]]], device=device), torch.eye(2, device=device)
        arguments = {"x": x, "weight": weight, "activation": "quick_gelu"}
        out, grads = self.run(arguments, backend, torch.full_like(x, 0.5))
        torch.testing.assert_close(out, x.clamp(min=0))
        torch.testing.assert_close(grads["x"], torch.tensor([[[0, 0.5]]], device=device))

    def test_a_causal_convolution_sees_no_future(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        if arguments["weight"].ndim == 2:
            pytest.skip("no convolution")
        arguments |= {"norm": None, "lengths": None, "residual": None}
        out = self.call(arguments, backend)
        arguments["x"] = arguments["x"].clone()
        arguments["x"][:, 9:] = 100.0
        torch.testing.assert_close(self.call(arguments, backend)[:, :9], out[:, :9])

    @pytest.mark.parametrize("taps", [1, 2, 3, 5])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation_with_all_taps(self, case, backend, device, activation, taps):
        if self.make(case, backend, device=device)["weight"].ndim == 2:
            pytest.skip("no convolution")
        draw = torch.Generator().manual_seed(taps)
        x = torch.randn(2, 7, 8, generator=draw).to(device)
        weight = (torch.randn(8, 8, taps, generator=draw) * (8 * taps) ** -0.5).to(device)
        bias = torch.randn(8, generator=draw).to(device)
        arguments = {"x": x, "weight": weight, "bias": bias, "activation": activation, "residual": x}
        for lengths, causal, dilation in ((None, False, 1), (None, True, 4), (torch.tensor([3, 7]), False, 2)):
            lengths = None if lengths is None else lengths.to(device)
            self.agree({**arguments, "lengths": lengths, "causal": causal, "dilation": dilation}, backend)


_TENSORS = ("x", "weight", "bias")
_LAYER = (None, "none", None, None, 1, False, None)  # a linear layer's arguments after x and weight


class TestTiles:
    """What tiles of 16 by 32 and tasks of 256 by 512 could go wrong with, and the two precisions of tile units."""

    @on_both_units
    @pytest.mark.parametrize("large", LARGE["linear_act"], ids=lambda case: case.name)
    def test_at_real_sizes(self, large, backend):
        TestLinearAct().agree(large.make(torch.float32, "cpu", 0), backend)

    # Around the edges of a tile, of a block, of a slab, of a task.
    @on_both_units
    @settings(deadline=None, max_examples=60)
    @given(
        batch=st.integers(1, 3),
        rows=st.sampled_from([1, 2, 15, 16, 17, 31, 33, 130, 300]),
        inputs=st.sampled_from([1, 15, 16, 31, 33, 64, 127, 130, 257]),
        outputs=st.sampled_from([1, 16, 17, 33, 100, 513]),
        taps=st.sampled_from([None, 1, 2, 3, 5]),
        dilation=st.sampled_from([1, 4, 20]),
        causal=st.booleans(),
        ragged=st.booleans(),
        sparing=st.booleans(),
    )
    def test_any_shape(self, backend, batch, rows, inputs, outputs, taps, dilation, causal, ragged, sparing):
        draw = torch.Generator().manual_seed(rows)
        kernel = () if taps is None else (taps,)
        arguments = {
            "x": torch.randn(batch, rows, inputs, generator=draw),
            "weight": torch.randn(outputs, inputs, *kernel, generator=draw) * (inputs * (taps or 1)) ** -0.5,
            "bias": torch.randn(outputs, generator=draw),
            "dilation": dilation,
            "causal": causal,
        }
        if ragged and taps:
            arguments["lengths"] = torch.randint(1, rows + 1, (batch,), generator=draw)
        upstream = torch.randn(batch, rows, outputs, generator=draw)
        if sparing:
            arguments["needed"] = torch.randint(1, rows + 1, (batch,), generator=draw)
            upstream[torch.arange(rows) >= arguments["needed"][:, None]] = 0
        exact = {key: value.double() if key in _TENSORS else value for key, value in arguments.items()}
        results = [self.results(arguments, upstream, backend), self.results(exact, upstream.double(), "reference")]
        if sparing:
            for out, *_ in results:
                out[torch.arange(rows) >= arguments["needed"][:, None]] = 0
        for got, oracle in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), oracle, rtol=1e-5, atol=2e-6 * oracle.abs().max().item())

    def results(self, arguments, upstream, backend):
        """The result and its gradients."""
        leaves = {key: arguments[key].clone().requires_grad_() for key in _TENSORS}
        out = ops.linear_act(**(arguments | leaves), backend=backend)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream)]

    @on_both_units
    def test_long_sums_stay_exact(self, backend):
        """The weight's gradient over 24,576 rows, all of one sign, where roundings do not cancel."""
        torch.manual_seed(0)
        x, g = torch.rand(24576, 64), torch.rand(24576, 48)
        grads = {}
        for name, kind in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
            weight = torch.zeros(48, 64, dtype=kind, requires_grad=True)
            ops.linear_act(x.to(kind), weight, backend=name).backward(g.to(kind))
            grads[name, kind] = weight.grad
        oracle = grads["reference", torch.float64]
        got, plain = ((grads[name, torch.float32] - oracle).abs().max() for name in (backend, "reference"))
        assert got <= 3 * plain + 2 * torch.finfo(torch.float32).eps * oracle.max()

    @on_both_units
    def test_a_dot_learns_alone_and_a_matrix_sees_no_lengths(self, backend):
        torch.manual_seed(0)
        x, weight, norm = torch.randn(2, 5, 8), torch.randn(6, 8), (torch.rand(8), torch.rand(8))
        grads = []
        for name in (backend, "reference"):
            dot = torch.ones(6, requires_grad=True)
            ops.linear_act(x, weight, activation="relu", dot=dot, backend=name).sum().backward()
            grads.append(dot.grad)
        torch.testing.assert_close(*grads)
        cut, whole = (
            ops.linear_act(x, weight, norm=norm, lengths=lengths, backend=backend)
            for lengths in (torch.tensor([2, 5]), None)
        )
        assert torch.equal(cut, whole)

    @on_both_units
    def test_a_dot_of_several_tasks_of_columns(self, backend):
        """Of videos that end early, with rows that see nothing of them, and with rows that nobody needs."""
        draw = Draw()
        layer = {"x": draw(2, 11, 8), "weight": draw(520, 8, 2), "bias": draw(520), "activation": "quick_gelu"}
        layer |= {"dilation": 4, "causal": True, "lengths": torch.tensor([2, 11]), "dot": draw(520, 2)[:, 0]}
        for needed in (None, torch.tensor([9, 3])):
            TestLinearAct().agree({**layer, "needed": needed}, backend)
        layer["weight"][-1, 0, 0] = float("nan")  # it reaches what is made of no rows too
        assert TestLinearAct().call({**layer, "dot": None}, backend)[..., -1].isnan().all()

    @ON_TILES
    def test_high_precision_keeps_16_bits(self):
        torch.manual_seed(0)
        x, weight = torch.randn(300, 512), torch.randn(512, 512) * 512**-0.5
        oracle, errors = x.double() @ weight.double().T, {}
        try:
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                errors[precision] = (ops.linear_act(x, weight, backend="amx") - oracle).abs().max().item()
        finally:
            torch.set_float32_matmul_precision("highest")
        # What is left out of a product is at most 3 * 2^-18 of it, and 512 of those add up at random.
        assert errors["highest"] < 2e-6 < 1e-5 < errors["high"] < 3 * 2**-18 * 4

    @on_both_units
    @pytest.mark.parametrize("part", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul], ids=["gpu", "cpu"])
    def test_precision_may_be_set_by_either_api_of_torch(self, backend, part):
        """Once fp32_precision has been set, the older one's getter raises."""
        x, weight = torch.ones(5, 16), torch.ones(8, 16)
        before, part.fp32_precision = part.fp32_precision, "tf32"
        try:
            assert torch.equal(ops.linear_act(x, weight, backend=backend), torch.full((5, 8), 16.0))
        finally:
            part.fp32_precision = before

    @on_both_units
    def test_is_chosen_where_it_is_faster(self, backend):
        for rows, width, chosen in ((512, 256, True), (511, 256, False), (512, 255, False)):
            layer = (torch.zeros(rows, 256), torch.zeros(width, 256), *_LAYER)
            assert _dispatch.why_not("linear_act", backend, *layer) is None  # it serves whoever asks for it
            assert (_dispatch.why_not_chosen("linear_act", backend, *layer) is None) == chosen

    @pytest.mark.skipif(not HAS_ONEDNN, reason="this torch comes without oneDNN")
    def test_onednn_is_chosen_where_it_is_faster_and_serves_no_inputs(self):
        for outputs, inputs, chosen in ((512, 512, True), (511, 2048, False), (2048, 511, False)):
            layer = (torch.zeros(4, inputs), torch.zeros(outputs, inputs), *_LAYER)
            assert _dispatch.why_not("linear_act", "onednn", *layer) is None
            assert (_dispatch.why_not_chosen("linear_act", "onednn", *layer) is None) == chosen
        nothing = torch.ones(3, 0), torch.ones(4, 0), torch.ones(4)  # which it does not multiply itself
        assert torch.equal(ops.linear_act(*nothing, backend="onednn"), torch.ones(3, 4))

    def test_triton_leaves_no_inputs_to_the_others(self):
        nothing = torch.ones(3, 0), torch.ones(4, 0), torch.ones(4)
        assert "no inputs" in _dispatch.why_not("linear_act", "triton", *nothing, *_LAYER[1:])
        assert torch.equal(ops.linear_act(*nothing), torch.ones(3, 4))

    @on_both_units
    def test_serves_float32_alone(self, backend):
        layer = (torch.zeros(1024, 256), torch.zeros(256, 256), *_LAYER)
        double = (layer[0].double(), layer[1].double(), *_LAYER)
        assert "float32" in _dispatch.why_not("linear_act", backend, *double)
        with torch.autocast("cpu", torch.bfloat16):
            assert "float32" in _dispatch.why_not("linear_act", backend, *layer)


class TestExactFloat32:
    """On a GPU, it is multiplied faster by cuBLAS: Triton leaves it to the reference, and nothing else."""

    @pytest.fixture(autouse=True)
    def settings(self, monkeypatch):
        monkeypatch.setattr(_triton, "INTERPRETED", False)
        cudnn = torch.backends.cudnn
        before = torch.get_float32_matmul_precision()
        convolutions = cudnn.conv.fp32_precision == "tf32"  # reading allow_tf32 raises if both APIs were used
        yield
        torch.set_float32_matmul_precision(before)
        cudnn.allow_tf32 = convolutions

    @staticmethod
    def declined(op: str, dtype: torch.dtype, taps: bool = False) -> bool:
        row = _dispatch.TABLE[op]["triton"]
        if op == "linear_act":
            weight = torch.zeros(8, 8, 3, dtype=dtype) if taps else torch.zeros(8, 8, dtype=dtype)
            return row.declines(torch.zeros(1, 4, 8, dtype=dtype), weight, *_LAYER) is not None
        (case,) = (case for case in CASES[op] if case.name == "seven")
        given = case.make(dtype, "cpu", 0)
        needed = given.pop("needed")
        return row.declines(*given.values(), needed=needed) is not None

    @pytest.mark.parametrize("op", ["linear_act", "gated_fusion"])
    def test_alone_is_declined(self, op):
        assert self.declined(op, torch.float32)
        assert not self.declined(op, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert not self.declined(op, torch.float32)
        torch.set_float32_matmul_precision("high")
        assert not self.declined(op, torch.float32)

    def test_a_convolution_is_not_left_to_one_in_tf32(self):
        """cuDNN's is by default, whatever is said of matrix products."""
        assert self.declined("linear_act", torch.float32, taps=True)
        torch.backends.cudnn.allow_tf32 = True
        assert not self.declined("linear_act", torch.float32, taps=True)
        assert self.declined("linear_act", torch.float32)

    def test_is_chosen_anew_in_compiled_code(self):
        def function(x):
            return x if _triton.declines_exact(x) is None else -x

        compiled, x = torch.compile(function, fullgraph=True, backend="eager"), torch.ones(2, 2)
        for precision, sign in (("highest", -1), ("high", 1), ("highest", -1)):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(compiled(x), sign * x)

    @ON_GPU[0]
    @ON_GPU[1]
    def test_is_served_by_the_reference(self):
        x, weight = torch.randn(2, 4, 8, device="cuda"), torch.randn(8, 8, device="cuda")
        with Recorder() as recorder:
            ops.linear_act(x, weight)
        assert not recorder.calls
        with Recorder() as recorder, torch.autocast("cuda", torch.bfloat16):
            ops.linear_act(x, weight)
        assert list(recorder.calls) == ["avadclip_fast.linear_act.default"]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.zeros(1, 4, 8)


def test_refuses_an_unknown_activation(x):
    with pytest.raises(ValueError, match="activation must be one of none, relu, gelu, quick_gelu; got 'swish'"):
        ops.linear_act(x, torch.zeros(8, 8), activation="swish")


def test_refuses_a_text_as_a_flag(x):
    with pytest.raises(ValueError, match="causal must be True or False, got 'no'"):
        ops.linear_act(x, torch.zeros(8, 8, 3), causal="no")


@pytest.mark.parametrize("shape", [(4, 0, 3), (0, 8, 3)])
def test_refuses_a_convolution_without_channels(shape):
    with pytest.raises(ValueError, match="a convolution's weight must not be empty"):
        ops.linear_act(torch.zeros(2, 5, shape[1]), torch.zeros(shape))


def test_refuses_a_convolution_of_rows(x):
    with pytest.raises(ValueError, match=r"convolution takes x of shape \[B, T, I\], got \[4, 8\]"):
        ops.linear_act(x[0], torch.zeros(8, 8, 3))


def test_refuses_a_residual_beside_dot(x):
    with pytest.raises(ValueError, match="residual and dropout must be None where dot is given"):
        ops.linear_act(x, torch.zeros(8, 8), residual=x, dot=torch.zeros(8))


def test_refuses_needed_lengths_that_do_not_fit(x):
    call = functools.partial(ops.linear_act, x, torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"needed lengths must lie in 1..4, got 5..5"):
        call(needed=torch.tensor([5]))
    with pytest.raises(ValueError, match=r"needed lengths must have shape \[1\], got \[2\]"):
        call(needed=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"needed goes with x of shape \[B, T, I\], got \[4, 8\]"):
        ops.linear_act(x[0], torch.zeros(8, 8), needed=torch.tensor([1, 1, 1, 1]))


def test_takes_any_leading_shape(x):
    weight, shape = torch.randn(3, 8), (1, 1, 2, 1, 2, 1, 1)
    torch.testing.assert_close(ops.linear_act(x.view(*shape, 8), weight), (x @ weight.T).view(*shape, 3))


def test_takes_numpys_share_of_dropout(x):
    kept = torch.ones(1, 4, 8, dtype=torch.bool)
    own, numpys = (ops.linear_act(x, torch.ones(8, 8), dropout=(kept, p)) for p in (0.5, np.float32(0.5)))
    assert torch.equal(own, numpys)


def test_refuses_a_dropout_that_does_not_fit(x):
    kept, call = torch.ones(1, 4, 8, dtype=torch.bool), functools.partial(ops.linear_act, x, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="residual and dropout must be None where dot is given"):
        call(dot=torch.zeros(8), dropout=(kept, 0.1))
    with pytest.raises(ValueError, match=r"dropout must be \(kept, p\), or None, got 0.1"):
        call(dropout=0.1)
    with pytest.raises(ValueError, match="kept of dropout must be a bool tensor, got torch.float32"):
        call(dropout=(kept.float(), 0.1))
    with pytest.raises(ValueError, match=r"kept of dropout must have shape \[1, 4, 8\], got \[1, 4, 7\]"):
        call(dropout=(kept[..., 1:], 0.1))
    with pytest.raises(ValueError, match="kept of dropout is on meta, but x is on cpu"):
        call(dropout=(kept.to("meta"), 0.1))
    with pytest.raises(ValueError, match=r"p of dropout must lie in 0..1, got 1.5"):
        call(dropout=(kept, 1.5))
