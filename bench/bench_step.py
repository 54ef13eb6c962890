"""Whole training steps, teacher and distillation, against the authors' code in eager PyTorch.

Both sides start from the same weights. Before timing, they are checked without dropout to give the same loss and, for a
few samples, the same gradients. Gradients are compared in float64, since in float32 a cosine near the threshold of the
similarity graph may fall on either side. A step is forward, backward and AdamW. The distillation step looks up cached
teacher features, which the official code recomputes in every step. bfloat16 means autocast with float32 weights. On a
GPU our steps are CUDA graphs, and in bfloat16 they are compared with three more steps: ours without a graph, the
references, and the references under torch.compile, in a CUDA graph like ours. torch.compile runs last, since compiling
a whole step may take longer than everything else.

"masked" is the default of training, padding="masked". It is a different function that need not compute padded rows, and
only the tests check it.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avadclip_fast import AVadCLIP, AVadCLIPStudent, objective
from avadclip_fast.data import Batch
from avadclip_fast.engine.graph import StepGraph, changed_by
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.engine.step import adamw, train_step
from avadclip_fast.models.checkpoints import official_state
from avadclip_fast.ops._dispatch import use_backend

from . import eager_model, harness

ROWS, WIDTH = 256, 512
CLASSES = ["normal", "fighting", "shooting", "riot", "abuse", "car accident", "explosion"]
BATCHES = {"cpu": (16, 32), "cuda": (96,)}
CHECKED = 2  # samples for the gradient check
TOLERANCE = 1e-6  # relative error of a float64 gradient, since the official distance matrix is float32
COMPILING = 100  # seconds after which nothing more is compiled; bench.gpu stops the bench after 200


Sample = tuple[tuple[Tensor, ...], Tensor, Tensor]  # streams [B, T, D] each, labels [B, C], lengths [B]
Step = Callable[[], Tensor]
Part = Callable[[], list[dict]]  # measures one case


def official_weights(model: torch.nn.Module) -> eager_model.Weights:
    """Returns copies of a model's tensors by their official names; trained ones are leaves that require gradients."""
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


def our_step(model, sample: Sample, guide=None, precision="fp32", graph=False) -> Step:
    """Returns a step as in `fit`. graph: record it as a CUDA graph."""
    step, update = unrecorded(model, sample, guide, precision, graph)
    return recorded(step, update) if graph else step


def compiled_step(model, sample: Sample, guide: Tensor | None) -> Step:
    """Returns a bfloat16 step of the references under default torch.compile, as a CUDA graph if it can be captured."""
    torch.compiler.reset()
    step, update = unrecorded(model, sample, guide, "bf16", graph=True, compiled=True)
    step = plainly(step)
    try:
        return recorded(step, update)
    except RuntimeError as error:
        print(f"torch.compile's step is timed without a graph: {str(error).partition(chr(10))[0]}", flush=True)
        return step


def unrecorded(model, sample: Sample, guide, precision: str, graph: bool, compiled: bool = False):
    """Returns a step and its optimizer. graph: make the optimizer capturable."""
    streams, labels, lengths = sample
    model, recipe = copy.deepcopy(model).train(), Recipe(precision=precision)
    batch = Batch(streams[0], streams[1] if len(streams) > 1 else None, lengths, labels)
    update = adamw(model, recipe, labels.device, graph)
    model = torch.compile(model, dynamic=False) if compiled else model

    def step() -> Tensor:
        losses, _ = train_step(model, update, batch, guide, recipe)
        return losses["total"].detach()

    return step, update


def recorded(step: Step, update: torch.optim.Optimizer) -> StepGraph:
    graph = StepGraph(step, lambda: changed_by(update))
    graph.record()
    return graph


def check(model, sample: Sample, guide: Tensor | None, official) -> None:
    """Raises AssertionError if the loss, or a float64 gradient, differs from the official one."""

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
    """Returns the step with the reference backend."""

    def call() -> Tensor:
        with use_backend("reference"):
            return step()

    return call


def launches(step) -> dict[str, int]:
    """Returns the host cost of a step on a GPU: launched kernels, copies and fills, and synchronizations."""
    step()
    activity = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        step()
    events = profile.events() or []
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events)
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    # A range such as that of an optimizer's step spans its kernels as an event of the GPU.
    return {"kernels": sum(not event.is_user_annotation for event in on_gpu), "waits": waits}


def peak_memory(step: Step) -> int:
    """Returns the peak GPU memory of a step in bytes, beyond what is allocated before: weights, moments, other steps.

    A replay allocates nothing, so a recorded step is measured without its graph.
    """
    plain = step.function if isinstance(step, StepGraph) else step
    plain()  # creates the moments
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plain()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(options: argparse.Namespace) -> Iterator[list[dict]]:
    began = time.monotonic()
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
        return eager_model.teacher_loss(weights, tokens, visual, audio, labels, lengths, dropout)

    plain: list[Part] = []
    compiled: list[Part] = []
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
        for name, model, own, sample, known, official in (
            (f"teacher, B={batch}", teacher, masked[False], heard_and_seen, None, teacher_loss),
            (f"distil, B={batch}", student, masked[True], seen, guide, distil_loss),
        ):
            plain.append(partial(case, options.rounds, name, model, own, sample, known, official))
            if device == "cuda":
                plain.append(partial(in_bfloat16, options.rounds, name, model, sample, lowered(known)))
                compiled.append(partial(beside_compiled, options.rounds, name, model, sample, lowered(known)))

    def in_time() -> Iterator[Part]:
        for rows in compiled:
            if time.monotonic() - began > COMPILING:
                print(f"without torch.compile, {COMPILING} s are up", flush=True)
                return
            yield rows

    whole = {"with": itertools.chain(plain, in_time()), "without": plain, "only": in_time(), "ahead": ()}
    chosen = whole[options.compile]
    yield from harness.all_of(lambda rows=rows: [rows()] for rows in chosen)


def lowered(guide: Tensor | None) -> Tensor | None:
    """Teacher features as `fit` keeps them for steps in bfloat16."""
    return guide.bfloat16() if guide is not None and guide.is_cuda else guide


def case(rounds: int, name: str, model, masked, sample: Sample, guide: Tensor | None, official) -> list[dict]:
    """Compares the official step with ours. official: (weights, sample, dropout) -> loss."""
    check(model, sample, guide, official)
    weights, gpu = official_weights(model), sample[1].is_cuda
    kept = lowered(guide)
    steps = {
        "official": official_step(weights, lambda: official(weights, sample, 0.1)),
        "ours": our_step(model, sample, guide, graph=gpu),
        "ours, bfloat16": our_step(model, sample, kept, "bf16", graph=gpu),
        "ours, masked": our_step(masked, sample, guide, graph=gpu),
        "ours, masked, bfloat16": our_step(masked, sample, kept, "bf16", graph=gpu),
    }
    plain = our_step(model, sample, guide) if gpu else steps["ours"]
    both = {"official_flops": flops(steps["official"]), "ours_flops": flops(plainly(plain))}  # fused ops count as 0
    return timed(rounds, name, steps, gpu, **both)


def in_bfloat16(rounds: int, name: str, model, sample: Sample, guide: Tensor | None) -> list[dict]:
    """Compares our step with itself without a CUDA graph, and with the references without a graph."""
    steps = {
        "reference, no graph": plainly(our_step(model, sample, guide, "bf16")),
        "ours, no graph": our_step(model, sample, guide, "bf16"),
        "ours": our_step(model, sample, guide, "bf16", graph=True),
    }
    return timed(rounds, f"{name}, bfloat16", steps, gpu=True)


def beside_compiled(rounds: int, name: str, model, sample: Sample, guide: Tensor | None) -> list[dict]:
    compiled = compiled_step(model, sample, guide)
    called = "torch.compile" if isinstance(compiled, StepGraph) else "torch.compile, no graph"
    steps = {called: compiled, "ours": our_step(model, sample, guide, "bf16", graph=True)}
    return timed(rounds, f"{name}, bfloat16, against torch.compile", steps, gpu=True)


def timed(rounds: int, name: str, steps: dict[str, Step], gpu: bool, **counted: float) -> list[dict]:
    counts = {key: launches(step) | {"memory_bytes": peak_memory(step)} if gpu else {} for key, step in steps.items()}
    timers = {key: harness.host_timer(step) for key, step in steps.items()}
    rows = harness.compare(name, harness.measure(timers, rounds), "ours", **counted)
    return [row | counts[row["alternative"]] for row in rows]


if __name__ == "__main__":
    harness.command("bench_step", run, dtypes=())
