"""A short table at the end of a notebook: what the paper says, what the records here say, and why."""

from collections.abc import Iterable, Sequence

import pandas as pd

from recon.paper.runs import short
from recon.paper.verdicts import MARKS, Verdict, effect_words


def answers(verdicts: Sequence[Verdict], groups: Iterable[str]) -> "pd.io.formats.style.Styler":
    """A row for each of `groups` of claims ("2"): how many comparisons say what, and the first that says so."""
    rows = []
    for group in groups:
        about = next(verdict for verdict in verdicts if verdict.group == group)
        mine = [verdict for verdict in verdicts if verdict.group == group and verdict.records]
        by_state = {state: [verdict for verdict in mine if verdict.verdict == state] for state in MARKS}
        here = [f"{MARKS[state]} {state} ({len(found)} of {len(mine)})" for state, found in by_state.items() if found]
        why = [f"{MARKS[state]} {_example(found[0])}" for state, found in by_state.items() if found]
        rows.append(
            {
                "paper": f"{about.title} ({about.source})",
                "here": "\n".join(here) or "no records yet",
                "why": "\n".join([*why, about.remark]).strip(),
            }
        )
    left = [("text-align", "left"), ("vertical-align", "top"), ("white-space", "pre-wrap")]
    style = pd.DataFrame(rows, columns=["paper", "here", "why"]).style.hide(axis="index")
    return style.set_properties(**dict(left)).set_table_styles([{"selector": "th", "props": left}])


def _example(verdict: Verdict) -> str:
    """A comparison with its effect, interval and the reason for its verdict."""
    where = ", ".join(part for part in (short(verdict.model), verdict.pattern) if part)
    effect = effect_words(verdict)
    return f"{verdict.statement} ({where}): {effect}{'; ' if effect else ''}{verdict.reason}"
