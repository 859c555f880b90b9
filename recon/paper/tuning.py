"""Learning rates chosen on held-out text."""

import pandas as pd


def best(runs: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Of the finished runs of each value of the column (or columns) `by`, the one with the lowest perplexity on held-out text."""
    if "held_out_perplexity" not in runs:
        return runs.iloc[:0]
    known = runs.dropna(subset="held_out_perplexity")
    return known.loc[known.groupby(by)["held_out_perplexity"].idxmin()]
