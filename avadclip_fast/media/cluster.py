"""Extraction on a Ray cluster, one task per video; all machines must share the videos and the output folder.

A task whose worker or machine is lost is retried elsewhere. A video that repeatedly crashes its worker is eventually
reported as failed.
"""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .encoders import AudioEncoder, Encoders, VisualEncoder
from .errors import MediaError
from .extract import Source, Tally, extract_one, reason_of
from .features import Sampling

RETRIES = 3  # after a lost worker or machine
LOOK = 0.5  # seconds between polls of `until`
PATIENCE = 10.0  # seconds that cancelled tasks have to end
DEVICES = ("auto", "cpu", "cuda")
OWN_DEVICES = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def import_ray() -> Any:
    """Imports Ray. Raises MediaError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise MediaError('--engine ray needs Ray: pip install "avadclip_fast[ray]"') from error
    return ray


def extract(
    sources: Sequence[Source],
    output: str | Path,
    sampling: Sampling,
    encoders: Encoders,
    settings: dict[str, Any],
    progress: Callable[[str], None] | None = None,
    until: Callable[[], bool] = lambda: False,
) -> dict[str, list]:
    """`extract.extract` on the cluster at RAY_ADDRESS, one already running here, or a new one on this machine.

    Each video takes one CPU, and one GPU if the cluster has any and encoders.device is not cpu. Relative paths start
    from this process's working folder, and must exist on every machine.

    Arguments and result as for `extract.extract`. Raises MediaError if there is no such cluster or device.
    """
    ray, tally = import_ray(), Tally(progress)
    if encoders.device not in DEVICES:
        raise MediaError(f"device {encoders.device!r} with Ray, which assigns GPUs itself: use {', '.join(DEVICES)}")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray)
    try:
        gpu = encoders.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        if encoders.device == "cuda" and not gpu:
            raise MediaError("device 'cuda' is not available: the Ray cluster has no GPU")
        encoders = replace(
            encoders,
            device="cuda" if gpu else "cpu",
            visual_weights=_absolute(encoders.visual_weights),
            audio_weights=None if encoders.audio_weights is None else _absolute(encoders.audio_weights),
        )
        task = ray.remote(
            num_cpus=1,
            num_gpus=int(gpu),
            max_retries=RETRIES,
            max_calls=0,  # workers are reused, with their encoders loaded
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": {OWN_DEVICES: "1"}} if gpu else None,
        )(_task)
        settled = Path(output).absolute(), sampling, encoders, settings
        _run(ray, task, sources, settled, tally, until)
    finally:
        if ours:
            ray.shutdown()
    return tally.record()


def _connect(ray: Any) -> None:
    """Connects to a cluster, or starts one on this machine, without Ray's terminal output."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry from a cluster started here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a deprecation warning
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:  # no cluster, another Ray version, an invalid address
        raise MediaError(f"no Ray cluster: {' '.join(str(error).split())}") from error


def _run(
    ray: Any, task: Any, sources: Sequence[Source], settled: tuple, tally: Tally, until: Callable[[], bool]
) -> None:
    """Keeps a bounded number of tasks in flight until every source is done, or `until` returns True."""
    left = iter(sources)
    running: dict[Any, Source] = {}
    try:
        while not until():
            room = max(2, round(2 * ray.cluster_resources().get("CPU", 0)))  # machines may have joined
            for source in itertools.islice(left, max(0, room - len(running))):
                running[task.remote(replace(source, path=source.path.absolute()), *settled)] = source
            if not running:
                return
            ended, _ = ray.wait(list(running), timeout=LOOK)
            for one in ended:
                source = running.pop(one)
                try:
                    how, reason = ray.get(one)
                except ray.exceptions.RayError as error:
                    how, reason = "failed", _lost(ray, source, error)
                if how == "failed":
                    tally.failed(source, reason)
                else:
                    tally.ended(source, how)
    finally:
        for one in running:
            ray.cancel(one)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)  # so that none leaves a temporary file


def _task(
    source: Source, output: Path, sampling: Sampling, encoders: Encoders, settings: dict[str, Any]
) -> tuple[str, str]:
    """Returns ("done" or "skipped", "") or ("failed", reason). Does not raise: not all exceptions can be pickled."""
    try:
        if encoders.device == "cuda":
            encoders = replace(encoders, device=_lent())
        return extract_one(source, output, sampling, *_loaded(encoders), settings), ""
    except Exception as error:  # report a failing video and continue with the others
        return "failed", reason_of(source.path, error)


@functools.cache
def _loaded(encoders: Encoders) -> tuple[VisualEncoder, AudioEncoder | None]:
    """Loads the encoders once per worker process and GPU."""
    return encoders.load()


def _lent() -> str:
    """Torch's name for the GPU that Ray assigned to this task.

    CUDA reads CUDA_VISIBLE_DEVICES only at initialisation, but a reused worker may be assigned another GPU. OWN_DEVICES
    therefore keeps Ray from hiding GPUs from its workers.
    """
    (lent,) = import_ray().get_runtime_context().get_accelerator_ids()["GPU"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(lent) if visible else lent}"


def _lost(ray: Any, source: Source, error: Exception) -> str:
    """One-line reason why a task was lost."""
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return (
            f"{source.path}: its worker process died, {RETRIES + 1} times over: the video crashes the decoder or an "
            "encoder, or takes more memory than there is; Ray's logs on that machine may say more"
        )
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]  # a traceback ends with its cause
    return f"{source.path}: {type(error).__name__}: {line}"


def _absolute(weights: str) -> str:
    """Makes a weights path absolute, for workers with another working folder; leaves names and URLs unchanged."""
    return weights if weights in ("openai", "random") or "://" in weights else str(Path(weights).absolute())
