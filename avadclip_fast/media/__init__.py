"""From a video file to features, scores and events. Needs PyAV: pip install "avadclip_fast[media]"."""

from .errors import MediaError

__all__ = ["MediaError"]
