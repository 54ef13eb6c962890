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
