"""uniform_pool: every backend against the reference, the reference against loops."""

import numpy as np
import pytest
import torch
from op_tests import OpTests
from tolerance import assert_within_rule

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

    @pytest.mark.parametrize("lengths, rows", [([20000, 30], 1), ([2, 1], 3000)], ids=["forward", "backward"])
    def test_long_sums_stay_exact(self, case, backend, device, lengths, rows):
        """Of numbers of one sign, where roundings do not cancel."""
        features = torch.rand(sum(lengths), 24, generator=torch.Generator().manual_seed(0)).to(device)
        given = {"features": features, "lengths": torch.tensor(lengths, device=device), "rows": rows}
        self.agree(given, backend)
        exact = {**given, "features": features.double()}
        upstream = torch.rand(len(lengths), rows, 24).to(device)
        calls = (given, backend), (given, "reference"), (exact, "reference")
        grads = [self.run(arguments, name, upstream)[1]["features"] for arguments, name in calls]
        assert_within_rule("gradient of features", *grads)


def test_refuses_lengths_of_another_sum():
    with pytest.raises(ValueError, match="lengths must sum to the number of rows, 5, got 4"):
        ops.uniform_pool(torch.zeros(5, 2), torch.tensor([1, 3]), 4)
