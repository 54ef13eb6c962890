"""Inference of the student, against the authors' code in eager PyTorch: chunks of 256 snippets, and whole videos.

The official code scores one video at a time and computes text features and uncertainty for each. This library packs
videos into passes of several chunks, computes text features once, and skips the uncertainty, which only training needs.
On a GPU it also replays a pass as a CUDA graph. The logits are checked to be equal first.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from avadclip_fast import AVadCLIPStudent
from avadclip_fast.data import TestVideo
from avadclip_fast.data.features import chunk
from avadclip_fast.engine.evaluate import stream_scores
from avadclip_fast.engine.graph import StepGraph

from . import eager_model, harness
from .bench_step import CLASSES, ROWS, WIDTH, official_weights

CHUNKS = {"cpu": (1, 8), "cuda": (1, 40, 96)}
VIDEOS = {"cpu": 24, "cuda": 100}  # a sample of a test set, since the official code is slow
TEST_SET = 800  # videos in the test set of XD-Violence
SNIPPETS = (20, 400)  # minimum and maximum per video


def run(options: argparse.Namespace) -> Iterator[list[dict]]:
    device = options.device
    student = AVadCLIPStudent(CLASSES, text_weights="random", padding="official").eval().to(device)
    weights, tokens = official_weights(student), student.text.tokens
    text = student.encode_text().detach()

    def official(visual: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return eager_model.student_scores(weights, tokens, visual, lengths)

    def ours(visual: Tensor, lengths: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = student.infer(visual, lengths=lengths, text_features=text)
        return out.anomaly_logits, out.class_logits

    def recorded(dtype: torch.dtype, *inputs: Tensor) -> StepGraph:
        graph = StepGraph(partial(ours, dtype=dtype))
        graph.record(*inputs)
        return graph

    for chunks in CHUNKS[device]:
        lengths = torch.full((chunks,), ROWS, device=device)
        visual = torch.randn(chunks, ROWS, WIDTH, device=device)
        calls: dict[str, Callable[[], object]] = {
            "official": lambda x=(visual, lengths): [official(v[None], n[None]) for v, n in zip(*x, strict=True)],
            "ours": lambda x=(visual, lengths): ours(*x),
            "ours, bfloat16": lambda x=(visual, lengths): ours(*x, torch.bfloat16),
        }
        found = [ours(visual, lengths)]
        if device == "cuda":
            for name, dtype in (("ours, graph", torch.float32), ("ours, bfloat16, graph", torch.bfloat16)):
                calls[name] = partial(recorded(dtype, visual, lengths), visual, lengths)
            found.append(calls["ours, graph"]())
        for logits in found:
            for got, expected in zip(logits, official(visual, lengths), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        yield timed(options, f"student, {chunks} chunk{'s' * (chunks > 1)} of {ROWS}", calls)

    videos = [drawn(i) for i in range(VIDEOS[device])]

    def by_video() -> list[np.ndarray]:
        found = []
        for video in videos:
            visual = torch.from_numpy(video.visual).to(device)
            logits, _ = official(visual, torch.from_numpy(video.lengths).to(device))
            found.append(np.concatenate([x[:n].sigmoid().cpu() for x, n in zip(logits, video.lengths, strict=True)]))
        return found

    def packed() -> list[np.ndarray]:
        return [video.anomaly for video in stream_scores(student, videos, device)]

    for one, other in zip(packed(), by_video(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    yield timed(options, f"student, {len(videos)} of {TEST_SET} videos", {"official": by_video, "ours": packed})


def drawn(number: int) -> TestVideo:
    """Returns a random video of SNIPPETS snippets, in chunks."""
    rng = np.random.default_rng(number)
    features = rng.standard_normal((int(rng.integers(*SNIPPETS)), WIDTH), np.float32)
    chunks, lengths = chunk(features, ROWS)
    return TestVideo(str(number), chunks, None, lengths, len(features))


def timed(options: argparse.Namespace, case: str, calls: dict[str, Callable[[], object]]) -> list[dict]:
    timers = {name: harness.host_timer(call) for name, call in calls.items()}
    return harness.compare(case, harness.measure(timers, options.rounds), "ours")


if __name__ == "__main__":
    harness.command("bench_inference", run, dtypes=())
