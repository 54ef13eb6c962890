"""linear_act: every backend against the reference, the reference against loops, every combination it offers."""

import math

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import ops

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


class TestLinearAct(OpTests):
    op = "linear_act"
    ragged = "everything"
    per_row = True
    free = {("weight", 2)}

    def oracle(self, x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot):
        if x.ndim == 2:
            return self.oracle(x[None], weight, bias, activation, residual, norm, dilation, causal, lengths, dot)[0]
        outputs, taps = weight.shape[0], weight.shape[2] if weight.ndim == 3 else 1
        weight = weight.reshape(outputs, -1, taps)
        batch, rows, _ = x.shape
        out = np.zeros((batch, rows, outputs))
        for b in range(batch):
            valid = rows if lengths is None or taps == 1 else lengths[b]
            for t in range(rows):
                for k in range(taps):
                    source = t + (k - (taps - 1 if causal else taps // 2)) * dilation
                    if not 0 <= source < valid:
                        continue
                    h = x[b, source]
                    if norm is not None:
                        mean = sum(h) / len(h)
                        variance = sum((v - mean) ** 2 for v in h) / len(h)
                        h = (h - mean) / math.sqrt(variance + 1e-5) * norm[0] + norm[1]
                    for o in range(outputs):
                        out[b, t, o] += np.dot(weight[o, :, k], h)
                for o in range(outputs):
                    y = ACTIVATIONS[activation](out[b, t, o] + (0 if bias is None else bias[o]))
                    out[b, t, o] = y + (0 if residual is None else residual[b, t, o])
        return out if dot is None else out @ dot

    def test_a_constant_row_has_no_variance(self, case, backend, device):
        """LayerNorm of it is the shift, and the gradients are finite."""
        x, weight = torch.full((1, 3, 8), 5.0, device=device), torch.eye(8, device=device)
        scale, shift = torch.ones(8, device=device), torch.arange(8.0, device=device)
        out, grads = self.run({"x": x, "weight": weight, "norm": (scale, shift)}, backend)
        torch.testing.assert_close(out, shift.expand_as(out))
        assert all(grad.isfinite().all() for grad in grads.values())

    def test_a_causal_convolution_sees_no_future(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        arguments |= {"norm": None, "lengths": None, "residual": None}
        out = self.call(arguments, backend)
        arguments["x"] = arguments["x"].clone()
        arguments["x"][:, 9:] = 100.0
        torch.testing.assert_close(self.call(arguments, backend)[:, :9], out[:, :9])

    @pytest.mark.parametrize("taps", [1, 2, 3, 5])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation_with_all_taps(self, case, backend, device, activation, taps):
        draw = torch.Generator().manual_seed(taps)
        x = torch.randn(2, 7, 8, generator=draw).to(device)
        weight = (torch.randn(8, 8, taps, generator=draw) * (8 * taps) ** -0.5).to(device)
        bias = torch.randn(8, generator=draw).to(device)
        arguments = {"x": x, "weight": weight, "bias": bias, "activation": activation, "residual": x}
        for lengths, causal, dilation in ((None, False, 1), (None, True, 4), (torch.tensor([3, 7]), False, 2)):
            lengths = None if lengths is None else lengths.to(device)
            self.agree({**arguments, "lengths": lengths, "causal": causal, "dilation": dilation}, backend)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.zeros(1, 4, 8)


def test_refuses_an_unknown_activation(x):
    with pytest.raises(ValueError, match="activation must be one of none, relu, gelu, quick_gelu; got 'swish'"):
        ops.linear_act(x, torch.zeros(8, 8), activation="swish")


def test_refuses_a_convolution_of_rows(x):
    with pytest.raises(ValueError, match=r"convolution takes x of shape \[B, T, I\], got \[4, 8\]"):
        ops.linear_act(x[0], torch.zeros(8, 8, 3))


def test_refuses_a_residual_beside_dot(x):
    with pytest.raises(ValueError, match="residual must be None where dot is given"):
        ops.linear_act(x, torch.zeros(8, 8), residual=x, dot=torch.zeros(8))
