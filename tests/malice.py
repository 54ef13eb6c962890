"""What a malicious pickle is made of."""


class Call:
    """Unpickling this calls the function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
