"""Dropout masks: on a CPU, and by the Triton kernel."""

import itertools
import math

import pytest
import torch
from op_tests import INTERPRETED, ON_GPU

from avadclip_fast.ops import _keep
from avadclip_fast.ops._keep import keep

# Under the interpreter, the masks of a CPU are the kernel's.
on_both = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="triton" if INTERPRETED else "cpu"), pytest.param("cuda", marks=ON_GPU)]
)


@on_both
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_kept_independently(device, p):
    torch.manual_seed(0)
    x = torch.zeros(3, 7, 4999, device=device)  # an odd count, whose last draw serves fewer elements
    kept = keep(x, p)
    assert kept.dtype == torch.bool and kept.shape == x.shape and kept.device == x.device
    assert kept.view(torch.uint8).max() == 1  # bytes of True
    whole = kept.numel() // 8 * 8
    elements = kept.flatten()[:whole].reshape(-1, 8).double().unbind(1)  # which share a draw, or two
    shares = [(one, 1 - p) for one in elements]
    shares += [(one * other, (1 - p) ** 2) for one, other in itertools.combinations(elements, 2)]
    shares += [(one[1:] * one[:-1], (1 - p) ** 2) for one in elements]  # draws that follow each other
    for share, expected in shares:
        deviation = math.sqrt(expected * (1 - expected) / len(share))
        assert abs(share.mean() - expected) < 4 * deviation
    torch.manual_seed(0)
    assert torch.equal(keep(x, p), kept)
    assert not torch.equal(keep(x, p), kept)


@on_both
def test_shares_at_the_ends(device):
    x = torch.zeros(2, 3, 500, device=device)
    assert keep(x, 0.0).all() and not keep(x, 1.0).any()
    assert keep(x, 1e-9).all()
    assert keep(x[:0], 0.5).shape == (0, 3, 500)


def test_shares_are_rounded_to_a_65536th():
    torch.manual_seed(0)
    x = torch.zeros(1 << 22)
    for few in (~keep(x, 0.6 * 2**-16), keep(x, 1 - 1e-9)):  # of 64 in the mean
        assert 40 < few.sum() < 95


def test_triton_drops_all_at_one_and_nearly_all_before():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    seed = torch.tensor(5)
    assert not torch.ops.avadclip_fast.keep(seed, [1 << 16], 1.0).any()
    assert 0 < torch.ops.avadclip_fast.keep(seed, [1 << 20], 1 - 1e-9).sum() < 64  # a 65536th is kept
    assert 0 < (~torch.ops.avadclip_fast.keep(seed, [1 << 20], 0.6 * 2**-16)).sum() < 64
    torch.library.opcheck(torch.ops.avadclip_fast.keep.default, (seed, [3, 7], 0.5))


def test_triton_takes_all_bits_of_a_seed():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    masks = [torch.ops.avadclip_fast.keep(torch.tensor(seed), [64], 0.5) for seed in (5, 5 + 2**32, 5 + 2**62)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.gpu
@ON_GPU[1]
def test_a_graph_draws_anew_at_every_replay():
    x = torch.zeros(2, 3, 500, device="cuda")
    keep(x, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = keep(x, 0.5)
    first, second = (graph.replay() or kept.clone() for _ in range(2))
    assert not torch.equal(first, second)


def test_what_is_compiled_draws_as_torch_does(monkeypatch):
    monkeypatch.setattr(_keep, "triton_reason", lambda x: None)
    compiled = torch.compile(lambda x: keep(x, 0.5), fullgraph=True, backend="aot_eager")
    assert 200 < compiled(torch.zeros(1, 1, 500)).sum() < 300
