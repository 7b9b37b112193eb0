"""The one exception of bad input: its message is all a user needs to read."""

LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """Bad input. One line that names the input and says what was expected.

    The command line prints it and exits with code 2, so a message that was quoted from elsewhere is folded
    into one line here, and what is longer than a page is cut in its middle.
    """

    def __init__(self, message: str):
        line = " ".join(str(message).splitlines())
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} [...] {line[-half:]}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, to be quoted in an InputError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__


class Cancelled(Exception):
    """A call that `on_step` has stopped."""
