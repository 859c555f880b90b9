"""The paper's tables from runs, each as Markdown, LaTeX and CSV: mean ± standard deviation (seeds), the best in bold.

Beside them stands what the paper reports, if that is known; its own tables could not be read here.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from companion.compare import curve, once, pick, studies
from companion.frame import DEFAULTS, protocol

HALF, WHOLE = {"granularity": "half-block"}, {"chunks": 1}  # whole samples: windows of every size make the same steps
MEASURES = {"own": "perplexity", "other": "perplexity on another text", "kl": "KL to dense"}
_FITS = {
    "matrix": {"granularity": "matrix"}, "matrix exact": {"granularity": "matrix", "solver": "exact"}, "half-block": HALF,
    "half-block from exact": HALF | {"start": "exact"},
    **{name: {"granularity": name} for name in ("block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model")},
}  # fmt: skip
_GRID = [(a, b) for a in ("dense", "sparse", "mixed") for b in ("mse", "cosine", "whitened")]
TABLES = {  # name -> title, row -> options, measures
    "table-1": ("Table 1: reconstruction beside retraining", {"reconstruction": HALF} | {
        name: {"granularity": "none", "retrain": name} for name in ("masklora", "full", "lora", "scalelora", "norms")
    }, ("own", "other", "kl")),
    "table-3": ("Table 3: the size of the window", {name: options | WHOLE for name, options in _FITS.items()}, ("own",)),
    "table-4": (
        "Table 4: the pruning criterion",
        {name: HALF | {"criterion": name} for name in ("magnitude", "wanda", "sparsegpt")}, ("own",),
    ),
    "appendix-b": (
        "Appendix B: propagation and loss",
        {f"{a}, {b}": HALF | {"propagation": a, "loss": b} for a, b in _GRID}, ("own", "other", "kl"),
    ),
}  # fmt: skip
# The paper's values, as far as a summary of it gives them: LLaMA-3-8B at 50 %, WikiText-2 perplexity.
PAPER = {
    ("table-3", "dense"): "about 5.8 (LLaMA-3-8B)",
    ("table-3", "half-block"): "about 7.8 (LLaMA-3-8B, 50 %)",
    ("table-3", "block"): "within about 0.1 of half-block",
    ("table-4", "sparsegpt, reconstructed"): "within about 0.1 of wanda",
    ("table-1", "reconstruction"): "2,048 samples",
    ("table-1", "masklora"): "131,072 samples for the same quality",
}


def markdown(header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def cells(runs: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of a table (row, column, mean, std, seeds), and the runs behind them.

    For each model and pattern, of the protocol that fills most of the table; of several, that with the most runs.
    """
    _, rows, measures = TABLES[name]
    by_samples, criteria = name == "table-1", name == "table-4"
    runs = runs[runs["chunks"] == 1] if name == "table-3" else runs
    runs = runs[runs["pattern"] == DEFAULTS["pattern"]] if name in ("table-1", "appendix-b") else runs
    runs = runs[runs["model"] == DEFAULTS["model"]] if by_samples else runs
    shown, used = [], []
    for scope, groups in studies(runs, "own", "protocol", *["samples"] * (not by_samples), "model", "windows"):
        place = ", ".join(part for part in scope if part != "default")
        choices = []
        for key, group in groups.items():
            sides = {
                (row, side["trained"].iloc[0]): side
                for row, options in rows.items()
                for side in _sides(group, options, by_samples)
            }
            choices.append((len(sides), len(group), key, dict(sorted(sides.items(), key=lambda each: by_samples * each[0][1]))))
        sides = max(choices, key=lambda choice: choice[:3])[3]
        for measure in [measure for measure in measures if sides and f"{measure}_pruned" in runs]:
            words, first = f", {MEASURES[measure]}" * (len(measures) > 1), next(iter(sides.values()))
            marks = [(state, "", first, state) for state in ("dense", "pruned")[: 1 if criteria else 2] if not by_samples]
            for (row, count), side in sides.items():
                states = (
                    {f"{row}, {state}": state for state in ("pruned", "reconstructed")} if criteria else {row: "reconstructed"}
                )
                marks += [(label, count, side, state) for label, state in states.items()]
            for label, count, side, state in marks:
                known = side[side[f"{measure}_{state}"].notna()]
                values = np.array([known.at[unit, f"{measure}_{state}"].mean() for unit in once(known.index)])
                values = values if measure == "kl" else np.exp(values)
                if len(values):
                    spread = values.std(ddof=1) if len(values) > 1 else 0.0
                    column = f"{count} samples{words}" if by_samples else f"{place}{words}"
                    shown.append({"row": label, "column": column, "mean": values.mean(), "std": spread, "seeds": len(values)})
                    used.append(known.reset_index())
    if not shown:
        return pd.DataFrame(), runs
    data = pd.DataFrame(shown)
    order = ["dense", "pruned", *data["row"]]
    data["column"] = pd.Categorical(data["column"], list(dict.fromkeys(data["column"])))
    return data.sort_values("row", key=lambda rows: rows.map(order.index), kind="stable", ignore_index=True), pd.concat(used)


def _sides(runs: pd.DataFrame, options: dict, by_samples: bool) -> list[pd.DataFrame]:
    return [side for side in (curve(runs, options) if by_samples else [pick(runs, options)]) if len(side)]


def texts(runs: pd.DataFrame) -> dict[str, str]:
    """The files of all tables, by name: `<table>.md`, `.tex` and `.csv`; the same bytes for the same runs."""
    files = {}
    for name, (title, _, _) in TABLES.items() if len(runs) else ():
        data, used = cells(runs, name)
        if data.empty:
            continue
        caption = f"Mean ± standard deviation (seeds), lower is better, the best of each column in bold. {protocol(used)} "
        caption += "Paper: of its own models, from a summary of it; its tables could not be read here."
        shown = _words(data, name, "**{}**")
        rows = [[row, *line] for row, line in zip(shown.index, shown.to_numpy())]
        files[f"{name}.md"] = "\n".join([f"# {title}", "", *markdown(["", *shown.columns], rows), "", caption]) + "\n"
        plain = _words(data, name, r"\textbf{{{}}}").rename(index=_escaped, columns=_escaped).map(_escaped)
        files[f"{name}.tex"] = plain.style.to_latex(hrules=True, caption=_escaped(f"{title}. {caption}"), label=f"tab:{name}")
        files[f"{name}.csv"] = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return files


def _words(data: pd.DataFrame, name: str, bold: str) -> pd.DataFrame:
    """The table as text: "mean ± std (seeds)", the lowest mean of each column in bold, dense and pruned aside."""
    rivals = data["mean"].where(~data["row"].isin(("dense", "pruned")))
    leads = data["mean"] == rivals.groupby(data["column"], observed=True).transform("min")
    said = [
        f"{mean:.2f}{f' ± {std:.2f}' * (seeds > 1)} ({seeds})"
        for mean, std, seeds in zip(data["mean"], data["std"], data["seeds"])
    ]
    words = data.assign(said=[bold.format(text) if lead else text for text, lead in zip(said, leads & rivals.notna())])
    shown = words.pivot(index="row", columns="column", values="said").fillna("").loc[data["row"].unique()]
    shown = shown.rename_axis(index=None, columns=None)
    shown.columns = shown.columns.astype(str)
    return shown.assign(paper=[PAPER.get((name, row), "") for row in shown.index])


def _escaped(text: str) -> str:
    for plain, tex in {"%": r"\%", "_": r"\_", "&": r"\&", "<": "$<$", "->": r"$\to$", "±": r"$\pm$"}.items():
        text = str(text).replace(plain, tex)
    return text
