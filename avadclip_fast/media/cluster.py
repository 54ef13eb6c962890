"""Extraction over a Ray cluster: a task a video, on machines that all see the videos and the output folder.

A task that was lost with its worker or its machine is done again elsewhere. A video that kills whoever decodes it is
given up in the end, and told, like any other that fails.
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
from .extract import Source, Tally, extract_one, failure
from .features import Sampling

RETRIES = 3  # of a video whose worker or machine was lost
LOOK = 0.5  # seconds between two looks at whether to end
PATIENCE = 10.0  # seconds that tasks have to end when they are called off
DEVICES = ("auto", "cpu", "cuda")
OWN_DEVICES = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def import_ray() -> Any:
    """Ray. Raises MediaError where it is not installed."""
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
    """`extract.extract`, over the cluster of RAY_ADDRESS, the one that runs here, or else this machine.

    A video takes a processor, and a GPU where the cluster has any and encoders.device is not cpu. Relative paths are
    those of this process's folder, and must be there on every machine. Raises MediaError where there is no such
    cluster or device.
    """
    ray, tally = import_ray(), Tally(progress)
    if encoders.device not in DEVICES:
        raise MediaError(f"device {encoders.device!r} with Ray, which lends GPUs itself: say {', '.join(DEVICES)}")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray)
    try:
        gpu = encoders.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        if encoders.device == "cuda" and not gpu:
            raise MediaError("device 'cuda' is not to be had: the Ray cluster has no GPU")
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
            max_calls=0,  # a worker that has loaded its encoders goes on with them
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
    """Connects, or starts a cluster of this machine, and keeps Ray's own words off the terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here: it reports to nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning of what Ray will change one day
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:  # nobody there, another version of Ray, a wrong address
        raise MediaError(f"no Ray cluster: {' '.join(str(error).split())}") from error


def _run(
    ray: Any, task: Any, sources: Sequence[Source], settled: tuple, tally: Tally, until: Callable[[], bool]
) -> None:
    """Keeps the cluster busy with a bounded number of tasks until every source has ended, or `until` says to end."""
    left = iter(sources)
    running: dict[Any, Source] = {}
    try:
        while not until():
            room = max(2, round(2 * ray.cluster_resources().get("CPU", 0)))  # machines may join
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
            ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)  # so that none leaves half a file


def _task(
    source: Source, output: Path, sampling: Sampling, encoders: Encoders, settings: dict[str, Any]
) -> tuple[str, str]:
    """What became of a source: ("done" or "skipped", "") or ("failed", reason). Exceptions would not all travel."""
    try:
        if encoders.device == "cuda":
            encoders = replace(encoders, device=_lent())
        return extract_one(source, output, sampling, *_loaded(encoders), settings), ""
    except Exception as error:  # whatever one video did, the others go on, and it is told
        return "failed", failure(source.path, error)["reason"]


@functools.cache
def _loaded(encoders: Encoders) -> tuple[VisualEncoder, AudioEncoder | None]:
    """Once a worker process (and GPU), not once a video."""
    return encoders.load()


def _lent() -> str:
    """The GPU that Ray lends this task, as torch counts them.

    Under OWN_DEVICES Ray hides no GPU from its workers: CUDA heeds CUDA_VISIBLE_DEVICES once, when it starts, but a
    worker that goes on to another video may be lent another GPU.
    """
    (lent,) = import_ray().get_runtime_context().get_accelerator_ids()["GPU"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(lent) if visible else lent}"


def _lost(ray: Any, source: Source, error: Exception) -> str:
    """Why a task did not come back, in a line."""
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return (
            f"{source.path}: its worker process died, {RETRIES + 1} times over: the video crashes the decoder or an "
            "encoder, or takes more memory than there is; Ray's logs on that machine may say more"
        )
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]  # a stack trace ends in its cause
    return f"{source.path}: {type(error).__name__}: {line}"


def _absolute(weights: str) -> str:
    """Weights as a worker elsewhere finds them; names and addresses are left as they are."""
    return weights if weights in ("openai", "random") or "://" in weights else str(Path(weights).absolute())
