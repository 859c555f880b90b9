"""The paper's tables from runs, each as Markdown, LaTeX and CSV: mean ± standard deviation (seeds), the best in bold.

The column "paper" has what the paper reports, as far as that is known; the paper's tables could not be read here.
"""

import itertools
from collections.abc import Container, Iterable, Sequence

import numpy as np
import pandas as pd

from companion.compare import SEEDS, common, curve, once, pick, studies
from companion.frame import DEFAULTS, MEMORY, RECIPE_WORDS, current, fit_options, protocol
from companion.publish import OLDER_WORDS

HALF = {"granularity": "half-block"}
MEASURES = {"own": "perplexity", "other": "perplexity, second text", "kl": "KL to dense"}
COSTS = {"flops": (1e12, "TFLOP"), MEMORY: (1, MEMORY)}  # column of a frame -> unit, heading
_FITS = "matrix, matrix exact, half-block, half-block from exact, block, 2-blocks, 4-blocks, 8-blocks, quarter, model".split(", ")
_GRID = [(a, b) for a in ("dense", "sparse", "mixed") for b in ("mse", "cosine", "whitened")]
TABLES = {  # name -> title, {row: options}, measures; with several measures, each model, pattern and recipe has its own table
    "table-1": ("Table 1: reconstruction beside retraining", {"reconstruction": HALF} | {
        name: {"granularity": "none", "retrain": name} for name in ("masklora", "full", "lora", "scalelora", "norms")
    }, ("own", "other", "kl")),
    "table-3": (
        "Table 3: the size of the window",
        {fit: {name: value for name, [value] in fit_options(fit).items()} for fit in _FITS}, ("own",),
    ),
    "table-4": (
        "Table 4: the pruning criterion",
        {name: HALF | {"criterion": name} for name in ("magnitude", "wanda", "sparsegpt", "ria")}, ("own",),
    ),
    "appendix-b": (
        "Appendix B: propagation and loss",
        {f"{a}, {b}": HALF | {"propagation": a, "loss": b} for a, b in _GRID}, ("own", "other", "kl"),
    ),
}  # fmt: skip
# The paper's values that are known, from a summary of it: LLaMA-3-8B at 50 %, WikiText-2 perplexity.
PAPER = {
    ("table-3", "dense"): "about 5.8 (LLaMA-3-8B)",
    ("table-3", "half-block"): "about 7.8 (LLaMA-3-8B, 50 %)",
    ("table-3", "block"): "within about 0.1 of half-block",
    ("table-4", "sparsegpt, reconstructed"): "mostly within 0.1 of wanda (reviews of the paper, ICLR 2026)",
}


def markdown(header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def cells(runs: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of a table (panel, row, column, mean, std, seeds), and the runs behind them.

    For each model, pattern and recipe, only runs of one protocol are used. It is chosen by these in turn: two rows or more, the
    most evaluation windows, the most rows, the most runs. A table of one row compares nothing, and is left out.
    """
    _, rows, measures = TABLES[name]
    by_samples, criteria = name == "table-1", name == "table-4"
    runs = runs if name == "appendix-b" else current(runs)  # appendix B has too few runs of today's default yet
    runs = runs[runs["pattern"] == DEFAULTS["pattern"]] if name in ("table-1", "appendix-b") else runs
    shown, used = [], []
    for scope, groups in studies(runs, "own", "protocol", *["samples"] * (not by_samples), "model", "windows"):
        place, choices = ", ".join((*scope[:2], RECIPE_WORDS[scope[2]])), []
        for key, group in groups.items():
            found = [
                (row + f", {side['trained'].iloc[0]} samples" * by_samples, side)
                for row, options in rows.items()
                for side in (curve(group, options) if by_samples else [pick(group, options)])
                if len(side)
            ]
            choices.append((len(found) > 1, group["evaluation_samples"].iloc[0], len(found), len(group), key, found))
        *_, sides = max(choices, key=lambda choice: choice[:5])
        if len(sides) < 2:
            continue
        if criteria:  # one criterion may have more seeds than the others
            units = common(*(side for _, side in sides))
            sides = [(row, side[side.index.isin(units)]) for row, side in sides]
        panel = place * (len(measures) > 1)
        used += [side.reset_index().assign(panel=panel) for _, side in sides]
        marks = [(state, sides[0][1], state) for state in ("dense", "pruned")[: 2 - criteria]]
        states = ("pruned", "reconstructed")[1 - criteria :]
        marks += [(row + f", {state}" * criteria, side, state) for row, side in sides for state in states]
        for measure, (label, side, state) in itertools.product(measures, marks):
            known = side[side[f"{measure}_{state}"].notna()]
            values = np.array([known.at[unit, f"{measure}_{state}"].mean() for unit in once(known.index)])
            if len(values):
                mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
                mean, spread = (mean, spread) if measure == "kl" else (np.exp(mean), np.exp(mean) * spread)
                cell = {"panel": panel, "row": label, "column": MEASURES[measure] if panel else place}
                shown.append(cell | {"mean": mean, "std": spread, "seeds": len(values)})
        for (row, side), (cost, (unit, heading)) in itertools.product(sides if by_samples else (), COSTS.items()):
            cell = {"panel": panel, "row": row, "column": heading}
            shown.append(cell | {"mean": side[cost].mean() / unit, "std": 0.0, "seeds": 0})
    return pd.DataFrame(shown), pd.concat(used) if used else runs


def texts(runs: pd.DataFrame, older: Container[str] = ()) -> dict[str, str]:
    """The files of all tables, `<table>.md`, `.tex` and `.csv`, by name; older: keys of the runs of an older protocol."""
    files = {}
    for name, (title, _, _) in TABLES.items() if len(runs) else ():
        data, used = cells(runs, name)
        if data.empty:
            continue
        caption = "Mean (of perplexities: geometric) ± standard deviation (seeds), lower is better. Bold: the lowest of a "
        used = used.assign(model=used["model"] + ", " + used["recipe"].map(RECIPE_WORDS))
        caption += f"column, of {SEEDS} seeds or more; runs of one seed are pairs, so verdicts tell more. {protocol(used)}"
        told = " Paper: of its own models, from a summary of it; its tables could not be read here."
        caption += told * any(table == name for table, _ in PAPER)
        page, tex = [f"# {title}"], []
        dated = {panel: f" {OLDER_WORDS}" * any(key in older for key in own["key"]) for panel, own in used.groupby("panel")}
        for panel, part in data.groupby("panel", sort=False):
            shown = _words(part, name, "**{}**")
            rows = [[row, *line] for row, line in zip(shown.index, shown.to_numpy())]
            page += ["", f"**{panel}**{dated[panel]}"] * bool(panel) + ["", *markdown(["", *shown.columns], rows)]
            plain = _words(part, name, r"\textbf{{{}}}").rename(index=_escaped, columns=_escaped).map(_escaped)
            said = _escaped(". ".join(filter(None, (title, panel, caption))) + dated[panel])
            tex.append(plain.style.to_latex(hrules=True, caption=said, label=f"tab:{name}{len(tex) or ''}"))
        files |= {f"{name}.md": "\n".join([*page, "", caption + dated.get("", "")]) + "\n", f"{name}.tex": "\n".join(tex)}
        files[f"{name}.csv"] = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return files


def _words(data: pd.DataFrame, name: str, bold: str) -> pd.DataFrame:
    """A panel as text: "mean ± std (seeds)", each column's lowest in bold; not dense, pruned, costs or few seeds."""
    rivals = data[~data["row"].str.endswith(("dense", "pruned")) & (data["seeds"] >= SEEDS)]
    best, said = set(rivals.groupby("column")["mean"].idxmin()), []
    for index, cell in data.iterrows():
        mean, std, seeds = cell["mean"], cell["std"], cell["seeds"]
        words = f"{mean:.2f}{f' ± {std:.2f}' * (seeds > 1)} ({seeds})" if seeds else f"{mean:.3g}"
        said.append(bold.format(words) if index in best else words)
    shown = data.assign(said=said).pivot(index="row", columns="column", values="said").fillna("")
    shown = shown.loc[list(dict.fromkeys(data["row"])), list(dict.fromkeys(data["column"]))]
    known = [PAPER.get((name, row), "") for row in shown.index]
    return shown.rename_axis(index=None, columns=None).assign(**{"paper": known} if any(known) else {})


def _escaped(text: str) -> str:
    for plain, tex in {"%": r"\%", "_": r"\_", "&": r"\&", "<": "$<$", "->": r"$\to$", "±": r"$\pm$"}.items():
        text = str(text).replace(plain, tex)
    return text
