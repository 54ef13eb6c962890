"""Errors that users can act on."""

LONGEST = 2000  # characters of a message, which quotes files: a line of one that is no list may have millions


class DataError(ValueError):
    """Invalid user data; the message names the file, the row and the remedy."""

    def __init__(self, message: object):
        super().__init__(shortened(str(message)))


class LabelError(DataError):
    """A label that is invalid for the class codes."""


def shortened(message: str) -> str:
    """A message, cut in the middle if too long: the file and row at its start and the remedy at its end stay."""
    half = LONGEST // 2 - 3
    return message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half:]}"
