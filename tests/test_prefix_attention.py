"""prefix_attention: every backend against the reference, the reference against loops and whole sequences."""

import math

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import ops


class TestPrefixAttention(OpTests):
    op = "prefix_attention"
    ragged = "text"
    per_row = True

    def oracle(self, qkv, prefix, rows, heads):
        total, width = qkv.shape[0], qkv.shape[1] // 3
        size = width // heads
        out = np.zeros((total, width))
        for i in range(total):
            start = prefix + (i - prefix) // rows * rows if i >= prefix else prefix
            keys = [j for j in range(i + 1) if j < prefix or j >= start]
            for h in range(heads):
                q, k, v = (qkv[:, n * width + h * size : n * width + (h + 1) * size] for n in range(3))
                e = [math.exp(np.dot(q[i], k[j]) / math.sqrt(size)) for j in keys]
                out[i, h * size : (h + 1) * size] = sum(w * v[j] for w, j in zip(e, keys, strict=True)) / sum(e)
        return out

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16])
    def test_large_scores_are_finite(self, case, backend, device, kind):
        """Scores of 1e5: a softmax without its maximum would overflow, and float16 does not hold them."""
        arguments = self.make(case, backend, kind, device)
        out, grads = self.run(arguments | {"qkv": arguments["qkv"] * 400}, backend)
        assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())

    def test_sequences_do_not_touch(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        out, prefix, rows = self.call(arguments, backend), arguments["prefix"], arguments["rows"]
        changed = arguments["qkv"].clone()
        changed[prefix + rows : prefix + 2 * rows] += torch.randn(changed.shape[1], device=device)  # the second
        other = self.call(arguments | {"qkv": changed}, backend)
        same = torch.ones(len(out), dtype=torch.bool)
        same[prefix + rows : prefix + 2 * rows] = False
        assert torch.equal(other[same], out[same])
        assert (other[~same] != out[~same]).any(-1).all()

    def test_equals_whole_sequences(self, case, backend, device):
        """Torch's causal attention over the prefix and each sequence in turn."""
        arguments = self.make(case, backend, device=device)
        qkv, prefix, rows, heads = arguments.values()
        out = self.call(arguments, backend)
        for start in range(prefix, len(qkv), rows):
            whole = torch.cat([qkv[:prefix], qkv[start : start + rows]])
            q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in whole.chunk(3, dim=1))
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            expected = expected.transpose(0, 1).flatten(1)
            torch.testing.assert_close(out[:prefix], expected[:prefix], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out[start : start + rows], expected[prefix:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"prefix": 3, "rows": 2, "heads": 3}, "heads=3 must divide the width 8"),
        ({"prefix": 3, "rows": 3}, r"qkv must have shape \[3 \+ C·3, 3W\], got \[7, 24\]"),
        ({"prefix": 8, "rows": 1}, r"qkv must have shape \[8 \+ C·1, 3W\], got \[7, 24\]"),
        ({"prefix": 0, "rows": 1}, "prefix must be a whole number above zero, got 0"),
    ],
)
def test_refuses_numbers_that_do_not_fit(numbers, message):
    with pytest.raises(ValueError, match=message):
        ops.prefix_attention(torch.zeros(7, 24), **numbers)
    with pytest.raises(ValueError, match="heads=1 must divide the width 0, which must be above zero"):
        ops.prefix_attention(torch.zeros(7, 0), prefix=3, rows=2)
