"""window_attention: every backend against the reference, the reference against loops, windows of any size."""

import math
import sys

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import WindowAttention, ops


class TestWindowAttention(OpTests):
    op = "window_attention"
    per_row = True
    spreads = ("v",)  # 0 · NaN within a tile of several windows

    def oracle(self, q, k, v, window, heads, lengths, residual):
        batch, rows, width = q.shape
        size = width // heads
        out = np.zeros((batch, rows, width)) if residual is None else residual.copy()
        for b in range(batch):
            n = rows if lengths is None else lengths[b]
            for i in range(n):
                keys = [j for j in range(n) if j // window == i // window]
                for h in range(heads):
                    part = slice(h * size, (h + 1) * size)
                    e = [math.exp(np.dot(q[b, i, part], k[b, j, part]) / math.sqrt(size)) for j in keys]
                    out[b, i, part] += sum(w * v[b, j, part] for w, j in zip(e, keys, strict=True)) / sum(e)
        return out

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16])
    def test_large_scores_are_finite(self, case, backend, device, kind):
        """Scores of 1e4, of products float16 does not hold: a softmax without its running maximum would overflow."""
        arguments = self.make(case, backend, kind, device)
        out, grads = self.run(arguments | {name: arguments[name] * 100 for name in "qk"}, backend)
        assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())

    def test_padded_rows_are_those_of_the_residual(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        assert arguments["residual"] is not None
        out = self.call(arguments, backend) - arguments["residual"]
        for b, n in enumerate(arguments["lengths"]):
            assert (out[b, n:] == 0).all() and (out[b, :n] != 0).any()

    def test_windows_do_not_touch(self, case, backend, device):
        arguments = self.make(case, backend, device=device) | {"lengths": None}
        out = self.call(arguments, backend)
        changed = {name: arguments[name].clone() for name in "qkv"}
        for x in changed.values():
            x[:, 8:12] += 1  # the third window of four rows
        other = self.call(arguments | changed, backend)
        same = torch.ones(out.shape[1], dtype=torch.bool)
        same[8:12] = False
        torch.testing.assert_close(other[:, same], out[:, same])
        assert (other[:, 8:12] != out[:, 8:12]).any(-1).all()


def test_a_window_of_more_than_all_rows_costs_no_more():
    """Memory for whole windows of so many rows is nowhere to be had."""
    q = torch.randn(1, 3, 8)
    assert torch.equal(ops.window_attention(q, q, q, window=sys.maxsize), ops.window_attention(q, q, q, window=3))


def test_compiled_code_takes_fewer_rows_than_the_window_that_it_saw_whole():
    """The number of rows is not taken for a constant where it is that of the window."""
    compiled = torch.compile(lambda q: ops.window_attention(q, q, q, window=8), fullgraph=True, backend="eager")
    for rows in (8, 5):
        q = torch.randn(2, rows, 4)
        torch._dynamo.mark_dynamic(q, 1)  # an error where it is a constant
        torch.testing.assert_close(compiled(q), ops.window_attention(q, q, q, window=8))


def test_refuses_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="heads=3 must divide the width 8"):
        ops.window_attention(*torch.zeros(3, 1, 4, 8), window=4, heads=3)


def test_module_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="window=4 and heads=3"):
        WindowAttention(8, window=4, heads=3)
