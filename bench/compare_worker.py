"""One side of `bench.compare`: prints its cases as JSON, then the seconds of each case requested on stdin."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module

import torch

from . import harness

SHORTEST = 0.02  # seconds of a measurement on the host; shorter calls are repeated


def timers(op: str, device: str) -> dict[str, harness.Timer]:
    """Returns a timer per case for the selected backend: forward, and backward if there is a backward pass."""

    def cases(dtype: torch.dtype) -> Iterator[harness.Bench]:
        for bench in import_module(f"bench.bench_{op}").cases(dtype):
            yield bench.only(("reference", bench.ours))

    harness.whole_float32()
    torch.manual_seed(0)
    found = {}
    for bench, sets in harness.prepared(cases, torch.float32 if device == "cpu" else torch.bfloat16, device):
        way = harness.forward_backward if bench.both else harness.forward
        calls = [way(bench.alternatives[bench.ours], s, harness.leaves(s)) for s in sets]
        on_graph = device == "cuda" and bench.ours not in bench.waits
        found[bench.case] = harness.graph_timer(calls) if on_graph else repeated(calls[0])
    return found


def repeated(call: Callable[[], object]) -> harness.Timer:
    """Times the mean of enough calls to make clock resolution and cache effects small."""
    one = harness.host_timer(call)
    times = max(1, round(SHORTEST / min(one() for _ in range(5))))

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(times):
            one()
        return (time.perf_counter() - start) / times

    return timed


def main() -> None:
    found = timers(*sys.argv[1:])
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        print(json.dumps(list(found.values())[int(line)]()), flush=True)


if __name__ == "__main__":
    main()
