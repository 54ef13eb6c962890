"""distance_graph: every backend against the reference, the reference against loops."""

import math

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import ops


class TestDistanceGraph(OpTests):
    op = "distance_graph"
    per_row = True
    free = {("values", 1), ("values", 2)}

    def oracle(self, values, scale, lengths):
        out = np.zeros_like(values)
        for b in range(len(values)):
            n = values.shape[1] if lengths is None else lengths[b]
            for i in range(n):
                for j in range(n):
                    out[b, i] += math.exp(-abs(i - j) / scale) * values[b, j]
        return out

    def test_padded_rows_are_zero(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        out = self.call(arguments, backend)
        for b, n in enumerate(arguments["lengths"]):
            assert (out[b, n:] == 0).all() and (out[b, :n] != 0).any()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match=f"scale must be a number above zero, got {scale}"):
        ops.distance_graph(torch.zeros(1, 2, 1), scale)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("scale", [0.5, math.e, 3.9, 40.0])
def test_long_videos_across_chunks(backend, scale):
    """Rows of 1e30 beyond what their weight lets reach a row must not be felt, and within must."""
    n, scale64 = 1500, torch.tensor(scale, dtype=torch.float64)
    values = torch.randn(1, n, 70, generator=torch.Generator().manual_seed(0))
    values[0, 900:, 3] *= 1e30
    at = torch.arange(n, dtype=torch.float64)
    # in float32 a weight below its least number is 0, and so is it here
    weights = torch.exp(-(at[:, None] - at).abs() / scale64)
    weights[weights < torch.finfo(torch.float32).smallest_normal * 2**-23] = 0
    expected = weights @ values[0].double()
    got = ops.distance_graph(values, scale, backend=backend)[0].double()
    bound = 1e-5 * (weights @ values[0].double().abs()) + 1e-30
    assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_every_row(backend, bad):
    values = torch.randn(1, 1100, 70)
    values[0, 1050, 65] = bad
    out = ops.distance_graph(values, backend=backend)
    assert not out[0, :, 65].isfinite().any() and out[0, :, :65].isfinite().all()
