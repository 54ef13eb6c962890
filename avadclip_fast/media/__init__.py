"""Video files to features, scores and events. Requires PyAV: pip install "avadclip_fast[media]"."""

from .errors import MediaError

__all__ = ["MediaError"]
