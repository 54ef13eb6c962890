"""similarity_graph: every backend against the reference, the reference against loops, the threshold, the second use."""

import math

import numpy as np
import pytest
import torch
from cases import CASES, Draw
from op_tests import INTERPRETED, OpTests, draw_like
from torch.nn import functional as F

from avadclip_fast import ops
from avadclip_fast.ops import _dispatch

# tf32 rounds inputs to 2^-11 = 5e-4: a cosine that is closer to the threshold may fall on either side.
DELTA = 1e-3


class TestSimilarityGraph(OpTests):
    op = "similarity_graph"
    per_row = True
    free = {("features", 2), ("values", 2)}

    def call(self, arguments, backend):
        """The graph used twice, as in the model: A · (A · values), the second time by the weights of the first."""
        once, weights = ops.similarity_graph(**arguments, backend=backend)
        values = arguments | {"values": once}
        twice, _ = ops.similarity_graph(**values, weights=weights, backend=backend)
        return torch.cat([once, twice], dim=-1)

    def unsure(self, arguments):
        x = F.normalize(arguments["features"], dim=-1)
        near = (x @ x.mT - arguments["threshold"]).abs() < DELTA
        rows = near.any(-1)  # [B, T]
        return rows if rows.any() else None

    def oracle(self, features, values, lengths, threshold):
        batch, rows, _ = features.shape
        once, twice = np.zeros_like(values), np.zeros_like(values)
        for b in range(batch):
            n = rows if lengths is None else lengths[b]
            x, weights = features[b], np.zeros((n, n))
            for i in range(n):
                for j in range(n):
                    s = np.dot(x[i], x[j]) / (math.sqrt(np.dot(x[i], x[i])) * math.sqrt(np.dot(x[j], x[j])) + 1e-20)
                    weights[i, j] = math.exp(s if s > threshold else 0)
                weights[i] /= sum(weights[i])
                once[b, i] = sum(weights[i, j] * values[b, j] for j in range(n))
            for i in range(n):
                twice[b, i] = sum(weights[i, j] * once[b, j] for j in range(n))
        return np.concatenate([once, twice], axis=-1)

    def test_padded_rows_are_zero(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing was written to is then NaN
        try:
            out, (_, weights) = self.call(arguments, backend), ops.similarity_graph(**arguments, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)
        for b, n in enumerate(arguments["lengths"]):
            assert (out[b, n:] == 0).all() and (out[b, :n] != 0).any()
            assert (weights[b, n:] == 0).all() and (weights[b, :, n:] == 0).all()
            torch.testing.assert_close(weights[b, :n].sum(-1).cpu(), torch.ones(n))
        padding = self.padding(arguments, "lengths")
        assert not weights[padding].any() and not weights.mT[padding].any()

    @pytest.mark.parametrize("kind, size", [(torch.float32, 1e-6), (torch.float32, 1e6), (torch.float16, 2**7)])
    def test_size_does_not_matter(self, case, backend, device, kind, size):
        """Nor does a product of two rows that float16 does not hold."""
        arguments = self.make(case, backend, kind, device)
        out = self.call(arguments, backend)
        scaled = self.call(arguments | {"features": arguments["features"] * size}, backend)
        assert self.unsure(arguments) is None
        torch.testing.assert_close(scaled, out, rtol=1e-5, atol=1e-5)

    def test_weights_take_an_upstream_of_any_layout(self, case, backend, device):
        arguments, grads = self.make(case, backend, device=device), []
        features = arguments.pop("features").requires_grad_()
        for name in (backend, "reference"):
            _, weights = ops.similarity_graph(features, **arguments, backend=name)
            grads += torch.autograd.grad(weights, features, draw_like(weights).mT)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    def test_foreign_weights_are_refused(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        _, weights = ops.similarity_graph(**arguments, backend=backend)
        for foreign, wrong in ((weights[:, :-1, :-1], "must be an earlier call's"), ("A", "must be a tensor")):
            with pytest.raises(ValueError, match=f"similarity_graph: weights {wrong}"):
                ops.similarity_graph(**arguments, weights=foreign, backend=backend)

    def test_zero_rows_are_finite(self, case, backend, device):
        """A row of zeros is like no other, itself included: equal weights."""
        arguments = self.make(case, backend, device=device)
        arguments["features"][1, 2] = 0
        out, grads = self.run(arguments, backend)
        n, width = arguments["lengths"][1], arguments["values"].shape[2]
        torch.testing.assert_close(out[1, 2, :width], arguments["values"][1, :n].mean(0), rtol=1e-5, atol=1e-6)
        assert all(grad.isfinite().all() for grad in grads.values())

    def test_an_edge_at_the_threshold_is_none(self, case, backend, device):
        """Only what exceeds it counts: of rows that are the same, whose cosine is 1, nothing does."""
        features = torch.eye(2, device=device)[[0, 0, 1]][None]
        out, _ = ops.similarity_graph(features, torch.eye(3, device=device)[None], threshold=1.0, backend=backend)
        torch.testing.assert_close(out.cpu(), torch.full((1, 3, 3), 1 / 3))

    def test_no_edge_is_above_one(self, case, backend, device):
        """A row's cosine with itself, which rounds to 1.0000001 or 0.9999999, by backend and machine."""
        x = torch.randn(1, 40, 16, device=device)
        _, weights = ops.similarity_graph(x, x, threshold=1.0, backend=backend)
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 40))

    def test_an_edge_below_the_threshold_has_weight_one(self, case, backend, device):
        """Two directions at right angles: like rows weigh e, unlike ones 1."""
        features = torch.eye(2, device=device).repeat_interleave(2, 0)[None]  # [1, 4, 2]
        out, _ = ops.similarity_graph(features, torch.eye(4, device=device)[None], backend=backend)
        expected = torch.tensor([[math.e, math.e, 1, 1], [math.e, math.e, 1, 1], [1, 1, math.e, math.e]]) / (
            2 * math.e + 2
        )
        torch.testing.assert_close(out[0, :3].cpu(), expected)

    def test_no_gradient_below_the_threshold_and_at_it(self, case, backend, device):
        features, values = torch.eye(4, device=device)[None], torch.randn(1, 4, 3).to(device)
        features = features + torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
        _, grads = self.run({"features": features, "values": values, "threshold": 0.99}, backend)
        # Only the diagonal is above it, and a cosine with oneself does not change.
        torch.testing.assert_close(grads["features"], torch.zeros_like(features), rtol=0, atol=1e-6)
        at_it = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]]], device=device)
        _, grads = self.run({"features": at_it, "values": values[:, :2], "threshold": 0.5}, backend)
        torch.testing.assert_close(grads["features"], torch.zeros_like(at_it), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [-1.5, 1.01, float("nan")])
def test_refuses_a_threshold_that_is_no_cosine(threshold):
    x = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"threshold is a cosine in \[-1, 1\], got"):
        ops.similarity_graph(x, x, threshold=threshold)


def test_kernels_leave_low_thresholds_and_other_weights_to_the_reference():
    x, lengths = torch.zeros(1, 4, 8), torch.tensor([4])

    def why_not(backend, threshold=0.7, weights=None):
        return _dispatch.why_not("similarity_graph", backend, x, x, lengths, threshold, weights) or ""

    for backend in ("triton", "cpp"):
        assert "float32, not torch.float64" in why_not(backend, weights=torch.zeros(1, 4, 4, dtype=torch.double))
    assert "it takes thresholds from 0.01, not 0.0099" in why_not("triton", 0.0099)
    assert "threshold" not in why_not("triton", 0.01)


def test_no_lengths_means_all_rows():
    x = torch.randn(2, 5, 4)
    full, _ = ops.similarity_graph(x, x, torch.tensor([5, 5]))
    assert torch.equal(ops.similarity_graph(x, x)[0], full)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", CASES["similarity_graph"], ids=lambda case: case.name)
def test_gradients_agree_where_products_truncate(case, monkeypatch):
    """Hopper's tf32 products drop the last 13 bits of float32, which the interpreter's keep."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    whole = InterpreterBuilder.create_dot

    def truncate(x):
        return TensorHandle((x.data.view(np.int32) & -0x2000).view(np.float32), x.dtype)

    def create_dot(self, a, b, d, input_precision, *rest):
        if input_precision.name == "TF32":
            a, b = truncate(a), truncate(b)
        return whole(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    test = TestSimilarityGraph()
    test.agree(test.make(case, "triton", torch.float16), "triton")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_a_long_video_takes_several_tiles():
    """Of rows, over 256, and of channels, over 128; the second video ends within the first tile."""
    draw = Draw(torch.float16)
    arguments = {"features": draw.clustered(2, 300, 144), "values": draw(2, 300, 8), "lengths": draw.ints([290, 100])}
    TestSimilarityGraph().agree(arguments | {"threshold": 0.7}, "triton")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_rounding_to_tf32_keeps_what_is_no_number():
    import triton
    import triton.language as tl
    from avadclip_fast.kernels.similarity_graph import to_tf32

    @triton.jit
    def round_kernel(x, out, to_tf32: tl.constexpr, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(out + at, to_tf32(tl.load(x + at)))

    bits = [0x3F800000, 0x3F800FFF, 0x3F801000, -0x40800000 + 0x1000, 0x7F800000, 0x7FFFFFFF, -1, 0]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = torch.empty_like(x)
    round_kernel[(1,)](x, out, to_tf32, len(bits))
    step = 2.0**-10
    expected = torch.tensor([1, 1, 1 + step, -1 - step, float("inf"), float("nan"), float("nan"), 0])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
