"""Options as data: every field of a config says what it means and what is allowed, and is checked where it is made.

    @dataclass(frozen=True)
    class PruningConfig(Options):
        criterion: str = option("wanda", "What decides which weights go.", choices=CRITERIA)

The command line, the keys of records and the columns of tables are made from these fields; see `recon.experiment.config`.
"""

import math
from collections.abc import Collection
from dataclasses import Field, field, fields

from recon.errors import ReconError


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
    """A field of a config.

    choices: allowed values, in names; the keys of a mapping count.
    least, most, above: bounds of a number: from `least`, to `most`, larger than `above`.
    flag: the option's name on the command line and in records, where it is not the field's; see `recon.experiment.config`.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": (least, most, above), "flag": flag})


class Options:
    """Base of the configs, which are frozen dataclasses of `option`s."""

    def __post_init__(self):
        for each in fields(self):
            if not each.metadata:  # a config made of configs
                continue
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))


def checked(each: Field, value: object) -> object:
    """`value` as the field `each` stores it: whole numbers as floats where it is one, lists of names as tuples.

    Raises `ReconError` naming the option, the value and what is allowed.
    """
    name, choices = flag(each), tuple(each.metadata["choices"])
    if each.type in (int, float):
        return _number(name, value, each.type, *each.metadata["bounds"])
    if each.type is bool:
        if not isinstance(value, bool):
            raise ReconError(f"{name} is {value!r}; allowed: True, False")
        return value
    if each.type == tuple[str, ...]:
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise ReconError(f"{name} is {value!r}; allowed: a list of names")
        return tuple(value)
    if choices and value not in choices:
        raise ReconError(f"{name} is {value!r}; allowed: {', '.join(choices)}")
    return value


def flag(each: Field) -> str:
    """The name that users give the option by."""
    return each.metadata["flag"] or each.name


def described(each: Field) -> str:
    """The help of an option, with what is allowed."""
    choices = tuple(each.metadata["choices"])
    return each.metadata["help"] + (f" Allowed: {', '.join(choices)}." if choices else "")


def _number(name: str, value: object, kind: type, least: float | None, most: float | None, above: float | None) -> int | float:
    right = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool) and math.isfinite(value)
    low = least is not None and right and value < least or above is not None and right and value <= above
    if not right or low or (most is not None and value > most):
        bounds = (
            [f"from {least:g}"] * (least is not None)
            + [f"above {above:g}"] * (above is not None)
            + [f"to {most:g}"] * (most is not None)
        )
        raise ReconError(f"{name} is {value!r}; allowed: a {'whole ' * (kind is int)}number {' '.join(bounds)}".rstrip())
    return kind(value)
