"""Seeds and learning rates of a figure's runs, in words for its caption."""

from collections.abc import Iterable

import pandas as pd


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
    """The learning rate of each of `names`, `default` where `rates` has none: "0.003 for smollm2-135m, 0.0001 for gemma3-270m"."""
    return ", ".join(f"{rates.get(name, default):g} for {name}" for name in dict.fromkeys(names))
