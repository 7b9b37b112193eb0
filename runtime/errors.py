"""The one exception of bad input: its message is all a user needs to read."""


class InputError(ValueError):
    """Bad input. One line that names the input and says what was expected.

    The command line prints it and exits with code 2, so a message that was quoted from elsewhere is folded
    into one line here.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))
