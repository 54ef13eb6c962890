"""uniform_pool: every backend against the reference, the reference against loops."""

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import ops


class TestUniformPool(OpTests):
    op = "uniform_pool"
    ragged = "longer"
    packed = True
    free = {("features", 0), ("features", 1)}

    def oracle(self, features, lengths, rows):
        out, first = np.zeros((len(lengths), rows, features.shape[1])), 0
        for b, n in enumerate(lengths):
            bounds = [int(x) for x in np.linspace(0, n, rows + 1)]
            for r in range(rows):
                begin, end = first + bounds[r], first + max(bounds[r + 1], bounds[r] + 1)
                out[b, r] = sum(features[begin:end]) / (end - begin)
            first += n
        return out

    def test_a_video_of_that_length_stays_as_it_is(self, case, backend, device):
        features, lengths = torch.randn(23, 8).to(device), torch.tensor([16, 7], device=device)
        out = self.call({"features": features, "lengths": lengths, "rows": 16}, backend)
        assert torch.equal(out[0], features[:16])


def test_refuses_lengths_of_another_sum():
    with pytest.raises(ValueError, match="lengths must sum to the number of rows, 5, got 4"):
        ops.uniform_pool(torch.zeros(5, 2), torch.tensor([1, 3]), 4)
