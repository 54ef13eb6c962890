"""Whole training steps, teacher and distillation, against the authors' code in eager PyTorch.

Both sides start from the same weights; that they compute the same loss and gradients is checked first, without
dropout. A step is forward, backward and AdamW. The distilling step looks up its teacher's features, which the official
code computes again in each step. bfloat16 is autocast's, over float32 weights.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avadclip_fast import AVadCLIP, AVadCLIPStudent, objective
from avadclip_fast.models.checkpoints import official_state

from . import eager_model, harness

ROWS, WIDTH = 256, 512
CLASSES = ["normal", "fighting", "shooting", "riot", "abuse", "car accident", "explosion"]
BATCHES = {"cpu": (16, 32), "cuda": (96,)}
TOLERANCE = 1e-3  # relative, of whole gradients in float32: cosines at the graph's threshold may fall on either side


def official_weights(model: torch.nn.Module) -> eager_model.Weights:
    """Copies of a model's tensors by their official names; those that it trains are leaves."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name: x.detach().clone().requires_grad_(name in trained) for name, x in model.state_dict().items()}
    return official_state(own)


def official_step(weights: eager_model.Weights, loss):
    leaves = list({id(w): w for w in weights.values() if w.requires_grad}.values())
    update = torch.optim.AdamW(leaves, lr=1e-5)

    def step() -> Tensor:
        value = loss()
        update.zero_grad()
        value.backward()
        update.step()
        return value

    return step


def our_step(model, inputs, labels, lengths, guide=None, dtype=torch.float32):
    model = copy.deepcopy(model).train()
    update = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> Tensor:
        with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
            value = objective(model, model(*inputs, lengths), labels, lengths, guide)["total"]
        update.zero_grad()
        value.backward()
        update.step()
        return value

    return step


def check(model, weights: eager_model.Weights, ours: Tensor, official: Tensor) -> None:
    """Raises AssertionError where loss or a gradient differs."""
    torch.testing.assert_close(ours, official, rtol=1e-4, atol=1e-5)
    ours.backward()
    official.backward()
    named = official_state({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, p in named.items():
        expected = weights[name].grad
        if p.grad is None and expected is None:
            continue
        error = (p.grad - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < TOLERANCE, f"{name}: gradient differs by {error:.1e} of its norm"


def flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def run(options: argparse.Namespace) -> list[dict]:
    device = options.device
    teacher = AVadCLIP(CLASSES, text_weights="random", padding="official").eval().to(device)
    student = AVadCLIPStudent.beside(teacher, padding="official").eval().to(device)
    frozen, tokens = official_weights(teacher), teacher.text.tokens
    rows = []
    for batch in BATCHES[options.device]:
        lengths = torch.randint(16, ROWS + 1, (batch,), device=device)
        valid = (torch.arange(ROWS, device=device) < lengths[:, None])[..., None]
        visual, audio = torch.randn(2, batch, ROWS, WIDTH, device=device) * valid
        labels = F.one_hot(torch.randint(len(CLASSES), (batch,), device=device), len(CLASSES)).float()
        sample = (visual, audio, labels, lengths)
        with torch.no_grad():
            guide = teacher.fuse(visual, audio, lengths)
        rows += case(
            options.rounds, f"teacher, B={batch}", teacher, (visual, audio), labels, lengths, None,
            lambda weights, dropout, sample=sample: eager_model.teacher_loss(weights, tokens, *sample, dropout=dropout),
        )  # fmt: skip
        rows += case(
            options.rounds, f"distil, B={batch}", student, (visual,), labels, lengths, guide,
            lambda weights, _, sample=sample: eager_model.distil_loss(weights, frozen, tokens, *sample),
        )  # fmt: skip
    return rows


def case(rounds, name, model, streams, labels, lengths, guide, official) -> list[dict]:
    """official: (weights, dropout) -> loss."""
    weights, ours = official_weights(model), copy.deepcopy(model)
    loss = objective(ours, ours(*streams, lengths), labels, lengths, guide)["total"]
    check(ours, weights, loss, official(weights, 0.0))
    steps = {
        "official": official_step(weights, lambda: official(weights, 0.1)),
        "ours": our_step(model, streams, labels, lengths, guide),
        "ours, bfloat16": our_step(model, streams, labels, lengths, guide, torch.bfloat16),
    }
    counts = {f"{key}_flops": flops(step) for key, step in list(steps.items())[:2]}
    timers = {key: harness.host_timer(step) for key, step in steps.items()}
    return harness.compare(name, harness.measure(timers, rounds), "ours", **counts)


if __name__ == "__main__":
    harness.command("bench_step", run)
