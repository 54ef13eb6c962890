"""Runs every kernel of one backend once, forward and backward, on the small cases: what a sanitizer watches.

python tests/touch_kernels.py [cuda|triton|cpp]
"""

import sys

import torch
from cases import CASES, convert, leaves

from avadclip_fast import BackendError, ops
from avadclip_fast.ops import _dispatch


def main(backend: str = "cuda") -> None:
    device, done = "cpu" if backend == "cpp" else "cuda", 0
    for op in (op for op, row in _dispatch.TABLE.items() if backend in row):
        for case in CASES[op]:
            arguments = convert(case.make(torch.float32, device, 0), lambda _, x: x.detach().requires_grad_())
            try:
                out = getattr(ops, op)(**arguments, backend=backend)
            except BackendError:
                continue  # a case for another backend
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad:
                torch.autograd.grad(out.sum(), [x for _, x in leaves(arguments)], allow_unused=True)
            done += 1
    print(f"{done} calls by {backend}")
    sys.exit(0 if done else f"{backend} served nothing here")


if __name__ == "__main__":
    main(*sys.argv[1:])
