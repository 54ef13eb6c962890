"""Whole models with every op that has a Triton kernel served by it, against the reference.

Runs on a GPU, or without one in Triton's interpreter. The authors' numbers themselves, under the interpreter:
`make golden-triton`.
"""

import pytest
import torch
from fused import ON_TRITON
from fused import TRITON as DEVICE
from small_models import batch, student, teacher

from avadclip_fast import objective, ops
from avadclip_fast.ops import _dispatch

pytestmark = ON_TRITON
SAME = 1e-4  # float32 in another order of summation, over all layers


def step(model, backend: str, *inputs, labels, lengths, guide=None) -> dict[str, torch.Tensor]:
    """Outputs, losses and gradients by name."""
    model.zero_grad()
    with ops.use_backend(backend):
        out = model(*inputs, lengths)
        losses = objective(model, out, labels, lengths, guide, distill_weight=0.1)
        losses["total"].backward()
    named = {"features": out.features, "anomaly": out.anomaly_logits, "classes": out.class_logits, **losses}
    named |= {} if out.log_variance is None else {"log variance": out.log_variance}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in named.items()} | grads


@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_triton_gives_the_references_numbers(kind, padding, monkeypatch):
    """And gave them: a kernel that quietly gave way to the reference would pass every comparison."""
    used, ranged = set(), _dispatch.ranged

    def noted(name: str, *args, **kwargs):
        used.add(tuple(name.split(":")))
        return ranged(name, *args, **kwargs)

    model = {"teacher": teacher, "student": student}[kind](padding=padding).to(DEVICE)
    visual, audio, labels, lengths = (x.to(DEVICE) for x in batch([24, 9], 24))
    inputs = (visual, audio) if kind == "teacher" else (visual,)
    guide = None if kind == "teacher" else torch.randn_like(visual)
    expected = step(model, "reference", *inputs, labels=labels, lengths=lengths, guide=guide)
    monkeypatch.setattr(_dispatch, "ranged", noted)
    got = step(model, "triton", *inputs, labels=labels, lengths=lengths, guide=guide)
    having = {op for op, row in _dispatch.TABLE.items() if "triton" in row}
    # Whole layers are one operator where gradients are wanted, attention among them.
    layers = {"residual_attention", "residual_mlp", "binary_head"}
    idle = {"window_attention", {"teacher": "distill_loss", "student": "gated_fusion"}[kind]}
    assert {op for op, name in used if name == "triton"} == having - idle | layers
    assert not {op for op, name in used if name != "triton"} & having
    assert got.keys() == expected.keys() and len(got) > 30
    # a gradient that the float32 reference itself has as rounding noise is held to the largest one's scale
    scale = max(x.norm() for name, x in expected.items() if name not in ("features", "classes", "anomaly"))
    for name, x in expected.items():
        error = (got[name] - x).norm() / max(x.norm(), 1e-4 * scale)
        assert error < SAME, f"{name}: {error:.1e}"
