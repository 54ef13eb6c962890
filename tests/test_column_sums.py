"""Column sums by the Triton kernel, against float64."""

import pytest
import torch
from cases import same, time_last, wide
from fused import DEVICE


@DEVICE
@pytest.mark.parametrize("layout", [same, wide, time_last])
@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (1024, 33), (1025, 200), (1500, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_the_sum(device, dtype, shape, layout):
    from avadclip_fast.kernels.column_sums import column_sums

    x = layout(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype))
    exact = x.double().sum(0)
    got = column_sums(x, torch.float32)
    assert got.dtype == torch.float32 and (got - exact).abs().max() <= 1e-6 * x.double().abs().sum(0).max()
    half = column_sums(x, torch.float16)
    assert half.dtype == torch.float16 and (half - exact).abs().max() <= 2**-10 * max(1, exact.abs().max())
    assert torch.equal(column_sums(x, torch.float32), got)


@DEVICE
def test_nothing_adds_up_to_zero(device):
    from avadclip_fast.kernels.column_sums import column_sums

    for shape in ((0, 5), (5, 0)):
        got = column_sums(torch.ones(shape, device=device), torch.float32)
        assert got.shape == shape[1:] and not got.any()


@DEVICE
def test_a_nan_reaches_its_column_alone(device):
    from avadclip_fast.kernels.column_sums import column_sums

    x = torch.ones(1500, 40, device=device)
    x[1400, 3] = float("nan")
    assert column_sums(x, torch.float32).isnan().nonzero().tolist() == [[3]]
