"""gated_fusion: every backend against the reference, the reference against loops."""

import math

import numpy as np
from op_tests import OpTests


class TestGatedFusion(OpTests):
    op = "gated_fusion"
    ragged = "seven"
    lowered = True
    made_of = "linear_act"

    def oracle(
        self, visual, audio, gate_weight, gate_bias, hidden_weight, hidden_bias, residual_weight, residual_bias, needed
    ):
        out = np.zeros_like(visual)
        width = visual.shape[2]
        for b in range(len(visual)):
            for t in range(visual.shape[1]):
                z = [*visual[b, t], *audio[b, t]]
                hidden = [float(np.dot(hidden_weight[d], z)) + hidden_bias[d] for d in range(width)]
                hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden]
                for d in range(width):
                    gate = 1 / (1 + math.exp(-(float(np.dot(gate_weight[d], z)) + gate_bias[d])))
                    residual = float(np.dot(residual_weight[d], hidden)) + residual_bias[d]
                    out[b, t, d] = visual[b, t, d] + gate * residual
        return out
