"""The machinery of options, on a config of its own: what is checked, what is stored, and what is said."""

from dataclasses import dataclass, fields

import pytest

from recon.errors import ReconError
from recon.options import NAMES, Options, allowed, flag, option


@dataclass(frozen=True)
class Tea(Options):
    kind: str = option("green", "What is brewed.", choices={"green": "from Japan", "black": "from Assam"})
    minutes: int = option(3, "How long.", least=1, most=9)
    share: float = option(0.5, "How full the pot is.", above=0, most=1, flag="pot_share")
    sugar: bool = option(False, "Whether it is sweet.")
    maker: str | None = option(None, "Who brews it.")
    guests: NAMES = option((), "Who drinks it.")
    note: str = option("", "Anything else.")


BY_NAME = {each.name: each for each in fields(Tea)}


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("kind", "white", "kind is 'white'; allowed: green, black"),
        ("kind", None, "kind is None; allowed: green, black"),
        ("minutes", 0, "minutes is 0; allowed: a whole number from 1 to 9"),
        ("minutes", 10, "minutes is 10; allowed: a whole number from 1 to 9"),
        ("minutes", 2.0, "minutes is 2.0; allowed: a whole number"),
        ("minutes", True, "minutes is True; allowed: a whole number"),
        ("minutes", "3", "minutes is '3'; allowed: a whole number"),
        ("share", 0, "pot_share is 0; allowed: a number above 0 to 1"),
        ("share", 1.5, "pot_share is 1.5; allowed: a number above 0 to 1"),
        ("share", float("nan"), "pot_share is nan; allowed: a number"),
        ("share", float("-inf"), "pot_share is -inf; allowed: a number"),
        ("sugar", 1, "sugar is 1; allowed: True, False"),
        ("maker", 3, "maker is 3; allowed: text, None"),
        ("note", None, "note is None; allowed: text"),
        ("guests", ("Ada", 3), r"guests is \('Ada', 3\); allowed: a list of names"),
        ("guests", None, "guests is None; allowed: a list of names"),
    ],
)
def test_wrong_values_are_refused_by_flag_value_and_what_is_allowed(name, wrong, words):
    with pytest.raises(ReconError, match=words):
        Tea(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("minutes", 1, 1),
        ("minutes", 9, 9),
        ("share", 1, 1.0),
        ("guests", "Ada", ("Ada",)),
        ("guests", ["Ada", "Grace"], ("Ada", "Grace")),
        ("maker", "Ada", "Ada"),
    ],
)
def test_values_are_stored_in_one_form(name, given, stored):
    found = getattr(Tea(**{name: given}), name)
    assert found == stored and type(found) is type(stored)


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="milk"):
        Tea(milk=True)


def test_what_users_are_told():
    assert flag(BY_NAME["share"]) == "pot_share" and flag(BY_NAME["kind"]) == "kind"
    assert allowed(BY_NAME["minutes"]) == "a whole number from 1 to 9"


def test_a_config_of_configs_leaves_those_to_themselves():
    @dataclass(frozen=True)
    class Table(Options):
        tea: Tea = Tea(minutes=5)
        legs: int = option(4, "Of the table.", least=3)

    assert Table().tea.minutes == 5
    with pytest.raises(ReconError, match="legs is 2"):
        Table(legs=2)
