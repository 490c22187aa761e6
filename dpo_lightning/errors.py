"""The one error that is the user's to mend."""


class UsageError(ValueError):
    """A mistake in what was asked for: data, a path, a setting.

    Its message says what is wrong, where, what was expected and what to do; the command line prints it without a
    traceback.
    """
