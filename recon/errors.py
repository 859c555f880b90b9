"""What users are told: the one exception that their mistakes raise, and the log."""

import importlib.util
import logging
import reprlib

log = logging.getLogger("recon")


class ReconError(Exception):
    """Bad input: the message names the culprit, the value given, and what is allowed."""


def check_kind(what: str, value: object, kind: type) -> None:
    """Raises `ReconError` if `value`, what a caller gives as `what`, is not of the class `kind`."""
    if not isinstance(value, kind):
        raise ReconError(f"{what} is {reprlib.repr(value)}, of type {type(value).__name__}; allowed: {kind.__name__}")


def need(module: str, extra: str, what: str) -> None:
    """Raises `ReconError` where `module` is not installed. `what` needs it, and the package's extra `extra` brings it."""
    if importlib.util.find_spec(module) is None:
        raise ReconError(f"{what}: {module} is not installed; in the checkout: pip install -e '.[{extra}]'")
