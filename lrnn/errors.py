"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Bad input: the message names the thing, its value and what would be right.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
