"""Options as data: every field of a config says what it means and what is allowed, and is checked where the config is made.

    @dataclass(frozen=True)
    class PruningConfig(Options):
        criterion: str = option("wanda", "What decides which weights go.", choices=CRITERIA)

The command line, the keys of records and the columns of tables are made from these fields; see `recon.study.spec`.
"""

import math
from collections.abc import Collection
from dataclasses import Field, field, fields

from recon.errors import ReconError

NAMES = tuple[str, ...]


def option(
    default: object,
    help: str,
    *,
    choices: Collection[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    flag: str = "",
):
    """A field of a config. Its type is bool, int, float, str, `str | None` or `NAMES`.

    Args:
        help: what it means, in a sentence or two.
        choices: allowed names; of a mapping, its keys.
        least, most, above: bounds of a number: from `least`, to `most`, larger than `above`.
        flag: the name that users give the option by, where it is not the field's.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": (least, most, above), "flag": flag})


class Options:
    """Base of the configs, which are frozen dataclasses of `option`s: checks every value when one is made."""

    def __post_init__(self):
        for each in fields(self):
            if each.metadata:  # else it is a config itself
                object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))


def checked(each: Field, value: object) -> object:
    """`value` as the option `each` stores it: numbers as floats where it is one, names as a tuple.

    Raises `ReconError` naming the option, the value and what is allowed.
    """
    if each.type == NAMES and isinstance(value, str):
        value = (value,)
    if not _fits(each, value):
        raise ReconError(f"{flag(each)} is {value!r}; allowed: {allowed(each)}")
    return {float: float, NAMES: tuple}.get(each.type, lambda same: same)(value)


def flag(each: Field) -> str:
    """The name that users give the option by."""
    return each.metadata["flag"] or each.name


def allowed(each: Field) -> str:
    """What an option may be, in words."""
    if each.metadata["choices"]:
        return ", ".join(each.metadata["choices"])
    least, most, above = each.metadata["bounds"]
    within = "".join(
        f" {word} {bound:g}" for word, bound in (("from", least), ("above", above), ("to", most)) if bound is not None
    )
    kinds = {bool: "True, False", int: "a whole number", float: "a number", str: "text", NAMES: "a list of names"}
    return kinds.get(each.type, "text, None") + within


def _fits(each: Field, value: object) -> bool:
    if each.type in (int, float):
        least, most, above = each.metadata["bounds"]
        return (
            isinstance(value, int | each.type)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (least is None or value >= least)
            and (most is None or value <= most)
            and (above is None or value > above)
        )
    if each.type == NAMES:
        return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    choices = each.metadata["choices"]
    return isinstance(value, each.type) and (not choices or value in choices)
