"""Verdicts on claims as text and tables: the page, the summary, and what a notebook shows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from recon.paper.comparisons import MARGIN, SEEDS
from recon.paper.runs import short

HOLDS, FAILS, UNSURE = "holds", "does not hold here", "not enough evidence"
MARKS = {HOLDS: "✓", FAILS: "✗", UNSURE: "?"}


@dataclass(frozen=True)
class Verdict:
    """What records say about a claim on one model and pattern."""

    claim: str
    title: str
    """Of the claim's group; `source` is where the paper says so."""
    source: str
    statement: str
    comparison: str
    model: str
    """Empty where there are no records, and where models are compared."""
    pattern: str
    effect: float
    """Positive is as claimed; of an equivalence, positive: the first side is better. NaN where there is none."""
    low: float
    high: float
    unit: str
    seeds: int
    verdict: str
    """HOLDS, FAILS or UNSURE."""
    reason: str
    protocol: str
    records: tuple[str, ...]
    """Keys."""
    bound: str = ""
    """">" or "<" where the effect is only known to be above or below `effect`."""

    @property
    def group(self) -> str:
        return self.claim.partition(".")[0]


def _effect(verdict: Verdict) -> str:
    """The effect with its interval and unit; empty where there is none."""
    if math.isnan(verdict.low):
        return ""
    form = "{:.3g}" if verdict.unit.startswith("times") else "{:+.3f}"
    effect, low, high = (form.format(value).replace("inf", "∞") for value in (verdict.effect, verdict.low, verdict.high))
    effect = "?" if math.isnan(verdict.effect) else f"{verdict.bound} {effect}".strip()
    return f"{effect} [{low}, {high}] {verdict.unit}"


def _where(verdict: Verdict) -> str:
    return ", ".join(part for part in (short(verdict.model), verdict.pattern) if part)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A page with a table per group of claims, and under it the protocols of what was compared."""
    lines = [
        "# Do the paper's claims hold?",
        "",
        "Every claim of arXiv 2510.14444 that run records can judge. Written by `python -m recon.paper.claims`; `recon/paper/claims.py` states",
        "the claims, which runs each compares, and the rules.",
        "",
        f"{MARKS[HOLDS]} {HOLDS}, {MARKS[FAILS]} {FAILS}, {MARKS[UNSURE]} {UNSURE}. Effects are differences of log-perplexity between "
        "runs with the same evaluation windows and seeds; positive is as claimed, and of equivalences, where the side named first is "
        "better. In brackets, a bootstrap interval over seeds and "
        "windows: 95 %, for equivalences 90 % (two one-sided tests). Two sides are equal within "
        f"{MARGIN:g} of the damage log(pruned / dense); differences within the paper's own tables are smaller. With fewer than "
        f"{SEEDS} seeds, what training noise could decide is {UNSURE}. \"Here\" is the model and protocol of the row.",
    ]  # fmt: skip
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.group, []).append(verdict)
    for group, mine in groups.items():
        protocols = {text: i for i, text in enumerate(dict.fromkeys(v.protocol for v in mine if v.protocol), 1)}
        rows = [
            (
                f"{MARKS[v.verdict]} {v.verdict}",
                v.statement,
                v.comparison,
                _where(v),
                _effect(v),
                v.seeds or "",
                v.reason,
                protocols.get(v.protocol, ""),
            )
            for v in mine
        ]
        lines += ["", f"## {group}. {mine[0].title}", "", f"Paper: {mine[0].source}.", ""]
        lines += _table(("verdict", "claim", "comparison", "model, pattern", "effect", "seeds", "why", "protocol"), rows)
        for text, number in protocols.items():
            count = len({key for v in mine if v.protocol == text for key in v.records})
            lines += ["", f"Protocol {number}: {text}; {count} record{'s' * (count > 1)}."]
    return "\n".join(lines) + "\n"


def to_summary(verdicts: Sequence[Verdict]) -> str:
    """A short table: a row per claim with the effect at the first model and pattern, and verdicts counted over all."""
    claims: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        claims.setdefault(verdict.claim, []).append(verdict)
    rows = []
    for mine in claims.values():
        if not mine[0].records:
            continue
        counts = [(state, sum(v.verdict == state for v in mine)) for state in MARKS]
        each = [f"{MARKS[state]} {state}" + (f" ({n} of {len(mine)})" if len(mine) > 1 else "") for state, n in counts if n]
        rows.append((mine[0].statement, ", ".join(each), f"{_effect(mine[0])} ({_where(mine[0])})".strip(), mine[0].seeds))
    lines = _table(("claim", "verdict", "effect", "seeds"), rows) if rows else []
    if missing := [mine[0] for mine in claims.values() if not mine[0].records]:
        each = [f"{title[0].lower()}{title[1:]}" for title in dict.fromkeys(verdict.title for verdict in missing)]
        lines += ["", f"No records yet for {len(missing)} comparisons (run the notebooks) under: {'; '.join(each)}."]
    return "\n".join(lines).strip() + "\n"


def to_table(verdicts: Sequence[Verdict]) -> "pd.io.formats.style.Styler":
    """A table for a notebook: a row per verdict."""
    rows = [
        {
            "verdict": f"{MARKS[v.verdict]} {v.verdict}",
            "claim": v.statement,
            "model, pattern": _where(v),
            "effect": _effect(v),
            "seeds": v.seeds,
            "why": v.reason,
        }
        for v in verdicts
    ]
    table = pd.DataFrame(rows, columns=["verdict", "claim", "model, pattern", "effect", "seeds", "why"])
    left = [("text-align", "left")]
    return table.style.hide(axis="index").set_properties(**dict(left)).set_table_styles([{"selector": "th", "props": left}])
