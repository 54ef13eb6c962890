"""The error a user can act on."""


class DataError(ValueError):
    """Something in the user's files is wrong; the message names the file, the row, and what to do about it."""


class LabelError(DataError):
    """A label that the known class codes cannot express."""
