"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: arguments, config, files.

    The message is one line: what was given, what is allowed, what to do. The command line prints
    it once, without a traceback, and every rank exits with code 2.
    """

    raised_on_all_ranks = False
