"""A verdict on each of the paper's claims from run records: `python -m recon.paper.claims`.

`recon.paper.statements` holds the claims, `recon.paper.runs` says which records may be compared, `comparisons` what is computed from
them, `statistics` the interval;
`verdicts` makes tables of the result.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recon.errors import ReconError
from recon.paper import tables
from recon.paper.artifact import to_artifact
from recon.paper.comparisons import CLOSE, KINDS, SEEDS, Evidence
from recon.paper.crate import to_crate
from recon.paper.runs import DEFAULTS, Run, check_windows, protocol, protocol_words
from recon.paper.statements import CLAIMS, GROUPS, Claim
from recon.paper.statistics import bounds, interval, wider
from recon.paper.verdicts import FAILS, HOLDS, NOT_RUN, UNSURE, UNTESTABLE, Verdict, to_markdown, to_summary, to_table
from recon.study.record import RunRecord
from recon.study.studies import read_records

ROOT = Path(__file__).resolve().parents[2]
RECORDS, PAGE, README = ROOT / "results" / "laptop", ROOT / "figures" / "claims.md", ROOT / "README.md"
MANY = 100  # seeds that nobody will run
START, END = "<!-- claims -->", "<!-- /claims -->"


def judge(records: Iterable[RunRecord], resamples: int = 2000, seed: int = 0) -> list[Verdict]:
    """A verdict on every claim, for each model and pattern that records allow to compare. Failed runs are left out.

    "A is better than B" holds if the 95 % interval is above 0, and does not hold here if it is below. "Equal" holds if the 90 % interval is
    within the margin (two one-sided tests at 5 %), and does not if it is outside. "As good" holds if the 90 % interval is above
    minus the margin, and does not if it is below. A ratio is judged as "better", with its own bound.
    Everything else is not enough evidence, with about how many seeds it would take; so is what fewer than three seeds say where training
    noise could decide. What no number of seeds can decide on these models is not testable here.

    Where several protocols allow a comparison, the one with the most records that enter is taken; of these, that of the largest study (the
    most records in all). The order of records matters only for models whose names do not state their size.

    Raises:
        ReconError: a record has nothing to judge by, or two records that state one protocol and model were not evaluated
            on the same windows.
    """
    runs = [Run(record) for record in records if record.status == "done"]
    order = {model: index for index, model in enumerate(dict.fromkeys(run.model for run in runs))}
    runs.sort(key=lambda run: (order[run.model], run.key))
    check_windows(runs)
    # The default model and pattern come first.
    default = (DEFAULTS["model"], DEFAULTS["pattern"])
    verdicts = []
    for claim in CLAIMS:
        scopes: dict[tuple[str, str], dict[tuple, list[Run]]] = {}
        for run in runs:
            scope = ("" if claim.kind == "trend" else run.model, run.pattern)
            if claim.measure in run.measures:
                scopes.setdefault(scope, {}).setdefault(protocol(run, claim.kind), []).append(run)
        found = []
        for scope in sorted(scopes, key=lambda s: (s[0] not in ("", default[0]), s[0], s[1] != default[1], s[1])):
            candidates = [
                (evidence, (len(evidence.runs), evidence.seeds, len(group), repr(key)))
                for key, group in scopes[scope].items()
                if (evidence := KINDS[claim.kind](group, claim)) is not None
            ]
            if candidates:
                evidence, _ = max(candidates, key=lambda pair: pair[1])
                found.append(_verdict(claim, *scope, evidence, resamples, seed))
        if not found and not claim.optional:
            found.append(_without(claim))
        verdicts += found
    return verdicts


def _without(claim: Claim) -> Verdict:
    nothing = math.nan
    return Verdict(
        claim.id, *GROUPS[claim.group], claim.statement, claim.comparison, "", "", nothing, nothing, nothing, "", 0,
        NOT_RUN, "no records", "", (),
    )  # fmt: skip


def _verdict(claim: Claim, model: str, pattern: str, evidence: Evidence, resamples: int, seed: int) -> Verdict:
    means = np.concatenate([part.mean((1, 2)) for part in evidence.parts])[:, None]
    lower = upper = low = high = math.nan
    needed = 0
    if np.isfinite(means).all():
        lower, upper = (float(bound[0]) for bound in bounds(evidence.statistic(means)))
        low, high = interval(evidence.parts, evidence.statistic, claim.level, resamples, seed)
        if claim.kind == "ratio":
            lower, upper, low, high = (float(np.exp2(value)) for value in (lower, upper, low, high))
        verdict, reason = _rule(claim, evidence, low, high)
        if verdict == UNSURE:
            needed = _seeds_needed(claim, evidence.seeds, lower, low, high)
            reason += f"; {_needed_words(needed)}"
        if note := evidence.note(means):
            reason += f"; {note}"
    else:
        diverged = [run.key for run in evidence.runs if not all(np.isfinite(values).all() for values in run.nll.values())]
        verdict, reason = UNSURE, f"not finite: {', '.join(diverged)}"
    effect, bound = lower, ""
    if lower != upper:  # a ratio of which bounds are known, perhaps only one
        effect, bound = math.sqrt(lower * upper), ""
        if math.isinf(upper):
            effect, bound = (lower, ">") if lower > 0 else (math.nan, "")
        elif lower == 0:
            effect, bound = upper, "<"
    return Verdict(
        claim.id, *GROUPS[claim.group], claim.statement, claim.comparison, model, pattern, effect, low, high, evidence.unit,
        evidence.seeds, verdict, reason, protocol_words(evidence.runs), tuple(sorted(run.key for run in evidence.runs)), bound,
        kind=claim.kind, bar=claim.bar,
    )  # fmt: skip


def _rule(claim: Claim, evidence: Evidence, low: float, high: float) -> tuple[str, str]:
    """The verdict, and why, from the interval."""
    if evidence.lacks:
        return UNTESTABLE, evidence.lacks
    if math.isnan(low):
        return UNSURE, "pruning did no harm that could be measured by"
    if claim.kind == "equal":
        inside, outside = -claim.margin < low and high < claim.margin, low > claim.margin or high < -claim.margin
        what = f"90 % interval {{}} ±{claim.margin:g} of the damage"
        verdict, reason = (
            (HOLDS, what.format("within")) if inside else (FAILS, what.format("outside")) if outside
            else (UNSURE, what.format("reaches across"))
        )  # fmt: skip
        if inside and -CLOSE < low and high < CLOSE:
            reason += f", and ±{CLOSE:g}"
    else:
        verdict = HOLDS if low > claim.bar else FAILS if high < claim.bar else UNSURE
        where = {HOLDS: "above", FAILS: "below", UNSURE: "includes"}[verdict]
        reason = f"{100 * claim.level:.0f} % interval {where} {claim.bar:g}"
        if claim.margin:
            reason += " of the damage" + (", and above 0" if low > 0 else "")
    if verdict == FAILS and evidence.favours_other:
        return UNSURE, f"{reason}, but with less compute"
    if evidence.seeds < SEEDS:
        reason += f"; fewer than {SEEDS} seeds ({evidence.seeds})"
        if claim.noise:
            return UNSURE, f"{reason}: training noise unknown"
    return verdict, reason


def _seeds_needed(claim: Claim, seeds: int, effect: float, low: float, high: float) -> int:
    """About how many seeds would decide, if the effect is what it seems and seeds are all the noise; 0: that cannot be said."""
    if not all(map(math.isfinite, (effect, low, high))):
        return 0
    if claim.kind == "ratio":
        effect, low, high, above = (math.log(max(value, 1e-12)) for value in (effect, low, high, claim.bar))
    else:
        above = claim.bar
    distance = abs(claim.margin - abs(effect)) if claim.kind == "equal" else abs(effect - above)
    wanted = wider(seeds, claim.level) / math.sqrt(seeds) * distance / max((high - low) / 2, 1e-12)
    fitting = (count for count in range(max(SEEDS, seeds), MANY) if wider(count, claim.level) / math.sqrt(count) <= wanted)
    return next(fitting, MANY)


def _needed_words(needed: int) -> str:
    if not needed:
        return "it cannot be said how many seeds would decide"
    return f"it would take {MANY} seeds or more" if needed >= MANY else f"it would take about {needed} seeds"


def show(verdicts: Sequence[Verdict], ids: Iterable[str]) -> "pd.io.formats.style.Styler":
    """The verdicts on the claims called `ids` ("2.block", or "2" for its whole group) as a table for a notebook.

    Raises `ReconError` for an id that is no claim.
    """
    ids = [ids] if isinstance(ids, str) else list(ids)
    known = {name for claim in CLAIMS for name in (claim.id, claim.group)}
    if unknown := [name for name in ids if name not in known]:
        raise ReconError(f"unknown claim {unknown[0]!r}; allowed: {', '.join([*GROUPS, *(claim.id for claim in CLAIMS)])}")
    return to_table([verdict for verdict in verdicts if verdict.claim in ids or verdict.group in ids])


def _pages(records_folder: Path | str, page: Path | str, readme: Path | str | None) -> dict[Path, str]:
    """What the page, the tables beside it and, where one is given, the README and the files beside that should hold."""
    records = read_records(records_folder)
    verdicts = judge(records)
    pages = {Path(page): to_markdown(verdicts)}
    texts = {f"tables/{name}": text for name, text in tables.texts(records).items()}
    pages |= {Path(page).parent / name: text for name, text in texts.items()}
    if readme is None:
        return pages
    readme = Path(readme)
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReconError(f"README {str(readme)!r} cannot be read: {error.strerror}") from error
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ReconError(
            f"README {str(readme)!r} must hold {START} and, after it, {END}, once each: the section goes between them"
        )
    head, tail = text.split(START)[0], text.split(END)[1]
    optional = {claim.id for claim in CLAIMS if claim.optional}
    central = [verdict for verdict in verdicts if verdict.claim not in optional]
    return pages | {
        readme: f"{head}{START}\n{to_summary(central)}{END}{tail}",
        readme.with_name("ARTIFACT.md"): to_artifact(central, records),
        readme.with_name("ro-crate-metadata.json"): to_crate(
            records, records_folder, Path(page).parent, [Path(page).name, *texts], readme.parent
        ),
    }


def write(records_folder: Path | str = RECORDS, page: Path | str = PAGE, readme: Path | str | None = README) -> list[Path]:
    """Writes the page, the tables in `tables` beside it, the README's section between `<!-- claims -->` and `<!-- /claims -->`, and
    beside the README ARTIFACT.md and ro-crate-metadata.json; returns what changed.

    readme: None: the page and tables alone.
    Raises `ReconError` as `judge` does, and for a README without these markers.
    """
    changed = []
    for path, text in _pages(records_folder, page, readme).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def stale(records_folder: Path | str = RECORDS, page: Path | str = PAGE, readme: Path | str = README) -> list[str]:
    """A message for each of the files of `write` that is not what the records give; empty if all are."""
    return [
        f"{path} is not what the records in {records_folder} give; run: python -m recon.paper.claims"
        for path, text in _pages(records_folder, page, readme).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 with --check if something is not current, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m recon.paper.claims", description="Judge the paper's claims from run records."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records (default: results/laptop)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write (default: figures/claims.md)")
    parser.add_argument("--readme", type=Path, default=README, help="file with the markers (default: README.md)")
    given = parser.parse_args(arguments)
    try:
        if given.check:
            messages = stale(given.records, given.page, given.readme)
            print("\n".join(messages) or "current")
            return int(bool(messages))
        changed = write(given.records, given.page, given.readme)
    except ReconError as error:
        parser.exit(2, f"recon.paper.claims: {error}\n")
    print("\n".join(f"written: {path}" for path in changed) or "current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
