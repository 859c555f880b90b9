"""What a figure's caption says of its runs: seeds, learning rates, what dense is, how perplexity was measured."""

from collections.abc import Iterable, Sequence

import pandas as pd

from recon.paper.figures import sentence
from recon.paper.runs import Run, short
from recon.paper.runs import protocol_words as runs_words
from recon.study.record import RunRecord


def seed_words(runs: pd.DataFrame, by: str) -> str:
    """Which seeds the values of the column `by` were run with: "seeds 0, 1, 2 (seed 0 for lora, norms)"."""
    groups: dict[tuple, list[str]] = {}
    for name, seeds in runs.groupby(by, sort=False, observed=True)["seed"]:
        groups.setdefault(tuple(sorted(set(seeds))), []).append(f"'{name}'" if "," in str(name) else str(name))
    words = {seeds: f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" for seeds in groups}
    most = max(groups, key=lambda seeds: (len(groups[seeds]) * len(seeds), len(seeds)))
    others = [f"{words[seeds]} for {', '.join(names)}" for seeds, names in groups.items() if seeds != most]
    return words[most] + (f" ({'; '.join(others)})" if others else "")


def rate_words(names: Iterable[str], rates: dict[str, float], default: float) -> str:
    """The learning rate of each of `names`, `default` where `rates` has none: "0.01 for none, 0.03 for lora"."""
    return ", ".join(f"{rates.get(name, default):g} for {name}" for name in dict.fromkeys(names))


def method_words(names: Iterable[str]) -> str:
    """What names of recipes mean, each in a sentence with a space after it; of those that occur."""
    said = {
        ", distilled": "Distilled: on the dense model's predictions. ",
        "dense, ": '"dense, ...": the dense model, retrained likewise. ',
    }
    return "".join(words for part, words in said.items() if any(part in name for name in names))


def dense_words(records: Iterable[RunRecord]) -> str:
    """What the weights of each dense model are: "Dense weights: smollm2-135m dequantised from ...; gemma3-270m dequantised from ...".

    Empty where the records do not say, as those of earlier versions.
    """
    found = {short(record.spec["model"]): record.protocol.get("dense") for record in records}
    words = "; ".join(f"{name} {weights}" for name, weights in found.items() if weights)
    return f"Dense weights: {words}." if words else ""


def evaluation_words(records: Sequence[RunRecord]) -> str:
    """How `records`, of one protocol, were made and measured, and what the dense models are, in sentences."""
    return f"{sentence(_made(list(map(Run, records))))}. {dense_words(records)}".strip()


def protocol_words(runs: pd.DataFrame, records: Sequence[RunRecord]) -> str:
    """How the runs of `records`, which differ in what a figure compares alone, were made and measured, in sentences.

    Where further models or patterns had another protocol, each protocol is said, with its cells first.
    """
    cells = runs.assign(cell=[_cell(model, pattern) for model, pattern in zip(runs["model"], runs["pattern"])])
    groups: dict[tuple, list[Run]] = {}
    for run in map(Run, records):
        groups.setdefault((run.samples, run.protocol), []).append(run)
    said = {_made(group): ", ".join(dict.fromkeys(_cell(run.model, run.pattern) for run in group)) for group in groups.values()}
    words = " ".join(f"{names}: {made}." if len(said) > 1 else f"{sentence(made)}." for made, names in said.items())
    return f"{sentence(seed_words(cells, 'cell'))}. {words} {dense_words(records)}".strip()


def _made(runs: list[Run]) -> str:
    """The protocol of `runs`, and how windows were fitted where all were fitted alike."""
    fitted = [run for run in runs if run.setting["granularity"] != "none"]
    alike = {name: {run.setting[name] for run in fitted} for name in ("propagation", "loss")}
    how = [f"{value} {name}" for name, values in alike.items() if len(values) == 1 for value in values]
    return "; ".join([runs_words(runs), *([", ".join(how)] if how else [])])


def _cell(model: str, pattern: str) -> str:
    return f"{short(model)} {pattern}"
