"""ARTIFACT.md: how to check the artifact in three tiers, and for each claim what to expect of it."""

import math
from collections.abc import Iterable, Sequence

from recon.paper.runs import short
from recon.paper.verdicts import MARKS, UNTESTABLE, Verdict, not_run_words
from recon.study.cost import duration
from recon.study.record import RunRecord

# Group of claims -> the notebook whose runs judge it.
NOTEBOOKS = {group: "1-granularity" for group in "1234"} | {
    "5a": "2-sample-efficiency",
    "5b": "2-sample-efficiency",
    "6": "2-sample-efficiency",
    "7": "3-criterion-convergence",
    "8": "3-criterion-convergence",
    "9": "4-propagation-and-loss",
    "10": "4-propagation-and-loss",
    "11": "5-what-reviewers-asked",
}
PAGE = """# Checking the artifact

Three tiers, each a command in a fresh checkout. Written by `python -m recon.paper.claims`, from the records in `results/laptop/`.

## 1. Fifteen minutes: does it run?

```sh
./run_all.sh
```

Needs two cores and no GPU. Every notebook runs on a real LLM, small; each must end as finished, and `build/quick/html/index.html` shows what they
drew. Its numbers are of one seed and are not those of the tables below. Nothing but records is needed for two more checks:

```sh
./run_all.sh figures                        # draws the committed figures again; `git status` must show no data changed (*.csv)
source .venv/bin/activate                   # unless an environment of your own was active
python -m recon.paper.claims --check        # the committed verdicts, and this page, are what the committed records give
```

## 2. Hours: are the numbers the same?

```sh
./run_all.sh laptop
```

{laptop}
The profile asks for more runs than are committed, so all of it takes longer. The command can be killed and started again. Records that are there
are not computed again, so move them away first: `mv results/laptop elsewhere`.

## 3. GPUs: the paper's models

```sh
./run_all.sh paper
```

Needs GPUs and access to the Hugging Face Hub. Records go to `results/paper/`, figures and verdicts to `figures/paper/`.
[`recon plan`](guides/plans.md) says for each run beforehand what memory and time it takes; [Ray](guides/many-machines.md) spreads them over GPUs.

## What to expect, claim by claim

For each claim and model, at its main pattern: the notebook that judges it (`./run_all.sh laptop NOTEBOOK`), the effect, the tolerance, and the time
that the runs behind it took. The tolerance is the interval of the verdict: another machine rounds differently, and its effect should lie within.
The verdict should be the same. How verdicts are made, and those on other patterns: [figures/claims.md](figures/claims.md).
"""


def to_artifact(verdicts: Sequence[Verdict], records: Iterable[RunRecord]) -> str:
    """The page. `verdicts`: those to list, in order; of each claim and model the first one is taken."""
    done = {record.key: record for record in records if record.status == "done"}
    lines = [PAGE.format(laptop=_took(done.values()))]
    first = {(verdict.claim, verdict.model): verdict for verdict in reversed(verdicts) if verdict.records}
    listed = [first[key] for key in dict.fromkeys((v.claim, v.model) for v in verdicts) if key in first]
    if listed:
        lines += [
            "| claim | model, pattern | notebook | expected | tolerance | verdict | time |",
            "|---|---|---|---|---|---|---|",
        ]
    for verdict in listed:
        where = ", ".join(part for part in (short(verdict.model), verdict.pattern) if part)
        seconds = sum(done[key].seconds.get("total", 0) for key in verdict.records)
        cells = (
            verdict.statement, where, NOTEBOOKS[verdict.group], *_expected(verdict), f"{MARKS[verdict.verdict]} {verdict.verdict}", duration(seconds),
        )  # fmt: skip
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join([*lines, "", not_run_words(verdicts)]).rstrip() + "\n"


def _expected(verdict: Verdict) -> tuple[str, str]:
    """The effect with its unit, and the interval; nothing where it could not be tested."""
    if verdict.verdict == UNTESTABLE:
        return "", ""
    form = "{:.3g}" if verdict.unit.startswith("times") else "{:+.3f}"
    effect, low, high = (
        "?" if math.isnan(x) else form.format(x).replace("inf", "∞") for x in (verdict.effect, verdict.low, verdict.high)
    )
    return f"{verdict.bound} {effect} {verdict.unit}".strip(), f"[{low}, {high}]"


def _took(records: Iterable[RunRecord]) -> str:
    """What the committed runs took, and on what."""
    records = list(records)
    if not records:
        return "There are no records yet that would say how long it takes."
    seconds = sum(record.seconds.get("total", 0) for record in records)
    machines = {
        f"{record.environment.get('device')}, {(threads := record.environment.get('threads'))} thread{'s' * (threads != 1)}"
        for record in records
    }
    commits = {str(record.environment.get("git_commit"))[:10] for record in records}
    return (
        f"The {len(records)} committed runs took {duration(seconds)} in all, one after the other ({'; '.join(sorted(machines))}), at "
        f"commit{'s' * (len(commits) != 1)} {', '.join(sorted(f'`{commit}`' for commit in commits))}."
    )
