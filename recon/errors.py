"""What users are told: the one exception that their mistakes raise, and the log."""

import importlib.util
import logging

log = logging.getLogger("recon")


class ReconError(Exception):
    """Bad input: the message names the culprit, the value given, and what is allowed."""


def need(module: str, extra: str, what: str) -> None:
    """Raises `ReconError` where `module` is not installed. `what` needs it, and the package's extra `extra` brings it."""
    if importlib.util.find_spec(module) is None:
        raise ReconError(f"{what}: {module} is not installed; in the checkout: pip install -e '.[{extra}]'")
