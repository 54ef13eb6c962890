"""Runs every kernel of one backend once a dtype, forward and backward, on all cases: what a sanitizer watches.

python tests/touch_kernels.py [cuda|triton|cpp] [1/2: the first half of the ops]
"""

import sys

import torch
from cases import CASES, FIXED, LARGE, convert, leaves

from avadclip_fast import BackendError, ops
from avadclip_fast.ops import _dispatch

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


def main(backend: str = "cuda", part: str = "1/1") -> None:
    device = "cpu" if backend == "cpp" else "cuda"
    untouched = []
    first, step = map(int, part.split("/"))
    for op in [op for op, row in _dispatch.TABLE.items() if backend in row][first - 1 :: step]:
        counts = {str(dtype).removeprefix("torch."): touch(op, backend, dtype, device) for dtype in DTYPES}
        print(op, *(f"{count} in {dtype}" for dtype, count in counts.items()), sep="  ", flush=True)
        if not any(counts.values()):
            untouched.append(op)
    if device == "cuda":
        torch.cuda.synchronize()
    sys.exit(f"{backend} served no call of {', '.join(untouched)}" if untouched else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
