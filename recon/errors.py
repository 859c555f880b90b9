"""The one exception that user mistakes raise."""


class ReconError(ValueError):
    """Bad input: the message names the culprit, the value given, and what is allowed."""
