"""A verdict on each of the paper's claims from run records: `python -m companion.judge`.

`claims.yaml` holds the claims, `claims.md.j2` the text of their page. `companion.compare` selects the runs of both sides and
computes the effect between them.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from companion import compare, files, tables
from companion.article import article, render, settings
from companion.compare import CLOSE, MARGIN, SEEDS, Evidence
from companion.frame import DEFAULTS, RECIPE_WORDS, RECIPES, SEARCH, load, protocol_words
from companion.publish import ROOT, gallery

HOLDS, FAILS, UNSURE, UNTESTABLE, NOT_RUN = "holds", "does not hold here", "not enough evidence", "not testable here", "not run"
MARKS = {HOLDS: "✓", FAILS: "✗", UNSURE: "?", UNTESTABLE: "–", NOT_RUN: "○"}
RATIOS = "ratio", "memory"  # tests whose effects are log2 of a ratio
OLDER = "older protocol"
MANY = 100  # if this many seeds or more are needed, the number is not given
PAGE = Path(__file__).with_name("claims.md.j2")
_YAML = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
GROUPS = _YAML["groups"]
CLAIMS = {group: number for number, about in _YAML["headlines"].items() for group in about["groups"]}  # group: README's claim
NOTEBOOKS = {group: name for name, groups in _YAML["notebooks"].items() for group in groups}


def claims() -> list[dict]:
    """The claims of `claims.yaml`, a dict for each combination of values; "better", "equal" and "gap" on the second text, too."""
    stated = [claim for row in _YAML["claims"] for claim in _expanded(row)]
    there, words = {claim["id"] for claim in stated}, _YAML["names"]["other"]
    return stated + [
        claim | {"id": name, "says": f"{claim['says']} ({words})", "measure": "other", "short": "", "optional": True}
        for claim in stated
        if claim["test"] in ("better", "equal", "gap") and (name := _elsewhere(claim["id"])) not in there
    ]


def _elsewhere(claim: str) -> str:
    """The id of the same claim on the second evaluation text."""
    return f"{re.sub('[.](own|other|kl)$', '', claim)}.other"


def _expanded(row: dict) -> Iterable[dict]:
    defaults = {"measure": "own", "count": 0, "times": 1, "above": 0.0, "noise": True, "cost": "", "short": "", "right": None}
    defaults |= {"left": {"granularity": "half-block"}, "margin": MARGIN * (row["test"] == "equal")}
    central = row.get("for", {})
    for axes, optional in ((central, False), (central | row.get("optional", {}), True))[: 1 + ("optional" in row)]:
        for values in itertools.product(*axes.values()):
            of = dict(zip(axes, values))
            spelled = {name: _YAML["names"].get(value, value) for name, value in of.items()}
            said = defaults | {name: value for name, value in of.items() if name in defaults} | row
            claim = {name: _filled(value, of) for name, value in said.items() if name not in ("for", "drawn")}
            drawn = all(of[name] in allowed for name, allowed in row.get("drawn", {}).items())
            says, short = row["says"].format(**spelled), row.get("short", "").format(**spelled) * drawn
            words = {"says": says[0].upper() + says[1:], "short": short, "cost_words": spelled.get("cost", "")}
            group = claim["id"].partition(".")[0]
            yield {"notebook": NOTEBOOKS[group]} | claim | words | {"optional": optional, "group": group}


def _filled(value: object, of: dict) -> object:
    """`value` with names in braces replaced by their values; a string that is only "{name}" becomes the value itself."""
    if isinstance(value, dict | list):
        return {k: _filled(v, of) for k, v in value.items()} if isinstance(value, dict) else [_filled(v, of) for v in value]
    if not isinstance(value, str):
        return value
    return of[value[1:-1]] if value[1:-1] in of else value.format_map({name: name for name in re.findall(r"{(\w+)}", value)} | of)


def judge(
    runs: pd.DataFrame, rows: Sequence[dict] | None = None, ladder: pd.DataFrame = pd.DataFrame(), profile: str = ""
) -> pd.DataFrame:
    """A verdict on each claim (of `rows`, or all) for each model, pattern and recipe in `runs` (from `companion.frame.load`).

    ladder: runs on models of one family; if there are any, claims about model size are judged from them. profile: the one whose
    settings are today's protocol; runs of another protocol are marked "older".

    - "A is better than B" holds if the 95 % interval is above 0, and does not hold here if it is below.
    - "Equal" holds if the 90 % interval is within the margin (two one-sided tests at 5 %), and does not if it is outside.
    - "As good" holds if the 90 % interval is above minus the margin, and does not if it is below.
    - A ratio is judged like "better", against a bar of its own.
    - Everything else is "not enough evidence"; the reason says about how many seeds would decide. So is any verdict from fewer
      than three seeds that training noise could change. "Not testable here": no number of seeds can decide on these models.

    Each row also has the verdict and the effect on the second text, if the comparison was made there.

    If several protocols allow a comparison, one is chosen by these in turn: three seeds or more, a ratio bounded from above,
    today's protocol, the most records in the comparison, the most seeds, the largest study.
    """
    verdicts, cached = [], {}
    for claim in claims() if rows is None else rows:
        # The columns in which runs have to agree to enter a comparison of this kind.
        shared = ["protocol"] + ["samples"] * (claim["test"] not in (*RATIOS, "combined", "samples"))
        shared += ["model", "windows"] * (claim["test"] != "trend")
        kind = claim["measure"], *shared
        if kind not in cached:
            cached[kind] = compare.studies(ladder if claim["test"] == "trend" and len(ladder) else runs, *kind)
        scopes = [each for each in cached[kind] if each[0][2] in claim.get("recipes", RECIPES)]
        found = [(scope, _most(groups, claim, profile)) for scope, groups in scopes]
        mine = [verdict(claim, *scope, evidence, profile) for scope, evidence in found if evidence]
        verdicts += mine or ([_row(claim, NOT_RUN, "no records")] if not claim["optional"] else [])
    found, by = pd.DataFrame(verdicts), ["claim", "model", "pattern", "recipe"]
    if len(found):  # where today's default has enough seeds, the earlier default is left out
        place, today = pd.MultiIndex.from_frame(found[by[:3]]), (found["recipe"] == "default") & (found["seeds"] >= SEEDS)
        found = found[(found["recipe"] != "first-skipped") | ~place.isin(place[today])].reset_index(drop=True)
    second = found[found["measure"] == "other"].set_index(by)[["verdict", "effect"]].add_prefix("second_")
    return found.join(found[by].assign(claim=found["claim"].map(_elsewhere)).join(second, on=by)[[*second]])


def _most(groups: dict[str, pd.DataFrame], claim: dict, profile: str) -> Evidence | None:
    """The best evidence that groups of runs give, by these in turn: enough seeds, a ratio bounded from above, today's protocol,
    the most runs, the most seeds, the largest study. None if no group gives any."""
    found = {name: compare.KINDS[claim["test"]](group, claim) for name, group in groups.items()}

    def rank(name: str) -> tuple:
        each, today = found[name], not _older(found[name].runs, claim, profile)
        bounded = claim["test"] != "ratio" or each.estimate(0.95)[3] < math.inf
        return min(each.seeds, SEEDS), bounded, today, len(each.runs), each.seeds, len(groups[name]), name

    return found[max(names, key=rank)] if (names := [name for name in found if found[name]]) else None


def _row(claim: dict, verdict: str, reason: str, **more) -> dict:
    nothing = dict.fromkeys(("model", "pattern", "recipe", "unit", "note", "protocol"), "") | {"seeds": 0, "older": False}
    nothing |= dict.fromkeys(("effect", "low", "high"), math.nan)
    words = {"claim": claim["id"], "group": claim["group"], "statement": claim["says"], "comparison": comparison(claim)}
    rule = {name: claim[name] for name in ("test", "measure", "short", "optional", "notebook")} | {"bar": _bar(claim)}
    return words | nothing | {"verdict": verdict, "reason": reason, "keys": (), "bound": "", **rule} | more


def _bar(claim: dict) -> float:
    """The bar that the effect must exceed; for an equivalence, which has two margins, their middle, 0."""
    return claim["above"] if claim["test"] == "equal" else claim["above"] - claim["margin"]


def verdict(claim: dict, model: str, pattern: str, recipe: str, evidence: Evidence, profile: str) -> dict:
    """A row of `judge`: the verdict of `evidence` on a claim, for one model, pattern and recipe."""
    level = 0.90 if claim["margin"] else 0.95  # one-sided tests against a margin at 5 % each, or a two-sided one against a bar
    lower, upper, low, high = evidence.estimate(level)
    if claim["test"] in RATIOS:
        lower, upper, low, high = (float(np.exp2(value)) for value in (lower, upper, low, high))
    state, reason = _rule(claim, evidence, level, low, high)
    if state == UNSURE and not (evidence.favours_other and lower < _bar(claim)):  # otherwise, more seeds would not help
        reason += f"; {_needed(claim, evidence, level, lower, low, high)}"
    reason += f"; {evidence.note}" if evidence.note else ""
    effect, bound = lower, ""
    if lower != upper:  # a ratio known by its bounds, perhaps only one
        effect = math.sqrt(lower * upper)
        if math.isinf(upper):
            effect, bound = (lower, ">") if lower > 0 else (math.nan, "")
        elif lower == 0:
            effect, bound = upper, "<"
    return _row(
        claim, state, reason, model=model or evidence.models, pattern=pattern, recipe=recipe, effect=effect, low=low, high=high,
        unit=evidence.unit, bound=bound, seeds=evidence.seeds,
        note=evidence.note, protocol=protocol_words(evidence.runs), keys=tuple(sorted(evidence.runs["key"])),
        older=_older(evidence.runs, claim, profile),
    )  # fmt: skip


def _older(runs: pd.DataFrame, claim: dict, profile: str) -> bool:
    """Whether some of `runs` have another protocol than `profile` sets for the notebook of `claim`. Their numbers of samples may
    differ, and so may evaluation texts after the second."""
    today = settings(profile).get(claim["notebook"], {}).get("common", {}) if profile else {}
    said = {name: tuple(x) if isinstance(x, list) else x for name, x in today.items() if "samples" != name != "prune_samples"}
    return any(
        (value[:2] if name == "evaluation_texts" else value) != wanted for name, wanted in said.items() for value in runs[name]
    )


def _rule(claim: dict, evidence: Evidence, level: float, low: float, high: float) -> tuple[str, str]:
    """The verdict, and the reason for it, from the interval (low, high)."""
    bar, margin, equal = _bar(claim), claim["margin"], claim["test"] == "equal"
    if evidence.lacks:
        return UNTESTABLE, evidence.lacks
    if math.isnan(low):
        return UNSURE, "a run diverged, or pruning did no harm that could be measured by"
    if equal:
        within, outside = -margin < low and high < margin, low > margin or high < -margin
        state = HOLDS if within else FAILS if outside else UNSURE
        place = {HOLDS: "within", FAILS: "outside", UNSURE: "reaches across"}[state]
        reason = f"90 % interval {place} ±{margin:g} {evidence.unit}"
        reason += f", and ±{CLOSE:g}" * (-CLOSE < low and high < CLOSE)
    else:
        state = HOLDS if low > bar else FAILS if high < bar else UNSURE
        place = {HOLDS: "above", FAILS: "below", UNSURE: "includes"}[state]
        reason = f"{100 * level:.0f} % interval {place} {bar:g}"
        reason += f" {evidence.unit}{', and above 0' * (low > 0)}" if margin else ""
    if evidence.seeds < SEEDS:
        reason += f"; fewer than {SEEDS} seeds ({evidence.seeds})" + ": training noise unknown" * claim["noise"]
    ends, marks = np.array([low, high]), np.array([-margin, margin] if equal else [bar])
    if claim["test"] in RATIOS:
        ends, marks = np.log2(np.maximum(ends, 1e-12)), np.log2(marks)
    nearest = np.abs(ends[:, None] - marks).min()
    if state != UNSURE and nearest < (ends[1] - ends[0]) / 5 and nearest <= evidence.error(level):  # slow, so only near margins
        return UNSURE, f"{reason}, but borderline: as near to it as two bootstraps differ"
    if state == FAILS and evidence.favours_other:
        return UNSURE, f"{reason}, but with less compute"
    return UNSURE if evidence.seeds < SEEDS and claim["noise"] else state, reason


def _needed(claim: dict, evidence: Evidence, level: float, effect: float, low: float, high: float) -> str:
    """About how many seeds would decide, in words, if the effect is as estimated and the evaluation windows stay as they are.

    For a trend over model size: how much wider the range of sizes would have to be, since models scatter at any number of seeds.
    """
    if not all(map(math.isfinite, (effect, low, high))):
        return "it cannot be said how many seeds would decide"
    bar, seeds = _bar(claim), evidence.seeds
    if claim["test"] in RATIOS:
        effect, low, high, bar = (math.log2(max(value, 1e-12)) for value in (effect, low, high, bar))
    distance, half = abs(claim["margin"] - abs(effect)) if claim["test"] == "equal" else abs(effect - bar), (high - low) / 2
    if claim["test"] == "trend":
        more = half / max(distance, half / 1000)
        return f"it would take as many models over about {more:.1f} times as many powers of ten in size"
    ends = compare.interval([part.mean(1, keepdims=True) for part in evidence.parts], evidence.statistic, level)
    by_windows = min((ends[1] - ends[0]) / 2, half)
    if by_windows >= distance:
        return "no number of seeds would decide it on so few evaluation windows"
    if seeds < 2:
        return f"it would take {SEEDS} seeds or more"
    by_seeds = math.sqrt(half**2 - by_windows**2) / compare.wider(seeds, level) * math.sqrt(seeds)
    wanted = math.sqrt(distance**2 - by_windows**2)
    fitting = (n for n in range(max(SEEDS, seeds + 1), MANY) if by_seeds * compare.wider(n, level) / math.sqrt(n) <= wanted)
    needed = next(fitting, MANY)
    return f"it would take {MANY} seeds or more" if needed == MANY else f"it would take about {needed} seeds"


# --- verdicts as text and tables ------------------------------------------------------------------------------------------


def comparison(claim: dict) -> str:
    """Which runs are compared with which, in words."""

    def words(options: dict) -> str:
        return ", ".join(f"{name} {' / '.join(value) if isinstance(value, list) else value}" for name, value in options.items())

    left, right = words(claim["left"]), words(claim["right"]) if claim["right"] else "the same before reconstruction"
    return {
        "memory": f"added memory: {right} over {left}",
        "ratio": f"{claim['cost_words']} with which {right} reaches the quality of {left}",
        "gap": f"gap between criteria: {left}, against {right}",
        "trend": f"over model size: {f'{left} against {right}' if claim['right'] else f'gap between criteria: {left}'}",
    }.get(claim["test"], f"{left} against {right}")  # fmt: skip


def effect_words(row: pd.Series) -> str:
    """The effect with its interval and unit; empty if there is none or it could not be tested."""
    if math.isnan(row["low"]) or row["verdict"] == UNTESTABLE:
        return ""
    form = "{:.3g}" if row["unit"].startswith("times") else "{:+.3f}"
    effect, low, high = (form.format(row[name]).replace("inf", "∞") for name in ("effect", "low", "high"))
    return f"{row['bound']} {'?' if math.isnan(row['effect']) else effect} [{low}, {high}] {row['unit']}".strip()


def found_in(row: pd.Series) -> str:
    """Where a verdict was found: model, pattern, recipe unless it is the default, and whether the protocol is an older one."""
    recipe = RECIPE_WORDS[row["recipe"]] if row["recipe"] not in ("", "default") else ""
    older = OLDER * bool(row["older"])
    return ", ".join(part for part in (row["model"], row["pattern"], recipe, older) if part)


def _counting(verdicts: pd.DataFrame) -> pd.DataFrame:
    """The comparisons that are counted: those with runs, by perplexity on the first text or by cost."""
    return verdicts[(verdicts["seeds"] > 0) & (verdicts["measure"] == "own")]


def _counted(rows: pd.DataFrame) -> str:
    """How many comparisons have each verdict: "✓ holds (3 of 7), ..."."""
    counts = rows["verdict"].value_counts()
    return ", ".join(f"{MARKS[state]} {state} ({counts[state]} of {len(rows)})" for state in MARKS if state in counts)


def answers(verdicts: pd.DataFrame, groups: Sequence[str]) -> "pd.io.formats.style.Styler":
    """A table for notebooks, a row per group of claims: what the paper says, verdict counts, the first row of each verdict."""
    rows = []
    for group in groups:
        mine, about = _counting(verdicts[verdicts["group"] == group]), GROUPS[group]
        first = [row for _, row in mine.drop_duplicates("verdict").iterrows()]
        why = [f"{MARKS[v['verdict']]} {v['statement']} ({found_in(v)}): {effect_words(v)}; {v['reason']}" for v in first]
        paper = f"{about['title']} ({about['source']})"
        rows.append(
            {"paper": paper, "here": _counted(mine) or "no records yet", "why": "\n".join([*why, about.get("remark", "")])}
        )
    left = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}
    return pd.DataFrame(rows).style.hide(axis="index").set_properties(**left)


def _at_main_pattern(verdicts: pd.DataFrame) -> pd.DataFrame:
    """A row for each claim, model and recipe (both defaults as one): of its first pattern, the first with enough seeds."""
    own, few = ["claim", "model", "recipe"], verdicts["seeds"] < SEEDS
    rows = verdicts.assign(recipe=verdicts["recipe"].replace("first-skipped", "default"), few=few)
    rows = rows.assign(place=rows.groupby([*own, "pattern"], sort=False).ngroup()).sort_values(["place", "few"], kind="stable")
    return verdicts.loc[sorted(rows.index[~rows.duplicated(own)])]


def central(verdicts: pd.DataFrame) -> pd.DataFrame:
    """The central claims (those with a `short` text): a row for each claim, model and recipe, at its main pattern."""
    told = (verdicts["short"] != "") & np.isfinite(verdicts[["low", "effect"]]).all(axis=1)
    return _at_main_pattern(verdicts[told])


def in_short(central: pd.DataFrame) -> str:
    """Which topics hold by perplexity or cost, and which do not, in sentences: verdicts counted over the rows of `central`."""
    topics: dict[str, list[str]] = {}
    summaries = ("Holds", "Holds in part", "Holds as often as not", "Mostly does not hold", "Does not hold", "Open")
    for group, mine in central[central["measure"] == "own"].groupby("group", sort=False):
        holds, fails = (list(mine["verdict"]).count(state) for state in (HOLDS, FAILS))
        word = summaries[[holds == len(mine), holds > fails, holds == fails > 0, holds > 0, fails > 0, True].index(True)]
        topics.setdefault(word, []).append(GROUPS[group]["topic"] + f" ({holds} of {len(mine)} hold)" * (0 < holds < len(mine)))
    return " ".join(f"{word}: {', '.join(topics[word])}." for word in summaries if word in topics)


def page(verdicts: pd.DataFrame) -> str:
    """The claims page: a section per group of claims, with a table per claim (a row per verdict) and the protocols below them."""
    header, sections = ("verdict", "model, pattern", "effect", "seeds", "why", "protocol"), []
    for group, mine in verdicts.groupby("group", sort=False):
        used = mine[mine["protocol"] != ""].groupby("protocol", sort=False)["keys"]
        records = {protocol: len(set().union(*keys)) for protocol, keys in used}
        numbers, tabled = {protocol: number for number, protocol in enumerate(records, 1)}, []
        for (statement, compared), own in mine.groupby(["statement", "comparison"], sort=False):
            rows = [
                (f"{MARKS[v['verdict']]} {v['verdict']}", found_in(v), effect_words(v), v["seeds"] or "", v["reason"],
                 numbers.get(v["protocol"], "")) for _, v in own.iterrows()
            ]  # fmt: skip
            tabled += ["", f"**{statement}**: {compared}", "", *tables.markdown(header, rows)]
        about = {"remark": ""} | GROUPS[group] | {"group": group, "tables": "\n".join(tabled[1:])}
        sections.append(about | {"protocols": records})
    states = _counting(verdicts)["verdict"]
    counted = {"compared": states.isin([HOLDS, FAILS, UNSURE]).sum(), "decided": states.isin([HOLDS, FAILS]).sum()}
    rules = {"margin": MARGIN, "close": CLOSE, "seeds": SEEDS, "unsure": UNSURE}
    marks = ", ".join(f"{mark} {state}" for state, mark in MARKS.items())
    return render(PAGE, marks=marks, counts=count_words(verdicts), sections=sections, **counted, **rules)


def count_words(verdicts: pd.DataFrame) -> str:
    """How many verdicts are decided, and which way; how many are not, and why."""
    counting = _counting(verdicts)
    holds, fails, open_, untestable, _ = ((counting["verdict"] == state).sum() for state in MARKS)
    decided, without = holds + fails, (verdicts["verdict"] == NOT_RUN).sum()
    if not decided + open_:
        return "No verdict yet: there are no records."
    compared = decided + open_
    said = f"{decided} of {compared} comparisons are decided ({decided / compared:.0%}): {holds} hold, {fails} do not."
    said += " Counted are verdicts by perplexity on the first text, and by cost; those by KL divergence are in the tables."
    said += f" {untestable} cannot be tested with these models." * bool(untestable)
    said += f" {without} more were not run." * bool(without)
    older, words = counting["older"].sum(), "on other windows of text or in another precision; they will be run anew"
    said += f" {older} are of an older protocol, {words}." * bool(older)
    both = counting.dropna(subset="second_verdict")
    same = both["verdict"] == both["second_verdict"]
    return said + f" On the second text, {same.sum()} of {len(same)} have the same verdict." * bool(len(same))


def worded(verdicts: pd.DataFrame) -> pd.DataFrame:
    """`verdicts` with four more columns: the heading and remark on the page, and recipe and effect in words."""
    headings = [f"{group}. {GROUPS[group]['title']}" for group in verdicts["group"]]
    remarks = [GROUPS[group].get("remark", "").strip() for group in verdicts["group"]]
    recipes = verdicts["recipe"].replace("", "default").map(RECIPE_WORDS) + verdicts["older"].map({True: f", {OLDER}", False: ""})
    effects = verdicts.apply(effect_words, axis=1)
    return verdicts.assign(heading=headings, remark=remarks, recipe_words=recipes, effect_words=effects)


def _not_run_words(verdicts: pd.DataFrame) -> str:
    counts = verdicts.loc[verdicts["verdict"] == NOT_RUN, "group"].value_counts(sort=False)
    titles = {group: GROUPS[group]["title"] for group in counts.index}
    said = "; ".join(f"{counts[group]} of *{title[0].lower()}{title[1:]}*" for group, title in titles.items())
    return f"Comparisons that were not run: {said}." if said else ""


def headlines(verdicts: pd.DataFrame) -> str:
    """Each main claim of the paper, with a table of its comparisons at the main pattern: a column for each model and recipe."""
    parts, main = [], verdicts[(verdicts["pattern"] == DEFAULTS["pattern"]) & (verdicts["seeds"] > 0)]
    for number, about in _YAML["headlines"].items():
        mine, cells, statements = main[main["claim"].isin(about["claims"])], {}, {}
        today = mine["model"].where(mine["recipe"] == "default").dropna().unique()
        earlier = (mine["recipe"] == "first-skipped") & mine["model"].isin(today)  # in the default's column, labelled
        columns = mine["recipe"].mask(earlier, "default")
        for (_, v), column in zip(mine.iterrows(), columns):
            unit = {"nats per token": "nats", "of the perplexity gap": "share"}.get(v["unit"], v["unit"])
            said = [v["note"]] * (v["test"] in ("gap", "memory", "combined"))
            said += re.findall(rf"borderline|fewer than {SEEDS} seeds", v["reason"])
            effect = effect_words(v).removesuffix(v["unit"]).strip().replace("-", "−").replace(" [", "<br>[")
            mark = MARKS[v["verdict"]] + "†" * bool(v["older"])
            if v["second_verdict"] in MARKS:
                said += [f"second text: {MARKS[v['second_verdict']]} {v['second_effect']:+.3f}".replace("-", "−")]
            said += [RECIPE_WORDS[v["recipe"]]] * (column != v["recipe"])
            cells[v["claim"], v["model"], column] = "<br>".join([f"{mark} {effect}", *said])
            statements[v["claim"]] = f"{v['statement']} ({unit})".replace(") (", "; ")
        places = list(dict.fromkeys(zip(mine["model"], columns)))
        rows = [(says, *(cells.get((claim, *place), "") for place in places)) for claim, says in statements.items()]
        heads = [f"{model}, {RECIPE_WORDS[recipe or 'default']}" for model, recipe in places]
        parts += [f"**{number}. {about['says']}.**", "", *(tables.markdown(("", *heads), rows) if rows else []), ""]
    return "\n".join(parts).strip()


def summary(verdicts: pd.DataFrame) -> str:
    """A short table, a row per group of claims: its verdicts counted over claims, models and patterns, and one example."""
    rows = []
    for group, mine in _counting(verdicts[~verdicts["optional"]]).groupby("group", sort=False):
        first = _at_main_pattern(mine).iloc[0]
        place = f"{found_in(first)}; seeds: {first['seeds']}"
        example = f"{MARKS[first['verdict']]} {first['statement']}: {effect_words(first) or first['reason']} ({place})"
        rows.append((CLAIMS.get(group, "also"), GROUPS[group]["title"], _counted(mine), example))
    rows.sort(key=lambda row: row[0])
    lines = tables.markdown(("claim", "what it says", "verdicts", "for example"), rows) if rows else []
    return "\n".join([*lines, "", _not_run_words(verdicts[~verdicts["optional"]])]).strip()


def artifact(verdicts: pd.DataFrame, runs: pd.DataFrame, again: pd.DataFrame) -> str:
    """For each claim, model and recipe, at its main pattern: the expected effect, and the time that the runs took.

    again: some of the runs, repeated on another machine; the differences in perplexity give the tolerance.
    """
    hours = runs["seconds_total"].sum() / 3600 if len(runs) else 0
    said = [f"The {len(runs)} committed runs took {hours:.1f} h in all, one after the other."]
    if len(again) and len(both := runs.merge(again, on="key", suffixes=("", "_again"))):
        states = [np.abs(np.log(both[name] / both[f"{name}_again"])) for name in ("pruned_perplexity", "perplexity")]
        apart = np.maximum(*states).groupby(both["pattern"])
        most = [f"{100 * own.max():.1g} % at {pattern} (runs: {len(own)})" for pattern, own in apart]
        devices = ", ".join(sorted({*both["device"], *both["device_again"]}))
        said.append(f"Tolerance: the same run on another machine differs in perplexity by up to {', '.join(most)}; on {devices}.")
    shown = _at_main_pattern(_counting(verdicts[~verdicts["optional"]]))
    rows, seconds = [], dict(zip(runs.get("key", ()), runs.get("seconds_total", ())))
    for _, v in shown.iterrows():
        minutes = f"{sum(seconds[key] for key in v['keys']) / 60:.0f} min"
        effect, _, interval = effect_words(v).partition(" [")
        effect += f" {v['unit']}" * bool(interval)
        rows.append((v["statement"], found_in(v), v["notebook"], effect, MARKS[v["verdict"]], minutes))
    header = "claim", "model, pattern", "notebook", "expected", "verdict", "time"
    return "\n".join([" ".join(said), "", *tables.markdown(header, rows)])


def pages(records: Path, page_path: Path, readme: Path | None, profile: str = "laptop") -> tuple:
    """The texts that files should hold, by path; the verdicts; and the keys of records of an older protocol. The files: the page;
    the article, tables and gallery beside it; and, if `readme` is given, the README and ARTIFACT.md."""
    runs, ladder, folder = load(records), load(records / "ladder"), page_path.parent
    verdicts, today = judge(runs, ladder=ladder, profile=profile), settings(profile).get("1-granularity", {}).get("common", {})
    other = [runs[name] != today[name] for name in ("evaluation_samples", "evaluation_length") if len(runs) and name in today]
    older = set(runs.loc[np.any(other, axis=0) & (runs["seed"] < SEARCH), "key"]) if other else ()
    told = tables.texts(runs, older)
    texts = {page_path: page(verdicts)} | {folder / "tables" / name: text for name, text in told.items()}
    counts, short = count_words(verdicts), in_short(central(verdicts))
    texts[folder / "article.md"] = article(worded(verdicts), runs, folder, counts, short, profile)
    texts[folder / "README.md"] = gallery(profile, summary(verdicts), folder, told, older)
    if not readme:
        return texts, verdicts, older
    artifacts, measured = readme.with_name("ARTIFACT.md"), records / "bench" / "files.json"
    blocks = [
        (readme, "answers", headlines(verdicts)), (readme, "claims", summary(verdicts)),
        (artifacts, "claims", artifact(verdicts, pd.concat([runs, ladder]), load(records / "again"))),
    ]  # fmt: skip
    if measured.is_file():
        blocks.append((readme, "files", files.table(json.loads(measured.read_text(encoding="utf-8")))))
    for path, name, block in blocks:
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = (texts.get(path) or path.read_text(encoding="utf-8")).split(start)
        texts[path] = f"{head}{start}\n{block}\n{end}{rest.split(end)[1]}"
    return texts, verdicts, older


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages that are not current; with --check, only names them. Returns 1 if --check found any, else 0."""
    parser = argparse.ArgumentParser(prog="python -m companion.judge", description="Judge the paper's claims from run records.")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "laptop")
    parser.add_argument("--page", type=Path, default=ROOT / "figures" / "claims.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with <!-- --> marks; ARTIFACT.md beside it")
    given = parser.parse_args(arguments)
    texts, *_ = pages(given.records, given.page, given.readme)
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path} is not what the records give; run: python -m companion.judge" if given.check else f"written: {path}")
        if not given.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[path], encoding="utf-8")
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
