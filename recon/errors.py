"""The one exception that user mistakes raise."""

import importlib.util


class ReconError(Exception):
    """Bad input: the message names the culprit, the value given, and what is allowed."""


def need(module: str, extra: str, what: str) -> None:
    """Raises `ReconError` where `module` is not installed. `what` needs it, and the package's extra `extra` brings it."""
    if importlib.util.find_spec(module) is None:
        raise ReconError(f"{what}: {module} is not installed; in the checkout: pip install -e '.[{extra}]'")
