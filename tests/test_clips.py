"""The real clips: wrong durations in their containers, six and seven channels of sound."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from standins import AXES, WIDTH, overlap
from test_cli import call

from avadclip_fast.media import decode
from avadclip_fast.media.features import Sampling, video_features

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clips(shared):
    found = sorted((shared / "data" / "clips").glob("*.mp4"))
    assert len(found) == 16
    return {path.stem: path for path in found}


class Mean:
    """The mean colour, repeated; of sound, how loud it is."""

    size, width, rate = 224, 3, decode.RATE

    def __call__(self, given):
        if isinstance(given, torch.Tensor):
            return given.float().mean((2, 3))
        return torch.from_numpy(np.sqrt((given[:] ** 2).mean(1)))[:, None].expand(-1, 3)


def test_all_decode_and_sound_stands_by_its_frame(clips):
    for name, path in clips.items():
        with av.open(str(path)) as container:
            times = np.array([frame.time for frame in container.decode(video=0)])
        times -= times[0]
        found = video_features(path, Sampling(), Mean(), Mean())
        n = max(1, len(times) // 16)
        assert found.visual.shape == (1, n, 3) and found.audio.shape == (n, 3), name
        np.testing.assert_allclose(found.times, times[::16][:n], atol=1e-9, err_msg=name)
        # the sound is cut where the frames are: a window's first sample is within a frame of its picture
        frame = float(np.median(np.diff(times)))
        sound = decode.read_sound(path)
        # the recordings' sound ends up to 0.2 s before their last frame
        assert -0.2 < len(sound.samples) / decode.RATE - times[-1] < 0.2, name
        windows = sound.windows(found.times, found.seconds)
        assert np.abs(windows.starts / decode.RATE - found.times).max() <= frame, name
        assert found.heard.mean() > 0.5, name


def cut_copy(path, target, seconds):
    """The first seconds of a file, its packets as they are."""
    with av.open(str(path)) as given, av.open(str(target), "w") as made:
        streams = {s.index: made.add_stream_from_template(s) for s in (*given.streams.video, *given.streams.audio)}
        for packet in given.demux(*(given.streams[i] for i in streams)):
            if packet.dts is not None and packet.dts * packet.time_base < seconds:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
    return target


@pytest.mark.parametrize("name", ["explosion2", "fighting1", "n1"])
def test_a_video_cut_in_two_gives_the_same_features_up_to_the_cut(clips, tmp_path, name):
    whole = video_features(clips[name], Sampling(), Mean(), Mean())
    half = whole.times[len(whole.times) // 2] + 1e-3
    cut = video_features(cut_copy(clips[name], tmp_path / "cut.mkv", half), Sampling(), Mean(), Mean())
    n = len(cut.times) - 2  # the last pictures wait for packets that were cut off
    assert n >= len(whole.times) // 2 - 3 and n >= 1
    np.testing.assert_array_equal(cut.visual[:, :n], whole.visual[:, :n])
    # 1e-3: the copy's times are whole milliseconds, which moves a window by a few samples
    np.testing.assert_allclose(cut.audio[:n], whole.audio[:n], atol=1e-3)


SCENES = {"n1": 0, "fighting1": 1, "n2": 0, "explosion1": 2, "n3": 0}


class Gallery:
    """Knows scenes: a frame becomes the direction of what its nearest picture shows, as CLIP's would lie near it."""

    size, width = 32, WIDTH
    pictures, axes = None, None

    def __init__(self, device):
        pass

    def __call__(self, images):
        rows = images.float().flatten(1)
        return 10 * AXES[self.axes[torch.cdist(rows, self.pictures).argmin(1)]]


def pictures(path, count):
    """Some frames of a clip, 96 x 72."""
    frames = list(decode.snippet_frames(path, every=1))[:count]
    return [np.array(Image.fromarray(frame.image).resize((96, 72))) for frame in frames]


def test_detect_finds_known_spans_in_a_composed_real_video(clips, pair, tmp_path, monkeypatch):
    """Five clips, one after the other, of which two show something: models that know the scenes find where."""
    from avadclip_fast.media.crops import cut

    film, per = tmp_path / "film.mkv", 50
    known, axes, spans = [], [], {}
    with av.open(str(film), "w") as made:
        stream = made.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 72, "yuv420p", 2_000_000
        for i, (name, axis) in enumerate(SCENES.items()):
            images = pictures(clips[name], per)
            assert len(images) == per
            for image in images:
                made.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            known += [cut(image, side=32)[0].float().flatten() for image in images[1::5]]
            axes += [axis] * len(images[1::5])
            if axis:
                spans[["normal", "fighting", "explosion"][axis]] = (i * per / 25, (i + 1) * per / 25)
        made.mux(stream.encode(None))
    monkeypatch.setattr(Gallery, "pictures", torch.stack(known))
    monkeypatch.setattr(Gallery, "axes", torch.tensor(axes))
    options = ["--every", "5", "--visual-encoder", "test_clips:Gallery", "--audio-encoder", "standins:Hearing"]
    assert call("detect", film, "-m", pair, "-o", tmp_path, *options, "--no-plot", "-q") == 0
    found = json.loads((tmp_path / "film.json").read_text())["events"]
    assert [event["class"] for event in found] == list(spans)
    for event in found:
        assert overlap((event["start"], event["end"]), *spans[event["class"]]) >= 0.5, event
