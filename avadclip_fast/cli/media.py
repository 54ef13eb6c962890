"""Commands for videos: extract, detect and stream."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from tqdm import tqdm
from typer import Argument, Option

from ..data import DataError, pack
from ..data.atomic import make_folder, write_json
from ..data.errors import printable, without_login
from ..data.lists import video_of
from ..data.lists import videos as by_video
from ..data.packed import PACKED
from ..device import device_of
from ..engine.progress import bar, frames_in
from .commands import Device, Quiet, Root, app, sized

if TYPE_CHECKING:  # imported when a command runs, so that other commands start fast and without PyAV
    from ..engine.detect import Event, Scorer
    from ..engine.search import Found
    from ..media.encoders import AudioEncoder, Encoders, VisualEncoder
    from ..media.extract import Listing
    from ..media.features import Sampling
    from ..media.live import LiveSource


LONG_SNIPPET = 1.5  # seconds: twice those of XD-Violence's videos, of 24 frames a second

Every = Annotated[
    int | None,
    Option(
        "--every", min=1, callback=sized, help="Frames per snippet: 16 (default) for XD-Violence, 4 for CCTV-Fights."
    ),
]
Fps = Annotated[float | None, Option(min=0.01, help="Snippets per second, instead of --every.", show_default=False)]
GeometryName = Annotated[
    Literal["crops", "clip"], Option(help="crops: parts of 340x256; clip: CLIP's own resize and centre.")
]
Visual = Annotated[str, Option(help="clip, or module:factory.")]
VisualWeights = Annotated[str, Option(help="openai (downloaded), random (tests), or a path.")]
Audio = Annotated[str, Option(help="wav2clip, module:factory, or none to leave the sound out.")]
AudioWeights = Annotated[
    str | None, Option(help="Path of Wav2CLIP.pt, https://...#sha256=..., or random (tests).", show_default=False)
]
Model = Annotated[Path, Option("--model", "-m", help="A run, a model folder, or a folder of teacher/ and student/.")]
Student = Annotated[
    Path | None, Option(help="A student beside a teacher, for parts without sound.", show_default=False)
]
Names = Annotated[
    str | None,
    Option(
        "--classes",
        help='Names to look for in place of the model\'s own, normal first: "normal,brawl" or "A=normal,B1=brawl".',
        show_default=False,
    ),
]
Threshold = Annotated[
    float | None,
    Option(
        min=0.0,
        max=1.0,
        help="Score (0-1) from which a snippet is an alarm. Default: the calibrated threshold saved with the model, "
        "or 0.5 if it has none.",
        show_default=False,
    ),
]


def encoders(visual: str, visual_weights: str, audio: str, audio_weights: str | None, device: str) -> "Encoders":
    """Returns the chosen encoders; module:factory is also searched in the current folder."""
    from ..media.encoders import Encoders

    if audio == "none" and audio_weights is not None:
        raise DataError(f"--audio-weights {audio_weights}: --audio-encoder none takes none: leave one of the two out")
    return Encoders(visual, visual_weights, audio, audio_weights, device, os.getcwd())


def frames_per_snippet(every: int | None, fps: float | None) -> int:
    """Returns --every or its default. Raises DataError if --fps is given too."""
    if every is not None and fps is not None:
        raise DataError(f"--every {every} and --fps {fps:g} both say how long a snippet is: give one of them")
    return 16 if every is None else every


def have_no(count: int) -> str:
    return "has no" if count == 1 else "have no"


def lost_frames(count: int) -> str:
    return f"damaged: {count} frame{'s' if count > 1 else ''} could not be decoded"


def watchers(
    model: Path, student: Path | None, classes: str | None, chosen: "Encoders"
) -> "tuple[list[Scorer], VisualEncoder, AudioEncoder | None]":
    """Loads the models, and the encoders that they need (no audio encoder if no model takes audio)."""
    from ..engine.detect import load_scorers

    names = [] if classes is None else [name.rpartition("=")[2] for name in classes.split(",")]
    scorers = load_scorers(model, student, names)
    hears = "audio" in scorers[0].model.streams()
    return scorers, *(chosen if hears else replace(chosen, audio="none")).load()


def note(told: str) -> None:
    tqdm.write(f"note: {printable(told)}", file=sys.stderr)


def note_threshold(scorers: "list[Scorer]", threshold: float | None) -> None:
    """Notes on stderr that an alarm begins at 0.5 if a model was not calibrated.

    Such are official .pth files and runs without held-out videos: --select last or test without --held-out-list.
    """
    from ..engine.calibrate import Calibration

    missing = [scorer.calibration for scorer in scorers if scorer.calibration == Calibration()]
    if threshold is None and missing:
        of = (
            "the models have" if len(missing) > 1 else "the model has" if len(scorers) == 1 else "one of the models has"
        )
        default = missing[0].align.threshold
        note(f"{of} no calibrated threshold; using {default} (--threshold sets another)")


def tell_extracted(path: Path, record: dict[str, list], listing: "Listing") -> None:
    """Tells what became of the videos: `record` of this call, and `listing` of the list `path`."""
    rows, damaged, others, options = listing
    typer.echo(f"{len(record['done'])} extracted, {len(record['skipped'])} were there, {len(record['failed'])} failed")
    if rows:
        typer.echo(f"wrote {path}: {len(rows)} rows")
    if rows and others:
        were = f"{others} video{'s were' if others > 1 else ' was'}"
        typer.echo(
            f"{were} extracted with other settings ({', '.join(sorted(options))}) and left out of the list: "
            "extract all videos with the same, or give another folder with --output"
        )
    for name, frames in damaged.items():
        typer.echo(f"{printable(name)}: {lost_frames(frames)}")
    for failure in record["failed"]:
        typer.echo(f"failed: {printable(failure['reason'])}", err=True)


def tell_silent(silent: list[str], videos: int) -> None:
    """Tells which of so many videos have no sound, and what can be trained on them."""
    remove = "remove these rows, or " if len(silent) < videos else ""
    typer.echo(
        f"{len(silent)} of {videos} videos {have_no(len(silent))} sound ({first_ten(silent)}): a teacher needs sound "
        f"for every row; {remove}train a student on its own (train --student)"
    )


def first_ten(names: list[str]) -> str:
    return printable(", ".join(names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@app.command()
def extract(
    videos: Annotated[list[Path], Argument(help="Videos, folders of them, or lists (.csv with path,label, or .txt).")],
    output: Annotated[
        Path, Option("--output", "-o", help="A folder; NAME.safetensors packs the folder NAME too.", show_default=False)
    ],
    every: Every = None,
    fps: Fps = None,
    crops: Annotated[int, Option(help="1 (the centre), 5 positions, or 10 with their mirror images.")] = 1,
    geometry: GeometryName = "crops",
    visual_encoder: Visual = "clip",
    visual_weights: VisualWeights = "openai",
    audio_encoder: Audio = "wav2clip",
    audio_weights: AudioWeights = None,
    label: Annotated[
        str, Option(help="Label for videos that have none in a list or file name, e.g. A (normal).", show_default=False)
    ] = "",
    root: Root = None,
    shard: Annotated[str | None, Option(help="i/n: the i-th of n equal parts.", show_default=False)] = None,
    workers: Annotated[
        int,
        Option(
            min=1,
            callback=sized,
            help="Videos decoded at once by threads; ray decodes as many as its cluster has room for.",
        ),
    ] = 2,
    engine: Annotated[
        Literal["threads", "ray"], Option(help="threads of this machine, or the machines of a ray cluster.")
    ] = "threads",
    full: Annotated[bool, Option("--float32", help="Keep float32, in twice the space of float16.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace features made with other settings, or of another video.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Extract features from videos: a visual file per crop, an audio file, and list.csv, as train and eval read them.

    Resumes an interrupted call. Videos extracted before take the label of a new list or --label, unless one was typed
    into list.csv; --label does not replace a list's. Videos that fail are reported at the end and in extract.json,
    and the exit code is 1. After Ctrl-C, list.csv has the finished videos.
    """
    from ..engine import report
    from ..engine.stop import Stopped, listening
    from ..media import cluster
    from ..media import extract as media
    from ..media.crops import COUNTS
    from ..media.errors import import_av
    from ..media.features import Sampling

    import_av()  # report a missing package once, not for every video
    every = frames_per_snippet(every, fps)
    if engine == "ray":
        cluster.import_ray()
    if crops not in COUNTS or (geometry == "clip" and crops != 1):
        raise DataError(f"--crops {crops}: 1, 5 or 10; and 1 alone with --geometry clip")
    packed, folder = (output, output.with_suffix("")) if output.suffix == PACKED else (None, output)
    sources, failed = media.find_sources(videos, label, root)
    if shard is not None:
        sources = media.shard(sources, shard)
    if not sources and not failed:
        raise DataError(f"{videos[0]}: no videos there (known are {', '.join(media.SUFFIXES)})")
    log = folder / ("extract.json" if shard is None else f"extract-{shard.replace('/', '-of-')}.json")
    media.check_results(videos, sources, [folder / "list.csv", log, output])
    make_folder(folder)
    media.remove_unfinished(folder, sources)
    sampling = Sampling(every, fps, crops, geometry)
    chosen = encoders(visual_encoder, visual_weights, audio_encoder, audio_weights, device)
    settings = media.settings_of(sampling, not full, chosen)
    media.read_labels(folder)  # to fail early
    if not overwrite:
        media.check_replaced(sources, folder, settings)
    media.check_names(sources, folder, settings)
    by_ray = engine == "ray"
    # also loaded here with ray, so that their errors are reported once, not for every video
    seen, heard = (replace(chosen, device="cpu") if by_ray else chosen).load()
    with bar(total=len(sources), desc="extracting", unit="video", shown=not quiet) as meter, listening() as request:

        def ended(_: str) -> None:
            meter.update()

        def until() -> bool:
            return request.number is not None

        if by_ray:
            # Ray reports dead workers on standard output; the failure of the video is reported below
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                record = cluster.extract(sources, folder, sampling, chosen, settings, ended, until)
        else:
            decoded = frames_in(meter)
            record = media.extract(sources, folder, sampling, seen, heard, settings, workers, ended, until, decoded)
    record["failed"] = failed + record["failed"]
    write_json(log, record)
    listing = media.write_lists(folder, settings)
    tell_extracted(folder / "list.csv", record, listing)
    if request.number is not None:
        raise Stopped(request.number, "what is done stays, and the same call goes on from there")
    groups = by_video(listing.rows)
    silent = [str(video_of(rows[0]).relative_to(folder / "visual")) for rows in groups if not rows[0].audio]
    mixed = packed is not None and 0 < len(silent) < len(groups)
    if silent and heard is not None and not mixed:
        tell_silent(silent, len(groups))
    if unlabelled := sum(not rows[0].label for rows in groups):
        videos_have = f"{unlabelled} video{'s' if unlabelled > 1 else ''} {have_no(unlabelled)}"
        typer.echo(f"{videos_have} label: call again with --label, or give a list")
    if mixed:
        typer.echo(
            f"{packed} was not written: it holds the sound of all videos or of none, and there is none of "
            f"{first_ten(silent)}. Remove their lines from {folder / 'list.csv'}, or leave all sound out by "
            f"--no-audio, and call `avadclip-fast pack {folder / 'list.csv'} -o {packed}`",
            err=True,
        )
    elif packed is not None and listing.rows:
        progress = None if quiet else report.bar("packing", "block")
        pack(packed, listing.rows, 256, seen.width, audio=not silent, dtype=settings["dtype"], progress=progress)
        typer.echo(f"wrote {packed}")
    if record["failed"] or mixed:
        raise typer.Exit(1)


def tell_found(path: Path, found: "Found", sampling: "Sampling") -> None:
    """Tells what was found in the video `path`, and notes what of it was lost or may be."""
    from ..engine.detect import summary

    tqdm.write(summary(found.detection))
    if found.damaged:
        note(f"{path}: {lost_frames(found.damaged)}")
    if sampling.fps is None and (lasts := found.detection.seconds) > LONG_SNIPPET:
        told = f"a snippet of {sampling.every} frames lasts {lasts:.1f} s, and short events are lost in it"
        note(f"{path}: {told}: give --fps 1.5, or a smaller --every")


def tell_searched(events: Path | None, left: list[Path], failed: list[str]) -> None:
    """Tells, at the end of a search, which file was written, which were not, and what failed."""
    if events is not None:
        typer.echo(f"wrote {events}")
    if left:
        shown = f"{left[0]} and {len(left) - 1} more" if len(left) > 1 else left[0]
        note(f"not written again, and still of an earlier call: {shown}")
    for reason in failed:
        typer.echo(f"failed: {printable(reason)}", err=True)


@app.command()
def detect(
    videos: Annotated[
        list[Path], Argument(help="Videos, folders of them, or lists (.csv with a path column, or .txt).")
    ],
    model: Model,
    student: Student = None,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder of the results; searched for videos only if given itself.")
    ] = Path("detections"),
    classes: Names = None,
    threshold: Threshold = None,
    root: Root = None,
    every: Every = None,
    fps: Fps = None,
    geometry: GeometryName = "crops",
    visual_encoder: Visual = "clip",
    visual_weights: VisualWeights = "openai",
    audio_encoder: Audio = "wav2clip",
    audio_weights: AudioWeights = None,
    plot: Annotated[bool, Option(help="Draw curve, events and key frames of each video.")] = True,
    copy: Annotated[bool, Option("--annotate", help="Write NAME.mkv: the video with curve and events drawn.")] = False,
    per_frame: Annotated[bool, Option("--per-frame", help="Write NAME.frames.csv: scores of every frame.")] = False,
    resume: Annotated[
        bool, Option("--resume", help="Skip videos that a call with these models and options has finished.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Find events in videos: OUTPUT/NAME.json, OUTPUT/NAME.png and OUTPUT/events.csv, with time codes.

    The teacher scores parts with sound; the student, if given, scores parts without, which are reported. Videos that
    fail are reported at the end, and the exit code is 1. --every must match the snippets that the model was trained on.
    events.csv grows with each video, and keeps the events that earlier calls found in other videos.
    """
    from ..engine.search import Results, illustrate, search, settings_of, sort_events, write_events
    from ..engine.stop import Request, Stopped, listening
    from ..media.errors import import_av
    from ..media.extract import find_sources, reason_of
    from ..media.extract import settings_of as features_settings
    from ..media.features import Sampling

    import_av()
    if per_frame and fps is not None:
        raise DataError("--per-frame goes with --every: with --fps, snippets do not count frames")
    every = frames_per_snippet(every, fps)
    sources, unread = find_sources(videos, root=root, output=output)
    failed = [one["reason"] for one in unread]
    if not sources and not failed:
        raise DataError(f"{videos[0]}: no videos there")
    results = Results(output, plot, copy, per_frame)
    results.prepare(videos, sources)
    chosen = encoders(visual_encoder, visual_weights, audio_encoder, audio_weights, device)
    scorers, seen, heard = watchers(model, student, classes, chosen)
    note_threshold(scorers, threshold)
    sampling = Sampling(every, fps, 1, geometry)
    settings = settings_of(scorers, threshold, features_settings(sampling, False, chosen))
    if resume:
        before = {source.name: rows for source in sources if (rows := results.finished(source, settings)) is not None}
        typer.echo(f"finished before: {len(before)} of {len(sources)} videos")
        sources = [source for source in sources if source.name not in before]
        if before:
            write_events(results.events, before)  # where the file has lost them
    meter = bar(sources, desc="detecting", unit="video", shown=not quiet)
    count, request = frames_in(meter), Request()

    def decoded(frames: int = 0) -> None:
        if request.number is not None:
            raise KeyboardInterrupt  # which nothing takes for the failure of a video
        count(frames)

    done = False  # whether a video is
    left: list[Path] = []  # files of an earlier call that this one does not write
    try:
        with listening() as request:
            for source in meter:
                try:
                    older = results.left(source)
                    found = search(
                        source, results, scorers, sampling, seen, heard, settings, device_of(device), threshold, decoded
                    )
                except Exception as error:  # a failing video is reported and does not stop the others
                    failed.append(reason_of(source.path, error))
                    continue
                done = True
                left += older
                tell_found(source.path, found, sampling)
                for target in results.files(source)[1:]:
                    try:
                        if lost := illustrate(target, source, found, sampling, decoded):
                            note(lost)
                    except Exception as error:  # does not drop what was found
                        failed.append(f"{reason_of(source.path, error)} ({target} alone was not written)")
            decoded()
    except KeyboardInterrupt as end:
        found_so_far = f"{results.events} holds what was found so far"
        raise Stopped(request.number or signal.SIGINT, found_so_far if done else "no video was finished") from end
    finally:
        tell_searched(results.events if done else None, left, failed)
        if done:
            sort_events(results.events)
    if failed:
        raise typer.Exit(1)


def note_rate(live: "LiveSource") -> None:
    from ..media.decode import ASSUMED

    lasts = f"{ASSUMED:g} a second are assumed: {live.every} frames last {live.seconds:.2f} s"
    note(f"{live.source}: declares no frame rate, and {lasts} (--fps sets snippets per second)")


def tell_events(live: "LiveSource", events: "Iterable[Event]") -> None:
    """Prints events of a stream, one line of JSON each, with the time of day at which those of a live one began."""
    from ..engine.detect import event_record

    for event in events:
        record = {"source": without_login(str(live.source)), **event_record(event)}
        if live.live and live.began is not None:
            record["clock"] = (live.began + timedelta(seconds=event.start)).isoformat(timespec="milliseconds")
        # not echo: on a terminal, it would write behind the progress bar
        tqdm.write(json.dumps(record), file=sys.stdout)
        sys.stdout.flush()


@app.command()
def stream(
    source: Annotated[
        str, Argument(help="A file, a device (/dev/video0), an rtsp, http, udp or srt address, or - (standard input).")
    ],
    model: Model,
    student: Student = None,
    classes: Names = None,
    threshold: Threshold = None,
    every: Every = None,
    fps: Fps = None,
    window: Annotated[
        int | None,
        Option(
            min=1, callback=sized, help="Context in snippets; default: as many as the model takes.", show_default=False
        ),
    ] = None,
    delay: Annotated[
        int, Option(min=0, callback=sized, help="Snippets to wait for before scoring one (more context, later alarm).")
    ] = 0,
    longest: Annotated[float, Option(min=0.1, help="Report an ongoing event every so many seconds.")] = 10.0,
    retries: Annotated[int, Option(min=0, callback=sized, help="Reconnections in a row before giving up.")] = 8,
    geometry: GeometryName = "crops",
    visual_encoder: Visual = "clip",
    visual_weights: VisualWeights = "openai",
    audio_encoder: Audio = "wav2clip",
    audio_weights: AudioWeights = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Watch a stream: print one line of JSON per event to standard output when it ends.

    Snippets that cannot be scored in time are dropped and counted. Lost connections are reopened. Ctrl-C prints the
    open event and exits.
    """
    from ..engine.detect import PAUSE
    from ..engine.online import OnlineDetector
    from ..engine.stop import Stopped, listening
    from ..media.errors import import_av
    from ..media.live import LiveSource

    import_av()
    every = frames_per_snippet(every, fps)
    chosen = encoders(visual_encoder, visual_weights, audio_encoder, audio_weights, device)
    scorers, seen, heard = watchers(model, student, classes, chosen)
    detector: OnlineDetector | None = None
    by = ""
    pushed, connected = 0.0, 0  # when the last snippet was, and the connections lost until then

    def until() -> bool:
        """Polled while waiting for a snippet: ends the events of a lost camera, which may be away for days."""
        if detector is not None and live.reconnects > connected and time.monotonic() - pushed > PAUSE + live.seconds:
            tell_events(live, detector.flush())
        return request.number is not None

    with listening() as request, bar(unit="snippet", shown=not quiet) as meter:
        live = LiveSource(source, every, fps, retries, until)
        try:
            for snippet in live:
                if detector is None:
                    note_threshold(scorers, threshold)  # after errors about the source
                    if live.assumed:
                        note_rate(live)
                    detector = OnlineDetector(
                        scorers, seen, heard, seconds=live.seconds, window=window, delay=delay, longest=longest,
                        threshold=threshold, geometry=geometry, device=device_of(device),
                    )  # fmt: skip
                tell_events(live, detector.push(snippet.image, snippet.sound, snippet.time, snippet.seconds))
                pushed, connected = time.monotonic(), live.reconnects
                if detector.by != by and not quiet:
                    by = detector.by
                    tqdm.write(f"{snippet.time:.1f} s: scored by the {by}", file=sys.stderr)
                state = {"score": f"{detector.score:.2f}", "dropped": live.dropped, "reconnects": live.reconnects}
                meter.set_postfix(state, refresh=False)
                meter.update()
        finally:
            if detector is not None:
                tell_events(live, detector.flush())
                counts = f"{live.frames} frames, {live.dropped} dropped; connected again {live.reconnects} times"
                tqdm.write(counts, file=sys.stderr)
    if request.number is not None:
        raise Stopped(request.number, "the events so far are printed")
