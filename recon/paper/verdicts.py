"""Verdicts on claims as text and tables: the page, the summary, and what a notebook shows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from recon.paper.comparisons import CLOSE, MARGIN, PAPER_SPREAD, SEEDS
from recon.paper.runs import short

HOLDS, FAILS, UNSURE = "holds", "does not hold here", "not enough evidence"
UNTESTABLE, NOT_RUN = "not testable here", "not run"
MARKS = {HOLDS: "✓", FAILS: "✗", UNSURE: "?", UNTESTABLE: "–", NOT_RUN: "○"}


@dataclass(frozen=True)
class Verdict:
    """What records say about a claim on one model and pattern."""

    claim: str
    title: str
    """Of the claim's group; `source` is where the paper says so, `remark` what to know when reading it."""
    source: str
    remark: str
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
    """A key of `MARKS`."""
    reason: str
    protocol: str
    records: tuple[str, ...]
    """Keys."""
    bound: str = ""
    """">" or "<" where the effect is only known to be above or below `effect`."""
    kind: str = ""
    """Of the comparison; `bar`: what the effect has to exceed."""
    bar: float = 0.0

    @property
    def group(self) -> str:
        return self.claim.partition(".")[0]


def effect_words(verdict: Verdict) -> str:
    """The effect with its interval and unit; empty where there is none, and where it could not be tested."""
    if math.isnan(verdict.low) or verdict.verdict == UNTESTABLE:
        return ""
    form = "{:.3g}" if verdict.unit.startswith("times") else "{:+.3f}"
    effect, low, high = (form.format(value).replace("inf", "∞") for value in (verdict.effect, verdict.low, verdict.high))
    effect = "?" if math.isnan(verdict.effect) else f"{verdict.bound} {effect}".strip()
    return f"{effect} [{low}, {high}] {verdict.unit}"


def _where(verdict: Verdict) -> str:
    return ", ".join(part for part in (short(verdict.model), verdict.pattern) if part)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A page with a table per group of claims, a row per claim and model, and under it every verdict with its protocol."""
    lines = [
        "# Do the paper's claims hold?",
        "",
        "Every claim of arXiv 2510.14444 that run records can judge. Written by `python -m recon.paper.claims`. `recon/paper/statements.py`",
        "states the claims and which runs each compares, `recon/paper/claims.py` the rules.",
        "",
        f"{', '.join(f'{mark} {verdict}' for verdict, mark in MARKS.items())}. Effects are differences of log-perplexity, or of the "
        "divergence from the dense model, between runs with the same evaluation windows and seeds; positive is as claimed, and of "
        "equivalences, where the side named first is better. In brackets, a bootstrap interval over seeds and "
        "windows: 95 %; 90 % for \"equals\" (two one-sided tests) and \"as good as\" (one). Two sides are equal within "
        f"{MARGIN:g} of the damage log(pruned / dense), closely equal within {CLOSE:g}; granularities in the paper differ by about "
        f"{PAPER_SPREAD:.2g} of it (`recon.paper.comparisons.PAPER_SPREAD`). With fewer than {SEEDS} seeds, what training noise could "
        f"decide is {UNSURE}. \"Here\" is the model and protocol of the row.",
        "",
        count_words(verdicts),
    ]  # fmt: skip
    for mine in _by(verdicts, "group").values():
        protocols = {text: i for i, text in enumerate(dict.fromkeys(v.protocol for v in mine if v.protocol), 1)}
        lines += ["", f"## {mine[0].group}. {mine[0].title}", "", f"Paper: {mine[0].source}. {mine[0].remark}".strip(), ""]
        lines += markdown_table(
            ("verdict", "claim", "model, pattern", "effect", "seeds", "other patterns"), map(_row, _rows(mine))
        )
        if not protocols:
            continue
        every = [
            (MARKS[v.verdict], v.statement, v.comparison, _where(v), effect_words(v), v.seeds or "", v.reason, protocols.get(v.protocol, ""))
            for v in mine
        ]  # fmt: skip
        lines += ["", "<details><summary>Every verdict, and why</summary>", ""]
        lines += markdown_table(("", "claim", "comparison", "model, pattern", "effect", "seeds", "why", "protocol"), every)
        for text, number in protocols.items():
            count = len({key for v in mine if v.protocol == text for key in v.records})
            lines += ["", f"Protocol {number}: {text}; {count} record{'s' * (count > 1)}."]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _by(verdicts: Iterable[Verdict], *names: str) -> dict:
    """Verdicts by the values of these attributes, in their order."""
    found: dict = {}
    for verdict in verdicts:
        values = tuple(getattr(verdict, name) for name in names)
        found.setdefault(values if len(values) > 1 else values[0], []).append(verdict)
    return found


def _rows(verdicts: Iterable[Verdict]) -> list[list[Verdict]]:
    """The verdicts on each claim and model: that on the main pattern first, and those on others behind it."""
    return list(_by(verdicts, "claim", "model").values())


def _row(mine: list[Verdict]) -> tuple:
    first, *others = mine
    marks = " ".join(f"{MARKS[v.verdict]} {v.pattern}" for v in others)
    return (
        f"{MARKS[first.verdict]} {first.verdict}",
        first.statement,
        _where(first),
        effect_words(first),
        first.seeds or "",
        marks,
    )


def count_words(verdicts: Sequence[Verdict]) -> str:
    """How many verdicts are decided, and how many of those chance alone may have decided."""
    judged = [verdict for verdict in verdicts if verdict.records]
    counts = {state: sum(v.verdict == state for v in judged) for state in MARKS}
    decided, open_ = counts[HOLDS] + counts[FAILS], counts[UNSURE]
    if not decided + open_:
        return "No verdict yet: there are no records."
    said = f"{decided} of {decided + open_} comparisons are decided ({decided / (decided + open_):.0%}): {counts[HOLDS]} hold, {counts[FAILS]} do not."
    if counts[UNTESTABLE]:
        said += f" {counts[UNTESTABLE]} cannot be tested with these models."
    if without := sum(not verdict.records for verdict in verdicts):
        said += f" {without} more were not run."
    return (
        f"{said} Each is judged on its own, with a chance of at most 5 % that noise makes a verdict wrong: of those decided, up to about "
        f"{0.05 * decided:.0f}, and more as open comparisons were given further seeds and judged again. They share runs, so that several may be wrong "
        "together. Trust what several patterns and models agree on."
    )


def not_run_words(verdicts: Iterable[Verdict]) -> str:
    """How many comparisons of which claims were not run, in a sentence; empty if all were."""
    missing = _by([verdict for verdict in verdicts if verdict.verdict == NOT_RUN], "title")
    said = "; ".join(f"{len(mine)} of *{title[0].lower()}{title[1:]}*" for title, mine in missing.items())
    return f"Comparisons that were not run: {said}." if said else ""


def to_summary(verdicts: Sequence[Verdict]) -> str:
    """A short table: a row per group of claims, with its verdicts counted over claims, models and patterns, and the first one's effect."""
    rows = []
    for mine in _by(verdicts, "group").values():
        judged = [verdict for verdict in mine if verdict.records]
        if not judged:
            continue
        counts = ((state, sum(v.verdict == state for v in judged)) for state in MARKS)
        said = ", ".join(f"{MARKS[state]} {state} ({n} of {len(judged)})" for state, n in counts if n)
        first = judged[0]
        example = f"{first.statement}: {effect_words(first) or first.reason} ({_where(first)}, {first.seeds} seed{'s' * (first.seeds != 1)})"
        rows.append((mine[0].title, said, example))
    lines = markdown_table(("the paper's claim", "verdicts", "for example"), rows) if rows else []
    return "\n".join([*lines, "", not_run_words(verdicts)]).strip() + "\n"


def to_table(verdicts: Sequence[Verdict]) -> "pd.io.formats.style.Styler":
    """A table for a notebook: a row per verdict."""
    rows = [
        {
            "verdict": f"{MARKS[v.verdict]} {v.verdict}",
            "claim": v.statement,
            "model, pattern": _where(v),
            "effect": effect_words(v),
            "seeds": v.seeds,
            "why": v.reason,
        }
        for v in verdicts
    ]
    table = pd.DataFrame(rows, columns=["verdict", "claim", "model, pattern", "effect", "seeds", "why"])
    left = [("text-align", "left")]
    return table.style.hide(axis="index").set_properties(**dict(left)).set_table_styles([{"selector": "th", "props": left}])
