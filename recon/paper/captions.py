"""What a figure's caption says of its runs: seeds, learning rates, what dense is, how perplexity was measured."""

from collections.abc import Iterable, Sequence

import pandas as pd

from recon.experiment.record import RunRecord
from recon.paper.figures import sentence
from recon.paper.runs import short


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


def dense_words(records: Iterable[RunRecord]) -> str:
    """What the weights of each dense model are: "Dense weights: smollm2-135m dequantised from ...; gemma3-270m dequantised from ...".

    Empty where the records do not say, as those of earlier versions.
    """
    found = {short(record.spec["model"]): record.protocol.get("dense") for record in records}
    words = "; ".join(f"{name} {weights}" for name, weights in found.items() if weights)
    return f"Dense weights: {words}." if words else ""


def evaluation_words(records: Sequence[RunRecord]) -> str:
    """How the perplexities of `records` were measured, and what the dense models are, in sentences."""
    return f"{sentence(records[0].protocol['evaluation'])}. {dense_words(records)}".strip()


def protocol_words(runs: pd.DataFrame, records: Sequence[RunRecord]) -> str:
    """How the runs of `records`, which differ in what a figure compares alone, were made and measured, in sentences.

    Where further models or patterns had another protocol, each protocol is said, with its cells first.
    """
    cells = runs.assign(cell=[_cell(model, pattern) for model, pattern in zip(runs["model"], runs["pattern"])])
    found: dict[str, dict[str, None]] = {}  # the protocol in words -> the names of its cells, in order
    for record in records:
        spec = record.spec
        text = f" Of these texts, {short(spec['evaluation_texts'][0])} is drawn." if len(spec["evaluation_texts"]) > 1 else ""
        said = (
            f"Calibration: {spec['samples']} x {spec['sequence_length']} tokens of {short(spec['text'])}. "
            f"Learning rate: {spec['learning_rate']:g} ({spec['rate']}). {sentence(record.protocol['evaluation'])}.{text}"
        )
        found.setdefault(said, {})[_cell(spec["model"], spec["pattern"])] = None
    if len(found) > 1:
        words = " ".join(f"{', '.join(names)}: {said[0].lower()}{said[1:]}" for said, names in found.items())
    else:
        [words] = found
    return f"{sentence(seed_words(cells, 'cell'))}. {words} {dense_words(records)}".strip()


def _cell(model: str, pattern: str) -> str:
    return f"{short(model)} {pattern}"
