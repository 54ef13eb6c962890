"""add_act: every backend against the reference, the reference against loops, the kink of ReLU."""

import numpy as np
import pytest
import torch
from op_tests import OpTests
from test_linear_act import ACTIVATIONS

from avadclip_fast import ops


class TestAddAct(OpTests):
    op = "add_act"
    ragged = "quick-gelu"

    def oracle(self, x, residual, activation):
        out = np.zeros_like(x)
        for at in np.ndindex(*x.shape):
            out[at] = ACTIVATIONS[activation](x[at] + residual[at])
        return out

    def test_relu_passes_no_gradient_at_zero(self, case, backend, device):
        x = torch.tensor([[[-1.0, 0.0, 2.0]]], device=device)
        out, grads = self.run({"x": x, "residual": -x / 2 * (x < 2), "activation": "relu"}, backend, torch.ones_like(x))
        assert out.tolist() == [[[0, 0, 2]]]
        assert grads["x"].tolist() == grads["residual"].tolist() == [[[0, 0, 1]]]

    @pytest.mark.parametrize("half", ["x", "residual"])
    def test_the_sum_of_two_dtypes_has_the_wider(self, case, backend, device, half):
        """Under autocast, where a product is half precision and its residual is not."""
        arguments = self.make(case, backend, device=device)
        mixed = arguments | {half: arguments[half].half()}
        with torch.autocast(device, torch.float16):
            out, grads = self.run(mixed, backend)
        expected, _ = self.run(arguments | {half: mixed[half].float()}, "reference")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert {name: grad.dtype for name, grad in grads.items()} == {name: mixed[name].dtype for name in grads}

    def test_large_sums_stay_finite(self, case, backend, device):
        x = torch.tensor([[[-300.0, 300.0]]], device=device)
        out, grads = self.run({"x": x, "residual": x, "activation": "quick_gelu"}, backend, torch.ones_like(x))
        assert out.flatten().tolist() == [0, 600] and grads["x"].flatten().tolist() == [0, 1]


def test_refuses_unknown_activations():
    with pytest.raises(ValueError, match="add_act: activation must be one of none, relu, gelu, quick_gelu; got 'tanh'"):
        ops.add_act(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), "tanh")
