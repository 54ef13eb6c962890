"""Errors that users can act on, and what of names and addresses may be told."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LOGIN = re.compile(r"(?<=:/)(/?)[^/\s]+@")  # of an address, in which Path leaves one slash
LONGEST = 2000  # characters of a message, which quotes files: a line of one that is no list may have millions


class DataError(ValueError):
    """Invalid user data; the message names the file, the row and the remedy."""

    def __init__(self, message: object):
        super().__init__(shortened(str(message)))


class LabelError(DataError):
    """A label that is invalid for the class codes."""


def without_login(text: str) -> str:
    """Text whose addresses, such as rtsp://user:password@camera, tell no user and no password."""
    return _LOGIN.sub(r"\1***@", text)


def printable(text: str) -> str:
    """Text as one line, without control characters and logins: a name may hold what steers a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], without_login(text))


def shortened(message: str) -> str:
    """A printable message, cut in the middle if too long: file and row at its start and remedy at its end stay."""
    message = printable(message)
    half = LONGEST // 2 - 3
    return message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half:]}"
