"""The algebra around linear_act: products of weights in place of products with the features, forward and backward.

Counted in FLOPs at M = B·T rows of width D, forward: binary head 8MD² in place of 16MD² (+ 8D²), k3-k1 6MD² + 6D³ in
place of 8MD²; gc1 with gc3 the same, their input read once. The backward pass has twice as many.
"""

import torch
from torch import Tensor, nn

from avadclip_fast import ops
from avadclip_fast.modules import MLP
from avadclip_fast.modules.linear_act import TemporalConv, binary_head
from avadclip_fast.modules.uncertainty_head import fold

from . import harness

B, T, D = 16, 256, 512


def run(rounds: int) -> list[dict]:
    torch.manual_seed(0)
    x = torch.randn(B, T, D, requires_grad=True)
    mlp, classifier = MLP(D), nn.Linear(D, 1)
    first, third = TemporalConv(D, D // 2, 5), TemporalConv(D, D // 2, 5)
    matrices = nn.ParameterList(torch.randn(D, D // 2) * D**-0.5 for _ in range(2))
    conv, after = TemporalConv(D, D, 3), TemporalConv(D, D, 1)

    def shared_convolution() -> Tensor:
        weight, bias = torch.cat([first.weight, third.weight]), torch.cat([first.bias, third.bias])
        return sum(ops.linear_act(x, weight, bias).chunk(2, dim=-1))

    cases = {  # name: (modules, ours, plain, our FLOPs forward)
        "binary head": (
            [mlp, classifier],
            lambda: binary_head(x, mlp, classifier),
            lambda: classifier(mlp(x, residual=x)).squeeze(-1),
            8 * B * T * D**2,
        ),
        "k3-k1": (
            [conv, after],
            lambda: ops.linear_act(x, *fold(conv, after)),
            lambda: after(conv(x)),
            6 * B * T * D**2 + 6 * D**3,
        ),
        "gc1 and gc3, convolution": (
            [first, third], shared_convolution, lambda: first(x) + third(x), 10 * B * T * D**2,
        ),
        "gc1 and gc3, xW": (
            [matrices],
            lambda: sum(ops.linear_act(x, torch.cat(list(matrices), dim=1).T).chunk(2, dim=-1)),
            lambda: ops.linear_act(x, matrices[0].T) + ops.linear_act(x, matrices[1].T),
            2 * B * T * D**2,
        ),
    }  # fmt: skip
    rows = []
    for name, (modules, ours, plain, flops) in cases.items():
        leaves = (x, *(p for module in modules for p in module.parameters()))
        calls = {
            "plain": harness.forward_backward(plain, (), leaves),
            "folded": harness.forward_backward(ours, (), leaves),
        }
        rows += harness.compare(f"f+b {name}", harness.measure(calls, rounds), "folded", flops=3 * flops)
    return rows


if __name__ == "__main__":
    harness.main("bench_linear_act", run)
