"""What goes wrong with a video file."""

from ..data import DataError


class MediaError(DataError):
    """A video cannot be used; the message names the file, the reason and what to do."""


def import_av():
    """PyAV, or a MediaError that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise MediaError(
            'videos are read by PyAV, which is not installed: pip install "avadclip_fast[media]"'
        ) from error
    return av
