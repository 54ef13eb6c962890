"""Whole training steps, teacher and distillation, against the authors' code in eager PyTorch.

Both sides start from the same weights. First it is checked, without dropout, that they compute the same loss, and of a
few samples the same gradients: in float64, since in float32 a cosine at the graph's threshold may fall on either side.
A step is forward, backward and AdamW. The distilling step looks up its teacher's features, which the official code
computes again in each step. bfloat16 is autocast's, over float32 weights. On a GPU our steps are CUDA graphs, and three
more stand beside them: without a graph, by the references, and by what torch.compile makes of these.

"masked" computes what training does by default, padding="masked": not the same function, and rows of padding need no
computing. It is checked by the tests alone.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avadclip_fast import AVadCLIP, AVadCLIPStudent, objective
from avadclip_fast.data import Batch
from avadclip_fast.engine.graph import StepGraph, changed_by
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.engine.train import adamw, train_step
from avadclip_fast.models.checkpoints import official_state
from avadclip_fast.ops._dispatch import use_backend

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


def our_step(model, sample: Sample, guide=None, precision="fp32", graph=False, compiled=False):
    """A step as `fit` makes it. graph: recorded. compiled: what torch.compile makes of the model, by its defaults."""
    streams, labels, lengths = sample
    model, recipe = copy.deepcopy(model).train(), Recipe(precision=precision)
    batch = Batch(streams[0], streams[1] if len(streams) > 1 else None, lengths, labels)
    update = adamw(model, recipe, labels.device, graph)
    model = torch.compile(model, dynamic=False) if compiled else model

    def step() -> Tensor:
        losses, _ = train_step(model, update, batch, guide, recipe)
        return losses["total"].detach()

    if not graph:
        return step
    recorded = StepGraph(step, lambda: changed_by(update))
    recorded.record()
    return recorded


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


def plainly(step):
    """The same by the references alone."""

    def call() -> Tensor:
        with use_backend("reference"):
            return step()

    return call


def launches(step) -> dict[str, int]:
    """What a step costs a GPU's host: kernels, copies and fills that are launched, and how often it waits."""
    step()
    activity = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        step()
    events = profile.events() or []
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events)
    return {"kernels": sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events), "waits": waits}


def peak_memory(step) -> int:
    """Bytes of GPU memory that are in use at once."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def run(options: argparse.Namespace) -> list[dict]:
    device = options.device
    teacher = AVadCLIP(CLASSES, text_weights="random", padding="official").eval().to(device)
    student = AVadCLIPStudent.beside(teacher, padding="official").eval().to(device)
    masked = {False: AVadCLIP(CLASSES, text_weights=None), True: AVadCLIPStudent.beside(teacher)}
    for distilled, model in ((False, teacher), (True, student)):
        masked[distilled].load_state_dict(model.state_dict())
        masked[distilled].to(device)
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
        rows += case(options.rounds, f"teacher, B={batch}", teacher, masked[False], heard_and_seen, None, teacher_loss)
        rows += case(options.rounds, f"distil, B={batch}", student, masked[True], seen, guide, distil_loss)
    return rows


def case(rounds: int, name: str, model, masked, sample: Sample, guide: Tensor | None, official) -> list[dict]:
    """official: (weights, sample, dropout) -> loss."""
    check(model, sample, guide, official)
    weights, gpu = official_weights(model), sample[1].is_cuda
    steps = {
        "official": official_step(weights, lambda: official(weights, sample, 0.1)),
        "ours": our_step(model, sample, guide, graph=gpu),
        "ours, bfloat16": our_step(model, sample, guide, "bf16", graph=gpu),
        "ours, masked": our_step(masked, sample, guide, graph=gpu),
        "ours, masked, bfloat16": our_step(masked, sample, guide, "bf16", graph=gpu),
    }
    counts: dict[str, dict] = {key: {} for key in steps}
    if gpu:
        plain = our_step(model, sample, guide)
        steps["ours, bfloat16, no graph"] = our_step(model, sample, guide, "bf16")
        steps["reference, bfloat16"] = plainly(our_step(model, sample, guide, "bf16"))
        steps["torch.compile, bfloat16"] = plainly(our_step(model, sample, guide, "bf16", compiled=True))
        counts = {key: launches(step) | {"memory_bytes": peak_memory(step)} for key, step in steps.items()}
    else:
        plain = steps["ours"]
    both = {"official_flops": flops(steps["official"]), "ours_flops": flops(plainly(plain))}  # fused, none are seen
    timers = {key: harness.host_timer(step) for key, step in steps.items()}
    rows = harness.compare(name, harness.measure(timers, rounds), "ours", **both)
    return [row | counts[row["alternative"]] for row in rows]


if __name__ == "__main__":
    harness.command("bench_step", run)
