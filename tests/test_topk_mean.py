"""topk_mean: every backend against the reference, the reference against loops, ties and NaN."""

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import TopKMean


class TestTopKMean(OpTests):
    op = "topk_mean"
    free = {("scores", 1), ("scores", 2)}
    kinked = ("ties",)

    def oracle(self, scores, lengths, divisor):
        out = np.zeros((scores.shape[0], scores.shape[2]))
        for b, n in enumerate(lengths):
            for c in range(scores.shape[2]):
                best = sorted((float(scores[b, t, c]) for t in range(n)), reverse=True)[: n // divisor + 1]
                out[b, c] = sum(best) / len(best)
        return out

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_not_finite_shows(self, case, backend, device, value):
        scores = torch.zeros(1, 20, 2, device=device)
        scores[0, 3, 0] = value
        out = self.call({"scores": scores, "lengths": torch.tensor([20], device=device), "divisor": 16}, backend)
        expected = {"nan": float("nan"), "inf": float("inf"), "-inf": 0.0}[str(value)]  # -inf is never among the top
        torch.testing.assert_close(out.cpu(), torch.tensor([[expected, 0.0]]), equal_nan=True)

    def test_ties_go_to_the_lowest_row(self, case, backend, device):
        scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], device=device).reshape(1, 5, 1).requires_grad_()
        lengths = torch.tensor([5], device=device)
        out = self.call({"scores": scores, "lengths": lengths, "divisor": 4}, backend)  # k = 2
        (grad,) = torch.autograd.grad(out.sum(), scores)
        assert grad.flatten().tolist() == [0, 0.5, 0.5, 0, 0]


def test_lengths_are_needed():
    with pytest.raises(ValueError, match="lengths must be an int32 or int64 tensor, got NoneType"):
        TopKMean()(torch.zeros(1, 2, 1), None)
