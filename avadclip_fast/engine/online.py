"""Detection in a stream, one snippet at a time, with bounded memory; events are returned when they end."""

import math
from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, cast

import numpy as np
import torch

from ..data import DataError
from ..media.crops import cut
from ..media.decode import GAP, RATE, audible
from ..media.encoders import AudioEncoder, VisualEncoder, encoded
from ..models.encoder import Standardize
from .detect import PAUSE, Event, Scorer, check_widths, deaf_name, event_of, score


class _Pending(NamedTuple):
    """A snippet that was scored, and may be again with more snippets after it."""

    start: float  # seconds
    end: float
    probabilities: np.ndarray  # (C,)
    threshold: float
    sounded: bool  # whether it was scored with sound


class OnlineDetector:
    """Scores the snippets of a stream as they arrive and returns its events.

        detector = OnlineDetector(load_scorers("model"), ClipVisual(), Wav2Clip("Wav2CLIP.pt"), seconds=16 / 25)
        for frame, audio in camera:                  # (H, W, 3) uint8 RGB; (n,) float32 mono at 16 kHz, or None
            for event in detector.push(frame, audio):
                print(event)
        print(*detector.flush())                     # what still goes on at the end

    The context of a snippet is at most the last `window` snippets (default: as many as the model takes), which include
    the snippet itself and the `delay` snippets after it. The teacher scores while there is sound; the student, if
    given, scores after PAUSE seconds without sound. An event is returned when it ends or has lasted `longest` seconds;
    in the latter case the next event starts where it ends. A gap of more than PAUSE seconds in the times ends all
    events and resets the context.

    seconds: duration of a snippet; should match the snippets that the model was trained on. threshold: replaces the
    models' own. geometry: how frames are cut, see `media.crops.cut`.
    Attributes: `by`, the model that scored last; `score`, the last 1 - p(normal).
    Raises DataError if the encoders or the window do not fit the model, delay >= window, or seconds is 0.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        visual: VisualEncoder,
        audio: AudioEncoder | None = None,
        *,
        seconds: float,
        window: int | None = None,
        delay: int = 0,
        longest: float = 10.0,
        threshold: float | None = None,
        geometry: str = "crops",
        device: str | torch.device = "cpu",
    ):
        first = scorers[0].model
        check_widths(first, visual.width, None if audio is None else audio.width)
        self.scorers, self.visual, self.device, self.geometry = list(scorers), visual, device, geometry
        self.audio = audio if "audio" in first.streams() else None
        self.seconds, self.delay, self.longest, self.threshold = seconds, delay, longest, threshold
        self.window = first.length if window is None else window
        if not 1 <= self.window <= first.length:
            raise DataError(f"window must be from 1 to the model's length of {first.length} snippets; got {window}")
        if not seconds > 0:
            raise DataError(f"seconds must be above 0; got {seconds}: a LiveSource knows it with its first snippet")
        if not 0 <= delay < self.window:
            raise DataError(f"delay must be from 0 to less than the window of {self.window} snippets; got {delay}")
        self.samples = round(seconds * RATE)
        # Of a snippet without sound among those with: what no sound at all is to the model, see `Standardize`. Zeros
        # would be loud where sound is all positive.
        self._silence = np.zeros(first.width, np.float32)
        if "audio" in first.standardize:
            self._silence = cast(Standardize, first.standardize["audio"]).mean.float().numpy(force=True)
        self.by, self.score = "", 0.0
        self._time: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._seen: deque = deque(maxlen=self.window)  # visual features (D,) of each snippet
        self._heard: deque = deque(maxlen=self.window)
        self._loudness: deque = deque(maxlen=self.window)  # mean and mean square of each spectrogram, or NaN
        self._sounding = 0  # snippets since the sound began, including pauses
        self._quiet: float | None = None  # start of the first snippet without sound, since the last with
        self._open: list[np.ndarray] = []  # probabilities (C,) of the snippets of the open event
        self._from = self._until = 0.0  # start of its first snippet, end of its last
        self._pending: list[_Pending] = []

    def push(
        self,
        frame: np.ndarray,
        audio: np.ndarray | None = None,
        time: float | None = None,
        seconds: float | None = None,
    ) -> list[Event]:
        """Scores one snippet and returns the events that ended.

        frame: (H, W, 3) uint8 RGB. audio: (n,) float32 mono at 16 kHz, or None without sound; cut to the length of
        a snippet. time: start in seconds, increasing; by default the snippet follows the last one. seconds: its
        duration, if the stream ends within it.
        Raises DataError for a frame or sound of another shape or dtype, for sound twice as long as a snippet (as at
        48 kHz) without a `time`, and for a time before the last one, unless `flush` was called in between. If this, an
        encoder or the model raises, the snippet leaves no trace: push it again, or go on with the next one and its
        time.
        """
        before = {name: copy(value) for name, value in vars(self).items() if name.startswith("_")}
        try:
            return self._pushed(frame, audio, time, seconds)
        except BaseException:
            vars(self).update(before)
            raise

    def _pushed(
        self, frame: np.ndarray, audio: np.ndarray | None, time: float | None, seconds: float | None
    ) -> list[Event]:
        events = []
        frame, audio = np.asarray(frame), None if audio is None else np.asarray(audio)
        self._check(frame, audio, time)
        if time is None:
            time = 0.0 if self._time is None else self._time + self.seconds
        if not math.isfinite(time) or (self._seen and self._time is not None and time < self._time):
            raise DataError(f"times must increase; got {time} after {self._time}: call flush() where they begin anew")
        if self._time is not None and time - self._time > PAUSE + self.seconds:
            events = self.flush()
        self._time = time
        images = cut(frame, 1, self.geometry, self.visual.size)
        self._seen.append(encoded("visual", self.visual, images, 1)[0])
        self._listen(audio, time)
        self._score(time, time + (seconds or self.seconds))
        while len(self._pending) > self.delay:
            events += self._judge(self._pending.pop(0))
        return events

    def _score(self, start: float, end: float) -> None:
        """Scores the newest snippet, and those that are pending anew, now that more snippets after them are known."""
        hears = self._sounding > 0
        scorer = self.scorers[0 if hears else -1]
        rows = min(self._sounding, len(self._seen)) if hears else len(self._seen)
        visual = np.stack(list(self._seen)[-rows:])
        heard = np.stack(list(self._heard)[-rows:]) if hears else None
        probabilities = score(scorer, visual, heard, self.device).probabilities
        self.by = "teacher" if hears else deaf_name(self.scorers)
        self.score = float(1 - probabilities[-1, 0])
        threshold = scorer.calibration.align.threshold if self.threshold is None else self.threshold
        self._pending.append(_Pending(start, end, probabilities[-1], threshold, hears))
        # What sounded stays the teacher's, as in `detect`; only the pause that has turned out to be silence passes to
        # the student.
        since = -np.inf if hears or self._quiet is None else self._quiet
        for i in range(2, min(len(self._pending), rows) + 1):
            one = self._pending[-i]
            if one.start >= since or not one.sounded:
                self._pending[-i] = _Pending(one.start, one.end, probabilities[-i], threshold, hears)

    def _check(self, frame: np.ndarray, audio: np.ndarray | None, time: float | None) -> None:
        """Raises DataError for a frame or sound of another shape or dtype, and for sound of another rate."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise DataError(f"a frame must be (H, W, 3) uint8 RGB; got {frame.shape} {frame.dtype}")
        if audio is None:
            return
        if audio.ndim != 1 or audio.dtype.kind != "f":
            given = f"{audio.shape} {audio.dtype}"
            remedy = "divide int16 samples by 32768, and take the mean of channels"
            raise DataError(f"audio must be (n,) float in [-1, 1]; got {given}: {remedy}")
        # With times, snippets may last longer, as of a camera that takes fewer frames in the dark. GAP: sound comes in
        # blocks, which may be longer than a snippet of few frames.
        if time is None and len(audio) > 2 * self.samples + GAP * RATE:
            holds = f"a snippet of {self.seconds:g} s has {self.samples} at {RATE} Hz"
            remedy = "resample it, or give the time of each snippet if they last longer"
            raise DataError(f"audio has {len(audio)} samples, and {holds}: {remedy}")

    def flush(self) -> list[Event]:
        """Returns the events that are still open and resets the context."""
        events = [event for one in self._pending for event in self._judge(one)]
        if self._open:
            events.append(self._close(self._until))
        self._forget()
        return events

    def _listen(self, audio: np.ndarray | None, time: float) -> None:
        loud = False
        if self.audio is not None and audio is not None:
            samples = np.zeros((1, self.samples), np.float32)
            samples[0, : len(audio)] = audio[: self.samples]
            loud = bool(audible(samples)[0])
            self._heard.append(self._embedded(self.audio, samples))
        else:
            self._heard.append(self._silence)
            self._loudness.append((np.nan, np.nan))  # in step with the window
        self._quiet = None if loud else time if self._quiet is None else self._quiet
        # By the clock, as snippets may be missing; less what rounding adds to the times.
        if self._quiet is None or (self._sounding and time + self.seconds - self._quiet < PAUSE - 1e-6):
            self._sounding += 1
        else:
            self._sounding = 0

    def _embedded(self, encoder: AudioEncoder, samples: np.ndarray) -> np.ndarray:
        """Encodes samples (1, n) into (D,), standardized by the window's statistics if the encoder takes them."""
        if not hasattr(encoder, "statistics"):
            return encoded("audio", encoder, samples, 1)[0]
        mean, std = encoder.statistics(samples)
        self._loudness.append((mean, std**2 + mean**2))
        mean, square = np.nanmean(self._loudness, axis=0)  # all spectrograms have the same size
        statistics = float(mean), float(max(square - mean**2, 0.0)) ** 0.5
        return encoded("audio", encoder, samples, 1, statistics=statistics)[0]

    def _judge(self, one: _Pending) -> list[Event]:
        events = []
        if 1 - one.probabilities[0] >= one.threshold:
            if not self._open:
                self._from = one.start
            self._open.append(one.probabilities)
            self._until = one.end
            if one.end - self._from >= self.longest - 1e-6:
                events.append(self._close(one.end))
        elif self._open:
            events.append(self._close(one.start))
        return events

    def _close(self, end: float) -> Event:
        event = event_of(self._from, end, self.scorers[0].model.classes, np.stack(self._open))
        self._open = []
        return event
