"""Errors that users can act on."""


class DataError(ValueError):
    """Invalid user data; the message names the file, the row and the remedy."""


class LabelError(DataError):
    """A label that is invalid for the class codes."""
