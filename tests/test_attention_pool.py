"""attention_pool: every backend against the reference, the reference against loops, videos without direction."""

import numpy as np
import torch
from op_tests import OpTests


class TestAttentionPool(OpTests):
    op = "attention_pool"
    free = {("features", 2)}
    # A video of zeros has no direction: the gradient of x / max(|x|, 1e-12) is 1e12 there, out of differences' reach.
    kinked = ("zero-video",)

    def oracle(self, features, logits, lengths):
        batch, rows, width = features.shape
        out = np.zeros((batch, width))
        for b in range(batch):
            for t in range(rows if lengths is None else lengths[b]):
                for d in range(width):
                    out[b, d] += logits[b, t] * features[b, t, d]
            out[b] /= max(sum(x * x for x in out[b]) ** 0.5, 1e-12)
        return out

    def test_what_is_shorter_than_any_direction_is_only_scaled(self, case, backend, device):
        """Below 1e-12 the result is the sum over 1e-12, and its gradient has nothing taken out."""
        features = torch.full((1, 1, 4), 2e-13, device=device)
        out, grads = self.run({"features": features, "logits": torch.ones(1, 1, device=device)}, backend,
                              torch.ones(1, 4, device=device))  # fmt: skip
        torch.testing.assert_close(out.cpu(), torch.full((1, 4), 0.2))
        torch.testing.assert_close(grads["features"].cpu(), torch.full((1, 1, 4), 1e12))

    def test_a_sum_beyond_float16_has_its_direction(self, case, backend, device):
        features = torch.full((1, 2, 4), 300.0, device=device, dtype=torch.float16)
        arguments = {"features": features, "logits": features[..., 0]}
        out, grads = self.run(arguments, backend)
        torch.testing.assert_close(out.cpu(), torch.full((1, 4), 0.5, dtype=torch.float16))
        assert grads["features"].isfinite().all()

    def test_zero_features_are_finite(self, case, backend, device):
        features, logits = torch.zeros(2, 5, 8, device=device), torch.ones(2, 5, device=device)
        out, grads = self.run({"features": features, "logits": logits}, backend)
        assert (out == 0).all()
        assert all(grad.isfinite().all() for grad in grads.values())
