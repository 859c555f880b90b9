"""The paper's tables from run records, each as Markdown, LaTeX and CSV: mean ± standard deviation (seeds), the best in bold.

Beside them stands what the paper reports, where that is known; its own tables could not be read here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from recon.paper.comparisons import points
from recon.paper.runs import DEFAULTS, MEASURES, Run, Seed, once, pick, protocol, protocol_words, short
from recon.paper.verdicts import markdown_table
from recon.study.record import RunRecord

HALF, WHOLE = {"granularity": "half-block"}, {"chunks": 1}
FITS = {  # row -> options: windows of every size make the same steps
    "matrix": {"granularity": "matrix"}, "matrix exact": {"granularity": "matrix", "solver": "exact"}, "half-block": HALF,
    "half-block from exact": HALF | {"start": "exact"}, "block": {"granularity": "block"},
    **{name: {"granularity": name} for name in ("2-blocks", "4-blocks", "8-blocks", "quarter", "model")},
}  # fmt: skip
METHODS = {"reconstruction": HALF} | {
    name: {"granularity": "none", "retrain": name} for name in ("masklora", "full", "lora", "scalelora", "norms")
}
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
NOT_READ = "not read"
# What is known of the paper's values, via a summary of it: LLaMA-3-8B at 50 %, WikiText-2 perplexity.
PAPER = {
    ("table-3", "dense"): "about 5.8 (LLaMA-3-8B)",
    ("table-3", "half-block"): "about 7.8 (LLaMA-3-8B, 50 %)",
    ("table-3", "block"): "within about 0.1 of half-block",
    ("table-4", "sparsegpt, reconstructed"): "within about 0.1 of wanda",
    ("table-1", "reconstruction"): "2,048 samples",
    ("table-1", "masklora"): "131,072 samples for the same quality",
}


@dataclass
class Table:
    """One table: `values` has a row per cell: row, column, mean, std, seeds; `caption`: its protocol."""

    name: str
    title: str
    values: pd.DataFrame
    columns: list[str]
    caption: str

    def words(self, bold: Callable[[str], str]) -> pd.DataFrame:
        """The table as text: "mean ± std (seeds)", the lowest mean of each column but the dense model's in bold."""
        shown = pd.DataFrame("", self.values["row"].unique(), self.columns)
        rivals = self.values[~self.values["row"].isin(("dense", "pruned"))]
        best = rivals.groupby("column")["mean"].min()
        for cell in self.values.itertuples():
            spread = f" ± {cell.std:.2f}" if cell.seeds > 1 else ""
            said = f"{cell.mean:.2f}{spread} ({cell.seeds})"
            shown.loc[cell.row, cell.column] = bold(said) if cell.mean == best.get(cell.column) and cell.row != "dense" else said
        shown["paper"] = [PAPER.get((self.name, row), NOT_READ) for row in shown.index]
        return shown

    def markdown(self) -> str:
        shown = self.words(lambda said: f"**{said}**")
        rows = ([name, *line] for name, line in zip(shown.index, shown.to_numpy()))
        lines = [f"# {self.title}", "", *markdown_table(["", *shown.columns], rows), "", self.caption]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        shown = self.words(lambda said: f"\\textbf{{{said}}}")
        plain = shown.map(lambda said: said.replace("±", "$\\pm$")).rename(index=_escaped, columns=_escaped).map(_escaped)
        return plain.style.to_latex(hrules=True, caption=_escaped(f"{self.title}. {self.caption}"), label=f"tab:{self.name}")


def _escaped(text: str) -> str:
    return str(text).replace("%", "\\%").replace("_", "\\_").replace("&", "\\&").replace("<", "$<$").replace("->", "$\\to$")


class _Cells:
    """Gathers the cells of a table, and the runs that they are of."""

    def __init__(self):
        self.rows, self.runs = [], []

    def add(self, row: str, column: str, side: dict[Seed, Run], state: str = "reconstructed", measure: str = "own") -> None:
        runs = [side[seed] for seed in once(side) if measure in side[seed].measures]
        if not runs:
            return
        values = np.array([run.measures[measure][state].mean() for run in runs])
        values = values if measure == "kl" else np.exp(values)
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        self.rows.append({"row": row, "column": column, "mean": values.mean(), "std": spread, "seeds": len(values)})
        self.runs += runs

    def levels(self, column: str, side: dict[Seed, Run], measure: str = "own") -> None:
        for state in ("dense", "pruned"):
            self.add(state, column, side, state, measure)

    def table(self, name: str, title: str, what: str) -> Table | None:
        """The cells as a table whose caption begins with `what`; None without any."""
        if not self.rows:
            return None
        groups: dict[tuple, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.protocol, []).append(run)
        cells = {
            key: ", ".join(dict.fromkeys(f"{short(run.model)} {run.pattern}" for run in group)) for key, group in groups.items()
        }
        said = ". ".join(f"{cells[key]}: {protocol_words(group)}" for key, group in groups.items())
        caption = f"{what}; mean ± standard deviation (seeds), lower is better, the best of each column in bold. {said}. Paper: of its own models, from a summary of it; "
        caption += f"{NOT_READ}: its tables could not be read here."
        values = pd.DataFrame(self.rows)
        order = list(dict.fromkeys(["dense", "pruned", *values["row"]]))
        columns = list(dict.fromkeys(values["column"]))
        values = values.sort_values("row", key=lambda rows: rows.map(order.index), kind="stable", ignore_index=True)
        return Table(name, title, values, columns, caption)


def make(records: Iterable[RunRecord]) -> list[Table]:
    """The tables that finished records allow: those of the largest study of each protocol."""
    runs = [Run(record) for record in records if record.status == "done"]
    found = (_table_1(runs), _table_3(runs), _table_4(runs), _appendix_b(runs))
    return [table for table in found if table]


def _studies(runs: Iterable[Run], kind: str, sides: Callable[[list[Run]], dict], **fixed: str) -> dict[tuple[str, str], dict]:
    """By model and pattern, what `sides` gives of the protocol that fills most of the table, and of several, of that with the most runs.

    sides: gives what the rows of the table are made of, from runs of one protocol; what is not there is empty.
    """
    groups: dict[tuple[str, str], dict[tuple, list[Run]]] = {}
    for run in runs:
        if all(getattr(run, name) == value for name, value in fixed.items()):
            groups.setdefault((run.model, run.pattern), {}).setdefault(protocol(run, kind), []).append(run)
    largest = {}
    for scope, found in groups.items():
        choices = [((len(group), group[0].key), sides(group)) for group in found.values()]
        largest[scope] = max(choices, key=lambda choice: (sum(map(bool, choice[1].values())), choice[0]))[1]
    order = sorted(largest, key=lambda scope: (scope[0] != DEFAULTS["model"], scope[0], _place(scope[1])))
    return {scope: largest[scope] for scope in order}


def _place(pattern: str) -> tuple:
    return (PATTERNS.index(pattern), "") if pattern in PATTERNS else (len(PATTERNS), pattern)


def _table_1(runs: list[Run]) -> Table | None:
    def sides(group: list[Run]) -> dict:
        return {(name, key): side for name, options in METHODS.items() for key, side in points(group, options, "samples").items()}

    cells = _Cells()
    for found in _studies(runs, "ratio", sides, model=DEFAULTS["model"], pattern=DEFAULTS["pattern"]).values():
        for measure, words in MEASURES.items():
            for count in sorted({trained for _, (_, trained) in found}):
                for method in METHODS:
                    fitting = [side for (name, (_, trained)), side in found.items() if (name, trained) == (method, count)]
                    if fitting:
                        cells.add(method, f"{count} samples, {words}", max(fitting, key=len), measure=measure)
    return cells.table("table-1", "Table 1: reconstruction beside retraining", f"{DEFAULTS['criterion']} {DEFAULTS['pattern']}")


def _table_3(runs: list[Run]) -> Table | None:
    def sides(group: list[Run]) -> dict:
        return {name: pick(group, options | WHOLE) for name, options in FITS.items()}

    cells = _Cells()
    for (model, pattern), found in _studies([run for run in runs if dict(run.tuning)["chunks"] == 1], "equal", sides).items():
        column = f"{short(model)}, {pattern}"
        cells.levels(column, next((side for side in found.values() if side), {}))
        for name, side in found.items():
            cells.add(name, column, side)
    return cells.table("table-3", "Table 3: the size of the window", f"Perplexity, {DEFAULTS['criterion']}")


def _table_4(runs: list[Run]) -> Table | None:
    def sides(group: list[Run]) -> dict:
        return {criterion: pick(group, HALF | {"criterion": criterion}) for criterion in ("magnitude", "wanda", "sparsegpt")}

    cells = _Cells()
    for (model, pattern), found in _studies(runs, "gap", sides).items():
        column = f"{short(model)}, {pattern}"
        for criterion, side in found.items():
            if criterion == DEFAULTS["criterion"]:
                cells.add("dense", column, side, "dense")
            cells.add(f"{criterion}, pruned", column, side, "pruned")
            cells.add(f"{criterion}, reconstructed", column, side)
    return cells.table("table-4", "Table 4: the pruning criterion", "Perplexity, half-blocks")


def _appendix_b(runs: list[Run]) -> Table | None:
    def sides(group: list[Run]) -> dict:
        return {
            f"{propagation}, {loss}": pick(group, HALF | {"propagation": propagation, "loss": loss})
            for propagation in ("dense", "sparse", "mixed")
            for loss in ("mse", "cosine", "whitened")
        }

    cells = _Cells()
    for (model, pattern), found in _studies(runs, "equal", sides, pattern=DEFAULTS["pattern"]).items():
        for measure, words in MEASURES.items():
            column = f"{short(model)}, {pattern}, {words}"
            cells.levels(column, next((side for side in found.values() if side), {}), measure)
            for name, side in found.items():
                cells.add(name, column, side, measure=measure)
    return cells.table("appendix-b", "Appendix B: propagation and loss", f"Half-blocks, {DEFAULTS['criterion']}")


def texts(records: Iterable[RunRecord]) -> dict[str, str]:
    """What the files of all tables hold, by name: `<table>.md`, `.tex` and `.csv`; the same bytes for the same records."""
    found = {}
    for table in make(sorted(records, key=lambda record: record.key)):
        found[f"{table.name}.md"] = table.markdown()
        found[f"{table.name}.tex"] = table.latex()
        found[f"{table.name}.csv"] = table.values.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return found
