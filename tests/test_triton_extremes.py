"""Triton kernels on what is rare: huge strides, other default dtypes, no channels, NaN, expanded inputs."""

import subprocess
import sys

import pytest
import torch
from op_tests import ON_GPU

from avadclip_fast import ops
from avadclip_fast.ops._triton import INTERPRETED, _addressable

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_that_of_a_loss(dtype):
    teacher, student, theta = torch.randn(3, 4, 50, 600)
    lengths = torch.tensor([50, 40, 30, 20])
    expected = ops.distill_loss(teacher, student, theta, lengths, backend="reference")
    torch.set_default_dtype(dtype)
    try:
        found = ops.distill_loss(teacher, student, theta, lengths, backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "dtype, device",  # the interpreter cuts float32 off to bfloat16
    [pytest.param(torch.float32, "cpu", marks=interpreted), pytest.param(torch.bfloat16, "cuda", marks=ON_GPU)],
)
def test_the_scale_of_gradients_is_not_rounded(dtype, device):
    by = torch.randn(2, 5000, device=device).to(dtype)
    grad, terms = torch.tensor([1e-8, 12.583e6], device=device).unbind()
    found = torch.ops.avadclip_fast.distill_loss_backward(grad, by, -by, terms)
    expected = (by.double() * (grad / terms).double()).to(dtype)
    assert torch.equal(found[0], expected) and torch.equal(found[1], -expected)


@interpreted
def test_a_nan_does_not_reach_the_gradients_of_its_padding():
    lengths = torch.tensor([5, 40])
    x, logits, values = torch.randn(2, 40, 8), torch.randn(2, 40), torch.randn(2, 40, 8)
    x[0, 1, 3] = float("nan")
    given = [t.requires_grad_() for t in (x, logits, values)]
    pooled = ops.attention_pool(x, logits, lengths, backend="triton")
    mixed, _ = ops.similarity_graph(x, values, lengths, backend="triton")
    for out in (pooled, mixed):
        for grad in torch.autograd.grad(out.sum(), given, allow_unused=True):
            assert grad is None or not grad[0, 5:].isnan().any()


@interpreted
@pytest.mark.parametrize("width, classes", [(0, 3), (8, 0)])
def test_nothing_to_add_up_has_no_gradient(width, classes):
    x = torch.randn(2, 12, width, requires_grad=True)
    logits, prompts = torch.randn(2, 12, requires_grad=True), torch.randn(2, classes, width, requires_grad=True)
    for out, given in (
        (ops.attention_pool(x[..., :0], logits, backend="triton"), (x, logits)),
        (ops.prompt_similarity(x, prompts, backend="triton"), (x, prompts)),
    ):
        junk = [torch.full((2, 12, size), 7.0) for size in (1, 8) for _ in range(50)]  # what uninitialised memory holds
        del junk
        assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), given))


FAR = """
import torch
from avadclip_fast import ops

def far(*shape, to):  # huge steps along dimension `to`
    stride = 2**30 + 64
    base = torch.empty(2 * stride + 64, dtype=torch.float16)
    strides = [stride if d == to else 1 if d == len(shape) - 1 or to == 2 else shape[-1] for d in range(3)]
    x = base.as_strided(shape, strides)
    return x.copy_(torch.arange(1.0, 1 + x.numel()).view(shape) / x.numel())

few = torch.ones(1, 2, 3).half()
many = torch.ones(3, 2, 3).half()
weight = torch.ones(2, 2, 1).half()
for call in (
    lambda b: ops.attention_pool(far(1, 2, 3, to=2), few[..., 0], backend=b),
    lambda b: ops.prompt_similarity(far(1, 2, 3, to=2), few, backend=b),
    lambda b: ops.similarity_graph(far(1, 2, 3, to=2), few, backend=b)[0],
    lambda b: ops.window_attention(far(1, 2, 3, to=2), few, few, 2, backend=b),
    lambda b: ops.add_act(far(1, 2, 3, to=2), far(1, 2, 3, to=2), "relu", backend=b),
    lambda b: ops.distill_loss(*[far(1, 2, 3, to=2)] * 3, backend=b),
    lambda b: ops.linear_act(far(1, 3, 2, to=1), weight, backend=b),
    lambda b: ops.linear_act(torch.ones(1, 3, 2).half(), weight, residual=far(1, 3, 2, to=1), backend=b),
    lambda b: ops.attention_pool(far(3, 2, 3, to=0), many[..., 0], backend=b),
    lambda b: ops.prompt_similarity(far(3, 2, 3, to=0), many, backend=b),
    lambda b: ops.similarity_graph(far(3, 2, 3, to=0), far(3, 2, 3, to=0), backend=b)[0],
    lambda b: ops.window_attention(*[far(3, 2, 3, to=0)] * 3, 2, residual=far(3, 2, 3, to=0), backend=b),
    lambda b: ops.add_act(far(3, 2, 3, to=0), far(3, 2, 3, to=0), "relu", backend=b),
    lambda b: ops.distill_loss(*[far(3, 2, 3, to=0)] * 3, backend=b),
    lambda b: ops.linear_act(far(3, 3, 2, to=0), weight, residual=far(3, 3, 2, to=0), backend=b),
):
    print(call.__code__.co_names[1], flush=True)
    torch.testing.assert_close(call("triton").float(), call("reference").float(), rtol=2e-3, atol=2e-3)
"""


@interpreted
def test_offsets_of_over_2_to_the_31_elements():
    """In a process of its own, as a wrong offset may end it. The 4 GiB are never touched, and thus never allocated."""
    done = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-500:])


def test_what_offsets_of_32_bits_do_not_reach_is_copied():
    """Within a video: where each video begins is an offset of 64 bits."""
    for size, stride, copied in (
        ((2, 3, 4), (4, 2**30, 1), True),
        ((2, 3, 4), (4, 2**30 - 1, 1), False),
        ((3, 2, 4), (2**31, 4, 1), False),
    ):
        x = torch.empty_strided(size, stride, device="meta")
        assert (_addressable(x) is not x) == copied


def test_tma_does_not_take_expanded_rows():
    linear_act = pytest.importorskip("avadclip_fast.kernels.linear_act")
    silence = torch.zeros(1, 1, 64, dtype=torch.bfloat16).expand(3, 50, 64)  # audio that is absent
    assert not linear_act.describable(silence.reshape(1, -1, 64))
    assert linear_act.describable(silence.contiguous())


def test_tma_takes_aligned_rows_of_contiguous_channels_alone():
    linear_act = pytest.importorskip("avadclip_fast.kernels.linear_act")
    x = torch.zeros(3, 50, 64, dtype=torch.bfloat16)
    assert linear_act.describable(x[..., :40]) and linear_act.describable(x[:, 1:])
    for bad in (x[..., 1:], x.flatten()[: 3 * 50 * 60].view(3, 50, 60), x[..., ::2]):
        assert not linear_act.describable(bad)
