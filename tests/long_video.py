"""A video of hours, made in seconds: a minute is encoded, and its packets are told again and again."""

from pathlib import Path

import numpy as np


def make_long_video(path: Path, seconds: int, rate: int = 25, sample_rate: int = 16_000, loop: int = 60) -> Path:
    """A small picture, dark but for the last tenth of each loop, and a hum; `loop` seconds, until `seconds`.

    A Matroska file: MPEG-4 pictures, each loop from a key frame on, and 8-bit sound in packets of one second.
    """
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt, video.gop_size = 64, 48, "yuv420p", 25
        sound = out.add_stream("pcm_u8", rate=sample_rate, layout="mono")
        levels = np.full(loop * rate, 30)
        levels[-loop * rate // 10 :] = 220
        pictures = []
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            frame.pts = i
            pictures += [(p.pts, bytes(p), p.is_keyframe) for p in video.encode(frame)]
        pictures += [(p.pts, bytes(p), p.is_keyframe) for p in video.encode(None)]
        second = np.where(np.arange(sample_rate) // 8 % 2, 96, 160).astype(np.uint8).tobytes()
        for start in range(0, seconds, loop):
            for at, data, key in pictures:
                if at % rate == 0:
                    out.mux(_packet(av, second, sound, start + at // rate, 1, True))
                out.mux(_packet(av, data, video, start * rate + at, rate, key))
    return path


def _packet(av, data: bytes, stream, at: int, rate: int, key: bool):
    from fractions import Fraction

    packet = av.Packet(data)
    packet.stream, packet.pts, packet.dts = stream, at, at
    packet.time_base, packet.duration, packet.is_keyframe = Fraction(1, rate), 1, key
    return packet
