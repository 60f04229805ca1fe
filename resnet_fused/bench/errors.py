"""The one error that the command line prints without a traceback."""


class Refused(ValueError):
    """What was asked for cannot be done here; the text says what came, what is accepted and what to do."""
