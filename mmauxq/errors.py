"""The one exception that means "the user can mend this"."""


class UsageError(ValueError):
    """Something that was asked for is wrong, and the message says how.

    The message is one line: what came, what was allowed, where. The programs
    in ``tools/`` print it without a traceback and exit with status 2.
    """
