"""Errors of video files."""

from ..data import DataError


class MediaError(DataError):
    """A video cannot be used; the message names the file, the reason and the remedy."""


def import_av():
    """Imports PyAV. Raises MediaError if it is not installed, or lacks what it needs."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise MediaError(
            'videos are read by PyAV, which is not installed: pip install "avadclip_fast[media]"'
        ) from error
    except ImportError as error:  # such as a library that is not there, or memory to load it
        raise MediaError(f"videos are read by PyAV, which cannot be imported: {error}") from error
    return av
