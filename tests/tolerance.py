"""The tolerance rule: how far a backend may be from the truth.

The oracle is the reference in float64 on the inputs as rounded to the backend's dtype. A backend may err twice as much
as the reference in that same dtype (another order of summation is no defect), and two roundings of the largest
number on top, where the reference happens to be exact; thrice for gradients that are sums over many rows.
Values that are not finite must be the same.
"""

import torch
from torch import Tensor

FACTOR, REDUCED_FACTOR, ROUNDINGS = 2.0, 3.0, 2.0


def error(got: Tensor, oracle: Tensor) -> float:
    """The largest distance between the finite values of both."""
    finite = oracle.isfinite() & got.isfinite()
    difference = (got.double() - oracle)[finite].abs()
    return difference.max().item() if difference.numel() else 0.0


def assert_within_rule(what: str, got: Tensor, reference: Tensor, oracle: Tensor, reduced: bool = False) -> None:
    """err(got) <= 2·err(reference) + 2·eps·max|oracle|, eps of got's dtype; reduced: 3 in place of the first 2.

    got: the backend's; reference: the reference's in the same dtype; oracle: the reference's in float64.
    """
    assert got.dtype == reference.dtype, f"{what}: dtype {got.dtype}, the reference gives {reference.dtype}"
    assert got.shape == oracle.shape, f"{what}: shape {list(got.shape)}, the reference gives {list(oracle.shape)}"
    assert oracle.dtype == torch.float64, f"{what}: the oracle must be float64"
    odd = ~oracle.isfinite() & ~reference.isfinite()  # where only the small dtype overflows, either may come
    assert (got.isfinite() == reference.isfinite())[oracle.isfinite()].all(), f"{what}: other values are not finite"
    torch.testing.assert_close(
        got[odd].double(), oracle[odd], equal_nan=True, rtol=0, atol=0, msg=lambda m: f"{what}: {m}"
    )
    largest = oracle[oracle.isfinite()].abs().max().item() if oracle.isfinite().any() else 0.0
    factor = REDUCED_FACTOR if reduced else FACTOR
    allowed = factor * error(reference, oracle) + ROUNDINGS * torch.finfo(got.dtype).eps * largest
    wrong = error(got, oracle)
    assert wrong <= allowed, (
        f"{what}: error {wrong:.3g}, allowed {allowed:.3g} = {factor}·{error(reference, oracle):.3g} (reference) "
        f"+ {ROUNDINGS}·eps·{largest:.3g}"
    )
