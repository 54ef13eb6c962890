"""Whole training steps, teacher and distillation, against the authors' code in eager PyTorch.

Both sides start from the same weights. First it is checked, without dropout, that they compute the same loss, and of a
few samples the same gradients: in float64, since in float32 a cosine at the graph's threshold may fall on either side.
A step is forward, backward and AdamW. The distilling step looks up its teacher's features, which the official code
computes again in each step. bfloat16 is autocast's, over float32 weights.
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
CHECKED = 2  # samples whose gradients are compared
TOLERANCE = 1e-6  # relative, of whole gradients in float64: the official distance matrix is float32's


Sample = tuple[tuple[Tensor, ...], Tensor, Tensor]  # streams [B, T, D] each, labels [B, C], lengths [B]


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


def our_step(model, sample: Sample, guide=None, dtype=torch.float32):
    streams, labels, lengths = sample
    model = copy.deepcopy(model).train()
    update = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> Tensor:
        with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
            value = objective(model, model(*streams, lengths), labels, lengths, guide)["total"]
        update.zero_grad()
        value.backward()
        update.step()
        return value

    return step


def check(model, sample: Sample, guide: Tensor | None, official) -> None:
    """Raises AssertionError where the loss differs, or in float64 a gradient."""

    def losses(model, sample: Sample, guide: Tensor | None):
        weights = official_weights(model)
        streams, labels, lengths = sample
        ours = objective(model, model(*streams, lengths), labels, lengths, guide)["total"]
        return weights, ours, official(weights, sample, 0.0)

    with torch.no_grad():
        _, ours, theirs = losses(model, sample, guide)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    streams, labels, lengths = sample
    few = tuple(x[:CHECKED].double() for x in streams), labels[:CHECKED].double(), lengths[:CHECKED]
    model = copy.deepcopy(model).double()
    weights, ours, theirs = losses(model, few, None if guide is None else guide[:CHECKED].double())
    ours.backward()
    theirs.backward()
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

    def teacher_loss(weights: eager_model.Weights, sample: Sample, dropout: float) -> Tensor:
        (visual, audio), labels, lengths = sample
        return eager_model.teacher_loss(weights, tokens, visual, audio, labels, lengths, dropout=dropout)

    rows = []
    for batch in BATCHES[options.device]:
        lengths = torch.randint(16, ROWS + 1, (batch,), device=device)
        valid = (torch.arange(ROWS, device=device) < lengths[:, None])[..., None]
        visual, audio = torch.randn(2, batch, ROWS, WIDTH, device=device) * valid
        labels = F.one_hot(torch.randint(len(CLASSES), (batch,), device=device), len(CLASSES)).float()
        with torch.no_grad():
            guide = teacher.fuse(visual, audio, lengths)

        def distil_loss(weights: eager_model.Weights, sample: Sample, dropout: float, audio=audio) -> Tensor:
            (visual,), labels, lengths = sample
            heard = audio[: len(visual)].to(visual.dtype)
            known = {name: x.to(visual.dtype) if x.is_floating_point() else x for name, x in frozen.items()}
            return eager_model.distil_loss(weights, known, tokens, visual, heard, labels, lengths)

        heard_and_seen, seen = ((visual, audio), labels, lengths), ((visual,), labels, lengths)
        rows += case(options.rounds, f"teacher, B={batch}", teacher, heard_and_seen, None, teacher_loss)
        rows += case(options.rounds, f"distil, B={batch}", student, seen, guide, distil_loss)
    return rows


def case(rounds: int, name: str, model, sample: Sample, guide: Tensor | None, official) -> list[dict]:
    """official: (weights, sample, dropout) -> loss."""
    check(model, sample, guide, official)
    weights = official_weights(model)
    steps = {
        "official": official_step(weights, lambda: official(weights, sample, 0.1)),
        "ours": our_step(model, sample, guide),
        "ours, bfloat16": our_step(model, sample, guide, torch.bfloat16),
    }
    counts = {f"{key}_flops": flops(step) for key, step in list(steps.items())[:2]}
    timers = {key: harness.host_timer(step) for key, step in steps.items()}
    return harness.compare(name, harness.measure(timers, rounds), "ours", **counts)


if __name__ == "__main__":
    harness.command("bench_step", run)
