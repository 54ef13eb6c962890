"""A video of hours, made in seconds: a minute is encoded, and its packets are told again and again."""

from fractions import Fraction
from pathlib import Path

import numpy as np

SOUND = 8000  # samples a second


def make_long_video(path: Path, seconds: int) -> Path:
    """A small picture a second, dark but for the last tenth of each minute, and a hum.

    A Matroska file: MPEG-4 pictures, each minute from a key frame on, and 8-bit sound in packets of one second.
    """
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=1)
        video.width, video.height, video.pix_fmt, video.gop_size = 64, 48, "yuv420p", 25
        sound = out.add_stream("pcm_u8", rate=SOUND, layout="mono")
        levels = np.full(60, 30)
        levels[-6:] = 220
        pictures = []
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            frame.pts = i
            pictures += [(p.pts, bytes(p), p.is_keyframe) for p in video.encode(frame)]
        pictures += [(p.pts, bytes(p), p.is_keyframe) for p in video.encode(None)]
        second = np.where(np.arange(SOUND) // 8 % 2, 96, 160).astype(np.uint8).tobytes()
        for start in range(0, seconds, 60):
            for at, data, key in pictures:
                out.mux(_packet(av, second, sound, start + at, True))
                out.mux(_packet(av, data, video, start + at, key))
    return path


def _packet(av, data: bytes, stream, at: int, key: bool):
    packet = av.Packet(data)
    packet.stream, packet.pts, packet.dts = stream, at, at
    packet.time_base, packet.duration, packet.is_keyframe = Fraction(1), 1, key
    return packet
