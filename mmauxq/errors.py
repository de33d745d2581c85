"""The one exception that means "the user can mend this"."""


class UsageError(ValueError):
    """Something that was asked for is wrong, and the message says how.

    The message is one line: what came, what was allowed, where. The programs
    in ``tools/`` print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, for a reason outside of what was asked for.

    Numbers that are not finite, a full disk, a data loader that died: the
    message is one line and says what and where. The programs in ``tools/``
    print it without a traceback and exit with status 1.
    """
