"""Runs every kernel of one backend once a dtype, forward and backward, on all cases: what a sanitizer watches.

python tests/touch_kernels.py [cuda|triton|cpp] [1/2: the first half of the ops]
"""

import sys
from collections.abc import Callable

import torch
from cases import CASES, FIXED, LARGE, convert, leaves
from torch import Tensor, nn

from avadclip_fast import BackendError, WindowAttention, ops, use_backend
from avadclip_fast.modules import MLP
from avadclip_fast.modules.linear_act import binary_head
from avadclip_fast.ops import _dispatch

WIDTH = 48
# Operators of whole layers, which Triton has where gradients are wanted: no op calls them.
LAYERS: dict[str, Callable[[nn.ModuleDict, Tensor], Tensor]] = {
    "residual_attention": lambda own, x: own["attention"](x, residual=x, norm=own["norm"]),
    "residual_mlp": lambda own, x: own["mlp"](x, residual=x, norm=own["norm"]),
    "binary_head": lambda own, x: binary_head(x, own["mlp"], own["classifier"]),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def touch(op: str, backend: str, dtype: torch.dtype, device: str) -> int:
    """Calls of one op; those that are for another backend do not count."""
    done = 0
    for case in CASES[op] + LARGE[op]:
        arguments = convert(
            case.make(dtype, device, 0), lambda name, x: x.detach().requires_grad_(name not in FIXED.get(op, ()))
        )
        try:
            out = getattr(ops, op)(**arguments, backend=backend)
        except BackendError:
            continue
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            wanted = [x for _, x in leaves(arguments) if x.requires_grad]
            torch.autograd.grad(out.sum(), wanted, allow_unused=True)
        done += 1
    return done


def touch_layer(name: str, backend: str, dtype: torch.dtype, device: str) -> int:
    parts = {"attention": WindowAttention(WIDTH, 5), "mlp": MLP(WIDTH), "norm": nn.LayerNorm(WIDTH)}
    own = nn.ModuleDict(parts | {"classifier": nn.Linear(WIDTH, 1)}).to(device, dtype)
    x = torch.randn(3, 37, WIDTH, device=device, dtype=dtype, requires_grad=True)
    with use_backend(backend):
        LAYERS[name](own, x).sum().backward()
    return 1


def main(backend: str = "cuda", part: str = "1/1") -> None:
    device = "cpu" if backend == "cpp" else "cuda"
    untouched = []
    first, step = map(int, part.split("/"))
    names = [op for op, row in _dispatch.TABLE.items() if backend in row]
    names += LAYERS if backend == "triton" else ()
    for op in names[first - 1 :: step]:
        run = touch_layer if op in LAYERS else touch
        counts = {str(dtype).removeprefix("torch."): run(op, backend, dtype, device) for dtype in DTYPES}
        print(op, *(f"{count} in {dtype}" for dtype, count in counts.items()), sep="  ", flush=True)
        if not any(counts.values()):
            untouched.append(op)
    if device == "cuda":
        torch.cuda.synchronize()
    sys.exit(f"{backend} served no call of {', '.join(untouched)}" if untouched else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
