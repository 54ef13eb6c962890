"""Overhead of the `avadclip_fast.profiling` ranges on a call of the smallest op: on, off, and without the check.

When the ranges are off, the overhead should be within the spread.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from avadclip_fast import ops, profiling
from avadclip_fast.ops import _dispatch

from . import harness

CALLS = 500  # per round, a few milliseconds


def unchecked(name: str, function: Callable, *args: object, **kwargs: object) -> object:
    """`_dispatch.ranged` without ranges."""
    return function(*args, **kwargs)


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "on": lambda: profiling.profiling(True),
    "off": lambda: profiling.profiling(False),
    "no check": lambda: mock.patch.object(_dispatch, "ranged", unchecked),  # the baseline
}


def timer(way: Callable[[], contextlib.AbstractContextManager], call: Callable[[], object]) -> harness.Timer:
    def many() -> None:
        for _ in range(CALLS):
            call()

    timed = harness.host_timer(many)

    def seconds() -> float:
        with way(), torch.no_grad():
            return timed() / CALLS

    return seconds


def run(options: argparse.Namespace) -> Iterator[list[dict]]:
    scores, lengths = (x.to(options.device) for x in (torch.randn(1, 1, 1), torch.ones(1, dtype=torch.long)))
    for backend in harness.served("topk_mean", ops.topk_mean, (scores, lengths)):
        timers = {
            name: timer(way, lambda backend=backend: ops.topk_mean(scores, lengths, backend=backend))
            for name, way in WAYS.items()
        }
        case = f"topk_mean [1, 1, 1], {backend}"
        yield harness.compare(case, harness.measure(timers, options.rounds), "no check", calls=CALLS)


if __name__ == "__main__":
    harness.command("bench_spans", run, dtypes=())
