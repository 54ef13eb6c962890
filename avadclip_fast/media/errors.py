"""Errors of video files."""

from ..data import DataError


class MediaError(DataError):
    """A video cannot be used; the message names the file, the reason and the remedy."""


def import_av():
    """Imports PyAV. Raises MediaError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MediaError(
            'videos are read by PyAV, which is not installed: pip install "avadclip_fast[media]"'
        ) from error
    return av
