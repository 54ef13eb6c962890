"""prompt_similarity: every backend against the reference, the reference against loops, rows without direction."""

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast.ops import _dispatch


class TestPromptSimilarity(OpTests):
    op = "prompt_similarity"
    ragged = "seven"
    free = {("features", 1), ("prompts", 1)}

    def oracle(self, features, prompts, temperature):
        (batch, rows, _), classes = features.shape, prompts.shape[1]
        out = np.zeros((batch, rows, classes))
        for b in range(batch):
            for t in range(rows):
                for c in range(classes):
                    x, y = features[b, t], prompts[b, c]
                    norms = max(np.dot(x, x) ** 0.5, 1e-12) * max(np.dot(y, y) ** 0.5, 1e-12)
                    out[b, t, c] = np.dot(x, y) / (norms * temperature)
        return out

    def test_zero_rows_are_finite(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        arguments["features"][0, 3] = 0
        arguments["prompts"][1, 2] = 0
        out, grads = self.run(arguments, backend)
        assert (out[0, 3] == 0).all() and (out[1, :, 2] == 0).all()
        assert all(grad.isfinite().all() for grad in grads.values())

    def test_what_is_shorter_than_any_direction_is_only_scaled(self, case, backend, device):
        """Below 1e-12 the result is the product over 1e-12, and its gradients have nothing taken out."""
        short, unit = torch.full((1, 1, 4), 2e-13, device=device), torch.eye(4, device=device)[None, :1]
        for given in ({"features": short, "prompts": unit}, {"features": unit, "prompts": short}):
            out, grads = self.run(given | {"temperature": 1.0}, backend, torch.ones(1, 1, 1, device=device))
            assert out.item() == pytest.approx(0.2)
            (grad,) = (grads[name] for name in given if given[name] is short)
            torch.testing.assert_close(grad, unit * 1e12)

    @pytest.mark.parametrize("kind, size", [(torch.float32, 1e-6), (torch.float32, 1e6), (torch.float16, 2**13)])
    def test_size_does_not_matter(self, case, backend, device, kind, size):
        arguments = self.make(case, backend, kind, device)
        out = self.call(arguments, backend)
        scaled = self.call({**arguments, "features": arguments["features"] * size}, backend)
        torch.testing.assert_close(scaled, out, rtol=1e-5, atol=1e-5)


def test_triton_says_how_many_classes_it_takes():
    features, prompts = (torch.empty(1, rows, 8) for rows in (3, 65))
    reason = _dispatch.why_not("prompt_similarity", "triton", features, prompts, 0.07)
    assert reason == "it takes up to 64 classes, not 65"
    assert "classes" not in (_dispatch.why_not("prompt_similarity", "triton", features, prompts[:, 1:], 0.07) or "")
