"""Weights cast once a step: what is cast, what is computed from it, and that no weight is cast again."""

import statistics

import pytest
import torch
from op_tests import ON_GPU
from small_models import batch, student, teacher
from torch.utils._python_dispatch import TorchDispatchMode

from avadclip_fast.data import Batch
from avadclip_fast.engine import lowering, step
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.models import groups
from avadclip_fast.ops import _autocast

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
both = pytest.mark.parametrize("make", [teacher, student])


class Casts(TorchDispatchMode):
    """Counts the casts of whole weights, by the names of their storage."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.names, self.seen = {p.untyped_storage().data_ptr(): name for name, p in weights.items()}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_to_copy":
            self.seen.append(self.names.get(args[0].untyped_storage().data_ptr()))
        return function(*args, **(kwargs or {}))


def gradients(model, given, known, precision="bf16") -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = step.gradients(model, optimizer, given, known, Recipe(precision=precision, distill_weight=0.1))
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def given_on(device: str, seed: int = 326) -> tuple[Batch, torch.Tensor]:
    visual, audio, labels, lengths = (x.to(device) for x in batch([9, 16, 5], 16, seed=seed))
    return Batch(visual, audio, lengths, labels), torch.ones_like(visual)


@pytest.fixture
def model(make, device, monkeypatch):
    """As on a GPU: weights are cast together, and videos are not grouped by length."""
    monkeypatch.setattr(_autocast, "LOWERING", (device,))
    monkeypatch.setattr(groups, "pays", lambda x: False)
    return make().to(device)


@on_both
@both
def test_gradients_are_those_of_casts_at_every_use(model, make, device, monkeypatch):
    # Rounded to bf16, scores that are close change places, and cosines cross the threshold, and the gradients with
    # them, one way or the other: of three batches, the middle one decides.
    ratios: dict[str, list[float]] = {}
    for seed in (326, 327, 328):
        given, known = given_on(device, seed)
        known = None if make is teacher else known
        found = gradients(model, given, known)
        with monkeypatch.context() as patched:
            patched.setattr(step, "lowered_weights", lambda *_: {})
            expected = gradients(model, given, known)
            exact = gradients(model, given, known, "fp32")
        assert found.keys() == expected.keys() and len(found) > 20
        largest = max(x.norm() for x in exact.values())
        for name, x in exact.items():
            assert found[name].dtype == torch.float32 and found[name].shape == x.shape
            error, known_error = ((grads[name] - x).norm() for grads in (found, expected))
            allowed = 2 * known_error + 2**-7 * max(x.norm(), 1e-3 * largest)
            ratios.setdefault(name, []).append(float(error / allowed))
    assert not {name: several for name, several in ratios.items() if statistics.median(several) > 1}


@on_both
@both
def test_no_weight_is_cast_alone(model, make, device):
    with torch.autocast(device, torch.bfloat16):
        chosen = dict(model.named_parameters()).keys() & lowering.lowered_weights(model, device).keys()
    assert {"temporal.positions.weight", "mlp2.c_fc.weight", "classifier.weight"} <= chosen
    kept = {"classifier.bias", "temporal.resblocks.0.ln_1.weight", "text.prompt.weight"}
    kept |= {"audio.network.0.conv1.weight_v"} if make is teacher else set()
    assert kept <= dict(model.named_parameters()).keys() - chosen
    given, known = given_on(device)
    with Casts({name: p for name, p in model.named_parameters() if name in chosen}) as casts:
        gradients(model, given, None if make is teacher else known)
    assert casts.seen and not [name for name in casts.seen if name is not None]


def test_a_cpu_and_other_precisions_cast_nothing(monkeypatch):
    model, x = teacher(), torch.ones(2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lowering.lowered_weights(model, "cpu") == {}
        assert _autocast.activations(x.float()).dtype == torch.float32
        monkeypatch.setattr(_autocast, "LOWERING", ("cpu",))
        assert _autocast.activations(x) is x
    assert lowering.lowered_weights(model, "cuda") == {}


def test_gradients_of_any_strides_and_none():
    weights = [torch.randn(3, 5, requires_grad=True) for _ in range(3)]
    a, b, c = lowering.Lowered.apply(torch.bfloat16, *weights)
    assert all(torch.equal(x, w.bfloat16()) for x, w in zip((a, b, c), weights, strict=True))
    upstream = torch.randn(5, 6).bfloat16()[:, ::2].T
    got = torch.autograd.grad([a, c], weights, [upstream, torch.ones(3, 5).bfloat16()], allow_unused=True)
    assert torch.equal(got[0], upstream.float()) and got[1] is None and torch.equal(got[2], torch.ones(3, 5))
