"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Bad input: the message names the thing, its value and what would be right.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
